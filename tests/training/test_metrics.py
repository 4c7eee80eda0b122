import json
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from t5x_domain.errors import UserError
from t5x_domain.files import Growing
from t5x_domain.training.metrics import JsonLines, MetricsWriter, Progress, read_json_lines


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


def test_tensorboard_has_the_scalars_and_the_step_from_which_they_are_repeated(tmp_path):
    for start in (0, 2):
        writer = MetricsWriter(Growing(tmp_path / str(start)), start, begins=start == 0)
        writer.log(start + 1, {"loss": 2.5, "corpus_loss": {"law": 3.0, "general": None}})
        writer.close()
        (file,) = (tmp_path / str(start) / "tensorboard").iterdir()
        version, purge, *scalars = events(file)
        assert (version.file_version, purge.step) == ("brain.Event:2", start + 1)
        assert purge.session_log.status == SessionLog.START
        found = [(event.step, value.tag, value.simple_value) for event in scalars for value in event.summary.value]
        assert found == [(start + 1, "train/loss", 2.5), (start + 1, "train/corpus_loss/law", 3.0)]


def events(file):
    """Of records: a length of 8 bytes, its checksum of 4, the event, and its checksum of 4."""
    content = file.read_bytes()
    while content:
        end = 12 + int.from_bytes(content[:8], "little")
        yield Event.FromString(content[12:end])
        content = content[end + 4 :]


def test_a_disk_that_is_full_for_tensorboard_ends_the_run(tmp_path):
    """Rather than that it waits for ever for a thread that did."""
    writer = MetricsWriter(Growing(tmp_path), 0, begins=True)
    writer._tensorboard._writer._py_recordio_writer._writer = Path("/dev/full").open("ab")  # noqa: SIM115
    with pytest.raises(UserError, match="tensorboard: No space left on device; make room"):
        for step in range(1, 1000):
            writer.log(step, {"loss": 2.0})


def test_no_file_is_no_lines(tmp_path):
    assert read_json_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(("mfu", "shown"), [(0.4132, "  MFU 41.3%"), (None, "")])
def test_the_line_of_a_logged_step(capsys, mfu, shown):
    progress = Progress(0, 1000)
    progress.logged(940, {"loss": 2.34567, "tokens_per_second": 12345.6, "mfu": mfu}, seconds_per_step=2.0)
    progress.close()
    assert capsys.readouterr().out == f"step 940/1,000  loss 2.346  12,346 tokens/s{shown}  2:00 left\n"
