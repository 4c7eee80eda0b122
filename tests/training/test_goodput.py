"""Wall time by cause, told by a clock that the test winds."""

import errno
import json
import threading

import jax
import pytest

from t5x_domain.errors import UserError
from t5x_domain.files import Growing
from t5x_domain.training.goodput import CAUSES, Ledger
from t5x_domain.training.metrics import read_json_lines


class Clock:
    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def ledger_of(clock, folder, step, total_steps=100, before=0.0):
    """A start that began `before` the ledger was made, and goes on from `step`."""
    ledger = Ledger(clock.now - before, clock)
    ledger.open(Growing(folder), step, total_steps)
    return ledger


def summary(folder):
    return json.loads((folder / "goodput.json").read_text())


def train(ledger, clock, steps, seconds=2.0, first=1):
    """`seconds` for each update, and a line for each."""
    ledger.enter("step")
    for step in range(first, first + steps):
        clock.pass_(seconds)
        ledger.record(step)


def test_every_second_of_a_start_has_one_cause(tmp_path, clock):
    began = clock.now
    clock.pass_(4)
    ledger = ledger_of(clock, tmp_path, 0, before=4)
    clock.pass_(1)
    with ledger.spending("evaluation"):
        clock.pass_(3)
    ledger.enter("step")
    clock.pass_(10)
    ledger.shift("data_wait", 2.5)
    with ledger.spending("checkpoint"):
        clock.pass_(0.5)
    clock.pass_(6)
    ledger.record(8)
    ledger.enter("export")
    clock.pass_(1)
    ledger.close()
    found = summary(tmp_path)
    expected = {"start_up": 5, "evaluation": 3, "data_wait": 2.5, "step": 10 - 2.5 + 6, "checkpoint": 0.5, "export": 1}
    assert found["seconds"] == {cause: expected.get(cause, 0) for cause in CAUSES}
    assert found["wall_seconds"] == clock.now - began
    assert found["goodput"] == 13.5 / 25.5


def test_across_a_crash_the_causes_still_sum_to_the_wall_time(tmp_path, clock):
    """Killed in update 8 after a checkpoint of 5: updates 6 and 7 are repeated, the rest of the time is lost."""
    began = clock.now
    first = ledger_of(clock, tmp_path, 0)
    clock.pass_(5)
    train(first, clock, 7)
    clock.pass_(1.5)  # then killed: no line says so
    clock.pass_(60)
    second = ledger_of(clock, tmp_path, 5)
    clock.pass_(4)
    train(second, clock, 3, first=6)
    second.close()
    found = summary(tmp_path)
    assert found["wall_seconds"] == sum(found["seconds"].values()) == clock.now - began
    seconds = {cause: amount for cause, amount in found["seconds"].items() if amount}
    assert seconds == {"start_up": 5 + 4, "step": 5 * 2 + 3 * 2, "repeated": 2 * 2, "restart": 1.5 + 60}
    assert found["starts"] == 2


def test_an_update_may_be_lost_more_than_once(tmp_path, clock):
    """Two starts from step 0 die at 4 and 3, one from 2 lives: of each of the first two nothing or 2 updates count."""
    train(ledger_of(clock, tmp_path, 0), clock, 4)
    train(ledger_of(clock, tmp_path, 0), clock, 3)
    last = ledger_of(clock, tmp_path, 2)
    train(last, clock, 2, first=3)
    last.close()
    assert summary(tmp_path)["seconds"]["repeated"] == 2 * (4 + (3 - 2))
    assert summary(tmp_path)["seconds"]["step"] == 2 * (2 + 2)


def test_an_orderly_stop_repeats_nothing(tmp_path, clock):
    first = ledger_of(clock, tmp_path, 0)
    train(first, clock, 4)
    with first.spending("checkpoint"):
        clock.pass_(3)
    first.close()
    clock.pass_(30)
    second = ledger_of(clock, tmp_path, 4)
    train(second, clock, 4, first=5)
    second.close()
    seconds = summary(tmp_path)["seconds"]
    assert (seconds["repeated"], seconds["restart"], seconds["checkpoint"]) == (0, 30, 3)


def test_the_time_after_the_end_is_no_part_of_the_run(tmp_path, clock):
    first = ledger_of(clock, tmp_path, 0, total_steps=4)
    train(first, clock, 4)
    first.close()
    clock.pass_(10**6)
    again = ledger_of(clock, tmp_path, 4, total_steps=4)  # the same command once more: nothing to train
    clock.pass_(9)
    again.close()
    assert summary(tmp_path)["wall_seconds"] == 8
    longer = ledger_of(clock, tmp_path, 4, total_steps=6)
    train(longer, clock, 2, first=5)
    longer.close()
    assert summary(tmp_path)["wall_seconds"] == 12
    assert summary(tmp_path)["goodput"] == 1


def test_a_torn_line_is_dropped(tmp_path, clock):
    train(ledger_of(clock, tmp_path, 0), clock, 2)
    path = tmp_path / "goodput.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    second = ledger_of(clock, tmp_path, 1)
    train(second, clock, 1, first=2)
    second.close()
    seconds = summary(tmp_path)["seconds"]
    assert (seconds["step"], seconds["restart"]) == (4, 2)  # what the torn line told is part of the gap
    assert [line["step"] for line in read_json_lines(path)] == [0, 1, 1, 2, 2]


def test_restart_to_first_step_is_kept_for_every_start(tmp_path, clock):
    for step, before in ((0, 12.0), (3, 7.0)):
        ledger = ledger_of(clock, tmp_path, step, before=before)
        ledger.enter("step")
        clock.pass_(1)
        assert ledger.first_step(step + 1).startswith(f"first update {before + 1:.1f} s after the start")
        ledger.close()
    assert summary(tmp_path)["first_step_seconds"] == [13, 8]


def test_compilation_is_counted_once_and_only_where_it_holds_up_training(tmp_path, clock):
    """While one program is traced another may be compiled; a compilation in another thread disturbs nobody."""
    ledger = ledger_of(clock, tmp_path, 0)
    began = clock.now
    clock.pass_(10)
    tell = jax.monitoring.record_event_time_span
    tell("/jax/core/compile/backend_compile_duration", began + 2, began + 3)
    tell("/jax/core/compile/jaxpr_trace_duration", began + 1, began + 4)
    tell("/jax/core/compile/backend_compile_duration", began + 4, began + 9)
    tell("/jax/something/else", began, began + 9)
    elsewhere = threading.Thread(target=tell, args=("/jax/core/compile/backend_compile_duration", began + 5, began + 6))
    elsewhere.start()
    elsewhere.join()
    assert dict(ledger.seconds()) == {"start_up": 2, "compile": 3 + 5}
    ledger.close()
    tell("/jax/core/compile/backend_compile_duration", began, began + 1)
    assert ledger.seconds()["compile"] == 8  # a ledger that is closed listens no more


def test_jax_tells_of_its_compilations(clock, tmp_path):
    """With JAX's own clock: a new program takes some time, the same once more takes none."""
    ledger = Ledger()
    program = jax.jit(lambda x: x * 3.25 + 1)
    program(2.0)
    compiling = ledger.seconds()["compile"]
    program(2.0)
    assert compiling > 0
    assert ledger.seconds()["compile"] == compiling
    ledger.close()


def test_the_summary_is_not_written_at_every_step(tmp_path, clock):
    ledger = ledger_of(clock, tmp_path, 0)
    train(ledger, clock, 1)
    assert summary(tmp_path)["seconds"]["step"] == 2
    train(ledger, clock, 10, first=2)  # 20 seconds later
    assert summary(tmp_path)["seconds"]["step"] == 2
    train(ledger, clock, 5, first=12)
    assert summary(tmp_path)["seconds"]["step"] == 32


def test_what_cannot_be_written_is_said_unless_something_worse_is(tmp_path, clock, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("t5x_domain.training.goodput.write_atomically", full)
    for before, said in ((None, "goodput.json: No space left on device; make room"), ("not finite", "not finite")):
        with pytest.raises(UserError, match=said), Ledger(clock.now, clock) as ledger:
            ledger.open(Growing(tmp_path), 0, 100)
            ledger._write({"step": 0, "seconds": {}})
            if before:
                raise UserError(before)


def test_only_the_first_process_writes(tmp_path, clock, monkeypatch):
    monkeypatch.setattr("t5x_domain.training.goodput.is_first", lambda: False)
    ledger = ledger_of(clock, tmp_path, 0)
    train(ledger, clock, 2)
    ledger.close()
    assert not list(tmp_path.iterdir())
    assert ledger.record(3)["seconds"]["step"] == 4  # it keeps its own account all the same
