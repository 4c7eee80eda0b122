import json
import os
import time

import gin
import pytest
from etils import epath

from launch import status
from launch.record import record
from t5x_domain.errors import UserError


def write_run(folder, *, seed=0, step=40, loss=2.5, held_out=(2.0, 4.0), total=100, more=""):
    """What a run of `t5x_domain.train` leaves behind."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    config = f"TRAIN_STEPS = {total}\nRUN_DIR = '{folder}'\nRun.seed = {seed}\nRun.total_steps = %TRAIN_STEPS\n{more}"
    (folder / "config.gin").write_text(f"# Macros:\n# ====\n{config}")
    lines = [{"step": 10, "loss": 9.0, "tokens_per_second": 1.0}]
    lines += [{"step": step, "loss": loss, "tokens_per_second": 12345.6}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 41, "lo')
    corpora = {str(index): {"loss": value} for index, value in enumerate(held_out)}
    (folder / "evaluations.jsonl").write_text(json.dumps({"step": step, "corpora": corpora}) + "\n")
    return folder


def rows(*folders):
    head, *lines = status.table([str(folder) for folder in folders]).splitlines()
    starts = [head.index(name) for name in head.split()]
    ends = [*starts[1:], None]
    return [
        {name: line[begin:end].strip() for name, begin, end in zip(head.split(), starts, ends, strict=True)}
        for line in lines
    ]


def test_the_best_first_with_what_sets_them_apart(tmp_path):
    write_run(tmp_path / "b", seed=1, held_out=(2.0, 4.0))
    write_run(tmp_path / "a", seed=2, held_out=(3.0, 5.0), more="linear.peak = 0.1\n")
    (tmp_path / "logs").mkdir()  # no run
    (tmp_path / "a" / "goodput.json").write_text(json.dumps({"goodput": 0.934}))
    found = rows(tmp_path)
    assert [row["run"] for row in found] == ["b", "a"]
    assert found[0] == {
        "run": "b",
        "bindings": "Run.seed=1",
        "step": "40/100",
        "loss": "2.5000",
        "held-out": "3.0000",  # the mean over corpora, as checkpoints are ranked by
        "tokens/s": "12,346",
        "goodput": "-",
        "state": "running",
    }
    assert found[1]["bindings"] == "Run.seed=2 linear.peak=0.1"
    assert found[1]["goodput"] == "93%"


def test_runs_that_have_diverged_come_after_those_that_have_not(tmp_path):
    losses = {"a": (4.0,), "b": (float("nan"),), "c": (3.0,), "d": (float("inf"),), "e": (), "f": (2.0,)}
    for name, held_out in losses.items():
        write_run(tmp_path / name, held_out=held_out)
    assert [row["run"] for row in rows(tmp_path)] == ["f", "c", "a", "b", "d", "e"]


def test_a_run_of_its_own(tmp_path):
    write_run(tmp_path / "only")
    assert rows(tmp_path / "only") == rows(tmp_path)
    assert rows(tmp_path)[0]["bindings"] == ""


def test_one_that_has_not_begun(tmp_path):
    write_run(tmp_path / "a", seed=1)
    record(str(tmp_path / "b"), None)
    found = rows(tmp_path)[1]
    assert (found["run"], found["step"], found["loss"], found["state"]) == ("b", "0", "-", "running")


def age(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


@pytest.mark.parametrize(
    ("ended", "state"),
    [(75, "preempted"), (2, "failed (2)"), (137, "failed (137)"), (0, "finished"), (None, "running")],
)
def test_how_the_last_attempt_ended(tmp_path, ended, state):
    record(str(write_run(tmp_path / "a")), ended)
    assert rows(tmp_path)[0]["state"] == state


def test_what_was_trained_since_counts_for_more(tmp_path):
    folder = write_run(tmp_path / "a")
    record(str(folder), 75)
    age(folder / "launch.json", 60)
    assert rows(tmp_path)[0]["state"] == "running"


def test_a_run_that_writes_no_more(tmp_path):
    folder = write_run(tmp_path / "a")
    for path in folder.iterdir():
        age(path, 5400)
    assert rows(tmp_path)[0]["state"] == "silent 1.5 h"


def test_finished(tmp_path):
    folder = write_run(tmp_path / "a", step=100)
    assert rows(tmp_path)[0]["state"] == "running"  # the last evaluation is still to come
    (folder / "eval.json").write_text("{}")
    age(folder / "metrics.jsonl", 5400)
    assert rows(tmp_path)[0]["state"] == "finished"


def test_gins_own_config_is_read():
    @gin.configurable("thing", module="status_test")
    def thing(lengths, names, steps):
        del lengths, names, steps

    names = [f"a rather long name, number {number}" for number in range(8)]
    gin.parse_config(["STEPS = 7", f"thing.names = {names}", "thing.lengths = {'inputs': 1}", "thing.steps = %STEPS"])
    thing()
    text = gin.operative_config_str()
    found = status.read_bindings(text)
    assert found["STEPS"] == "7"
    assert found["thing.steps"] == "%STEPS"
    assert eval(found["thing.names"]) == names and "\n" not in found["thing.names"]
    assert found["thing.lengths"] == "{'inputs': 1}"


def test_buckets_are_read_by_the_same_calls(tmp_path):
    # etils.epath gives gs:// paths the methods of local ones; nothing here may be one of pathlib's alone.
    write_run(tmp_path / "a")
    assert [type(path) for path in status._run_dirs(epath.Path(tmp_path))] == [type(epath.Path(tmp_path))]


def test_wrong_use(tmp_path, capsys):
    with pytest.raises(UserError, match="no runs there"):
        status.table([str(tmp_path)])
    assert status.main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
