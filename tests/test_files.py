import os

import pytest

from t5x_domain.errors import UserError
from t5x_domain.files import Growing, write_atomically


def test_a_file_is_whole_or_what_it_was(tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "file"
    write_atomically(path, b"first")
    assert path.read_bytes() == b"first"

    def full(_):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert os.listdir(path.parent) == ["file"]


def test_writers_do_not_share_what_they_write_into(tmp_path, monkeypatch):
    """Processes of several hosts may have one number; that of another may write at any moment."""
    path, fsync = tmp_path / "file", os.fsync

    def meanwhile(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        write_atomically(path, b"the other's")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", meanwhile)
    write_atomically(path, b"ours")
    assert path.read_bytes() == b"ours" and os.listdir(tmp_path) == ["file"]


class Bucket:
    """Of its objects, "gone" is removed from the disk before it is uploaded, and "refused" is not taken."""

    def __init__(self, uploaded, name=""):
        self._uploaded, self._name = uploaded, name

    def __truediv__(self, name):
        return Bucket(self._uploaded, name)

    def upload(self, file):
        if self._name == "gone":
            file.unlink()
        if self._name in ("gone", "refused"):
            raise UserError(f"{self._name} cannot be written")
        self._uploaded.append(self._name)


def test_what_others_write_in_a_growing_folder_may_vanish(tmp_path):
    uploaded, growing = [], Growing(tmp_path)
    growing._remote = Bucket(uploaded)
    for name in ("a", "gone"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("nothing")
    for _ in range(2):
        growing.publish()
    assert uploaded == ["a"]
    (tmp_path / "refused").touch()
    with pytest.raises(UserError, match="refused cannot be written"):
        growing.publish()
