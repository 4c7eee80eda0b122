import json

import pytest

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


def test_no_file_is_no_lines(tmp_path):
    assert read_json_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(("mfu", "shown"), [(0.4132, "  MFU 41.3%"), (None, "")])
def test_the_line_of_a_logged_step(capsys, mfu, shown):
    progress = Progress(0, 1000)
    progress.logged(940, {"loss": 2.34567, "tokens_per_second": 12345.6, "mfu": mfu}, seconds_per_step=2.0)
    progress.close()
    assert capsys.readouterr().out == f"step 940/1,000  loss 2.346  12,346 tokens/s{shown}  2:00 left\n"
