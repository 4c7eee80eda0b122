import json
from pathlib import Path

import pytest

from t5x_domain.errors import UserError
from t5x_domain.training.metrics import JsonLines, Progress, read_json_lines


def write(path, *steps):
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))


def test_steps_beyond_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2, 3, 4)
    lines = JsonLines(path, keep_until=2)
    lines.write({"step": 3, "loss": 0.5})
    lines.close()
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


@pytest.mark.parametrize("torn", ['{"step": 3', '{"step": 3}'])
def test_a_line_without_its_end_was_never_written(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    path.write_text(path.read_text() + torn)
    lines = JsonLines(path, keep_until=9)
    lines.write({"step": 3, "again": True})
    lines.close()
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_a_full_disk_is_said_in_a_sentence(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl", keep_until=0)
    lines._file = Path("/dev/full").open("a")  # noqa: SIM115
    sentence = "metrics.jsonl: No space left on device; make room, .* then start the same command again"
    for write in (lambda: lines.write({"step": 1}), lines.close):  # what is not written yet is tried again
        with pytest.raises(UserError, match=sentence):
            write()
    (tmp_path / "blocked.partial").mkdir()
    with pytest.raises(UserError, match="blocked.jsonl: Is a directory; .* see that it can be written"):
        JsonLines(tmp_path / "blocked.jsonl", keep_until=0)


def test_no_file_is_no_lines(tmp_path):
    assert read_json_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(("mfu", "shown"), [(0.4132, "  MFU 41.3%"), (None, "")])
def test_the_line_of_a_logged_step(capsys, mfu, shown):
    progress = Progress(0, 1000)
    progress.logged(940, {"loss": 2.34567, "tokens_per_second": 12345.6, "mfu": mfu}, seconds_per_step=2.0)
    progress.close()
    assert capsys.readouterr().out == f"step 940/1,000  loss 2.346  12,346 tokens/s{shown}  2:00 left\n"
