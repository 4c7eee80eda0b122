import dataclasses
import errno
import os
import platform
import resource
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from small_models import CONFIG, random_checkpoint

from t5x_domain.conversion.folders import new_folder, require_free
from t5x_domain.conversion.formats import WRITTEN, write_checkpoint
from t5x_domain.conversion.tensors import Tensor
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import EncoderDecoder


def test_a_new_folder_appears_when_all_is_written(tmp_path):
    target = tmp_path / "a" / "b"
    with new_folder(str(target), "--to", last="a") as folder:
        assert not target.exists()
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
    assert (target / "sub" / "file").read_text() == "x"
    assert os.listdir(tmp_path / "a") == ["b"]


def test_a_relative_path_stays_where_it_was_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_folder("here", "--to", last="a"):
        monkeypatch.chdir("/")
    assert (tmp_path / "here").is_dir()


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    (tmp_path / "a").mkdir()
    with new_folder(str(tmp_path / "a"), "--to", last="a") as folder:
        (folder / "file").write_text("x")
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == ["file"]


def test_what_is_there_is_never_touched(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("precious")
    for name in ("file", "folder"):
        for make in (require_free, lambda *given: new_folder(*given, last="a").__enter__()):
            with pytest.raises(UserError, match=f"--to=.*/{name}: exists and is not empty; name another folder"):
                make(str(tmp_path / name), "--to")
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "file").read_text() == "precious"


def test_a_folder_must_be_named():
    with pytest.raises(UserError, match="--to=: name a folder"):
        require_free("", "--to")


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), UserError("no")])
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)) as raised, new_folder(str(tmp_path / "a"), "--to", last="a") as folder:
        (folder / "file").write_text("half")
        raise error
    assert raised.value is error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_failed_write_is_said(tmp_path, code):
    with (
        pytest.raises(UserError, match=f"--to=.*/a: could not be written .*{os.strerror(code)}"),
        new_folder(str(tmp_path / "a"), "--to", last="a"),
    ):
        raise OSError(code, os.strerror(code))
    assert os.listdir(tmp_path) == []


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(UserError, match="--export=.*file/a: could not be written .*Not a directory"),
        new_folder(str(tmp_path / "file" / "a"), "--export", last="a"),
    ):
        pass
    assert (tmp_path / "file").read_text() == "x"


@pytest.fixture
def full_disk():
    """No file may grow beyond 20 kB: the write fails, as on a full disk."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # or it would end this process
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("format_name", WRITTEN)
def test_a_full_disk(tmp_path, format_name, full_disk):
    large = random_checkpoint(EncoderDecoder, dataclasses.replace(CONFIG, vocab_size=5000))  # 160 kB each way
    with pytest.raises(UserError, match=f"--to=.*/a: could not be written .*{os.strerror(errno.EFBIG)}"):
        write_checkpoint(large, str(tmp_path / "a"), format_name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("format_name", WRITTEN)
def test_an_error_while_a_tensor_is_read_is_its_own(tmp_path, format_name):
    """Not one of the disk that is written to."""
    checkpoint = random_checkpoint(EncoderDecoder)

    def read(index):
        raise UserError("model.safetensors: became shorter")

    damaged = Tensor((CONFIG.embed_dim,), np.dtype(np.float32), read)
    tensors = {**checkpoint.tensors, "decoder/norm/scale": damaged}
    with pytest.raises(UserError, match="^model.safetensors: became shorter$"):
        write_checkpoint(dataclasses.replace(checkpoint, tensors=tensors), str(tmp_path / "a"), format_name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("format_name", WRITTEN)
def test_a_failed_check_leaves_no_folder(tmp_path, format_name):
    def check(folder):
        assert os.listdir(folder)
        raise UserError("--check: they differ")

    with pytest.raises(UserError, match="they differ"):
        write_checkpoint(random_checkpoint(EncoderDecoder), str(tmp_path / "a"), format_name, check=check)
    assert os.listdir(tmp_path) == []


KILLED = """
    import sys, time, pathlib
    sys.path.insert(0, {tests!r})
    from small_models import random_checkpoint
    from t5x_domain.conversion.formats import write_checkpoint
    from t5x_domain.models.assemblies import EncoderDecoder

    def wait(folder):
        print("written", flush=True)
        time.sleep(60)

    write_checkpoint(random_checkpoint(EncoderDecoder), {target!r}, {format_name!r}, check=wait)
"""


@pytest.mark.parametrize("format_name", WRITTEN)
def test_killed(tmp_path, format_name):
    """Whatever is left then has another name, hidden; a second try is not in its way."""
    target = tmp_path / "a"
    script = textwrap.dedent(KILLED).format(
        tests=os.path.dirname(os.path.dirname(__file__)), target=str(target), format_name=format_name
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not target.exists()
    assert all(name.startswith(".a.partial-") for name in os.listdir(tmp_path))
    write_checkpoint(random_checkpoint(EncoderDecoder), str(target), format_name)
    assert target.is_dir()


def test_what_a_killed_process_has_left_is_removed(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    left, running = (tmp_path / f".model.partial-{platform.node()}-{pid}" for pid in (dead.pid, os.getppid()))
    for folder in (left, running):
        folder.mkdir()
    with new_folder(str(tmp_path / "model"), "--to", last="a") as folder:
        (folder / "x").write_text("x")
    assert not left.exists() and running.exists()
