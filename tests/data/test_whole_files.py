import errno
import tempfile

import pytest
from bucket import in_memory

from t5x_domain import files
from t5x_domain.data.whole_files import at_hand, size_and_digest, whole_file
from t5x_domain.errors import UserError

bucket = pytest.fixture(in_memory)


def test_a_file_is_whole_or_not_there(tmp_path):
    with pytest.raises(RuntimeError), whole_file(files.path(tmp_path / "a")) as path:
        path.write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with whole_file(files.path(tmp_path / "a")) as one, whole_file(files.path(tmp_path / "a")) as two:
        one.write_text("same")
        two.write_text("same")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "same")]


def test_objects_are_whole_or_not_there(bucket):
    path = files.path("gs://b/folder/a")
    with pytest.raises(RuntimeError), whole_file(path) as local:
        local.write_text("half")
        raise RuntimeError
    assert not path.exists()
    with whole_file(path) as local:
        local.write_text("all")
    assert path.read_text() == "all" and not local.exists()
    with at_hand(path) as copy:
        check = size_and_digest(copy)
        assert copy.read_text() == "all"
    assert not copy.exists()
    path.write_text("alt")
    damaged = pytest.raises(UserError, match="gs://b/folder/a: damaged, its SHA-256 is not .*--overwrite")
    with damaged, at_hand(path, check):
        pass


def test_says_that_an_object_is_gone(bucket):
    with (
        pytest.raises(UserError, match="gs://b/folder/a: is not there any more; .*--overwrite"),
        at_hand(files.path("gs://b/folder/a")),
    ):
        pass


def test_says_that_the_disk_is_full(bucket, monkeypatch):
    path = files.path("gs://b/a")
    path.write_text("all")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(path), "download", full)
    says = rf"^{tempfile.gettempdir()}/.* too full for a copy of gs://b/a; set TMPDIR"
    with pytest.raises(UserError, match=says), at_hand(path):
        pass
