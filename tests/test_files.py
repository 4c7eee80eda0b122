import os

import pytest

from t5x_domain.files import write_atomically


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
