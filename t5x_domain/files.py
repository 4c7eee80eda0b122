"""The one place that opens a user's paths: of this machine, gs:// or s3://, by the same calls.

    from t5x_domain import files

    folder = files.path("gs://bucket/runs/1")          # an epath.Path; so is folder / "model.json"
    files.write_atomically(folder / "model.json", b"{}")
    (folder / "model.json").read_bytes()
    ArrayRecordReader(str(files.local_copy(folder / "train.arrayrecord")))

Every method of such a path tries again what passes by itself (see `buckets.retrying`) and raises a `UserError` for
missing credentials, permissions, buckets and packages. There are three differences to a disk: objects are written whole
(`write_atomically`, `write_bytes`, `write_text`, `upload_folder`; no `open("w")`, no appending: see `Growing`), nothing
is renamed, and a folder exists while something is in it.
"""

import contextlib
import functools
import hashlib
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from t5x_domain.buckets import BucketPath, retrying
from t5x_domain.errors import UserError

__all__ = [
    "Growing",
    "changed_keys",
    "is_remote",
    "local_copy",
    "path",
    "retrying",
    "upload_folder",
    "write_atomically",
]


def path(place: str | os.PathLike) -> epath.Path:
    """The path that a user gave.

    Raises:
      UserError: it has a scheme other than gs:// and s3://, or one of these with a single slash.
    """
    if re.match("[a-z][a-z0-9+.-]*://|(gs|s3):/", str(place)) and not is_remote(place):
        raise UserError(f"{place}: neither a path of this machine nor gs:// or s3://, which are all that is read.")
    return epath.Path(place)


def is_remote(place: str | os.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return str(place).startswith(("gs://", "s3://"))


def write_atomically(place: str | os.PathLike, content: bytes) -> None:
    """Writes a file or an object whole or not at all; folders above it are made."""
    if is_remote(place):
        path(place).write_bytes(content)
        return
    target = Path(path(place))
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A file beside `target`, of this machine, that takes its place when the block ends and goes if it fails.

    Several processes may write the same file at once, on several machines; it is one of theirs, and durable.
    """
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield partial
        fsync(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def fsync(place: Path) -> None:
    """Waits until a file or folder of this machine is on its disk."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def local_copy(place: str | os.PathLike) -> Path:
    """A file of this machine with the same content, for libraries that open files themselves.

    A local path is returned as it is. An object is copied once into a folder that goes when the process ends, and once
    more if another has taken its place.

    Raises:
      FileNotFoundError: there is no such object.
    """
    if not is_remote(place):
        return Path(place)
    remote = path(place)
    stat = remote.stat()
    known = hashlib.sha256(f"{remote} {stat.length} {stat.mtime}".encode()).hexdigest()[:16]
    copy = Path(_scratch(os.getpid()).name, known, remote.name)
    if not copy.exists():
        copy.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=copy.parent) as partial:  # another thread may want it, too
            remote.download(Path(partial, copy.name))
            os.replace(Path(partial, copy.name), copy)
    return copy


def scratch_folder() -> Path:
    """A new folder of this machine that is removed when the process ends."""
    return Path(tempfile.mkdtemp(dir=_scratch(os.getpid()).name))


def matching(pattern: str) -> list[tuple[str, int]]:
    """(object, bytes) of all in a bucket that match a glob pattern such as "gs://bucket/corpus/*.jsonl", sorted."""
    return path(pattern).matching()


def listing(folder: epath.Path) -> list[tuple[str, int, int]]:
    """(name in `folder`, bytes, date of the last change in nanoseconds) of every file below it, by name."""
    if is_remote(folder):
        return folder.listing()
    found = [file for file in sorted(Path(folder).rglob("*")) if file.is_file()]
    return [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in found]


def upload_folder(folder: Path, target: BucketPath, *, last: str) -> None:
    """Copies a folder of this machine into a bucket, the file `last` after all others: it tells that it is whole."""
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file == folder / last)
    for file in files:
        (target / file.relative_to(folder).as_posix()).upload(file)


class Growing:
    """A folder whose files are appended to: `home`.

    `local` is where they are written. Of a bucket, whose objects cannot grow, it is a folder of this machine, of which
    `publish` uploads the changed files whole: call it when what was written has to survive the process.
    """

    def __init__(self, folder: epath.Path) -> None:
        """Makes the folder."""
        self.home = folder
        self._remote = folder if is_remote(folder) else None
        self.local = Path(folder) if self._remote is None else scratch_folder()
        self.local.mkdir(parents=True, exist_ok=True)
        self._published: dict[Path, tuple[int, int]] = {}

    def publish(self) -> None:
        """Uploads what has changed; nothing to do on this machine."""
        if self._remote is None:
            return
        for file in sorted(self.local.rglob("*")):
            if not file.is_file():  # a folder, or a link to nothing
                continue
            try:
                state = (file.stat().st_size, file.stat().st_mtime_ns)
                if self._published.get(file) != state:
                    (self._remote / file.relative_to(self.local).as_posix()).upload(file)
                    self._published[file] = state
            except (FileNotFoundError, UserError):
                if file.exists():  # Weights & Biases writes here, too, and removes some
                    raise


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys with another value, or in one of the two only."""
    return [key for key in {**before, **now} if before.get(key) != now.get(key)]


@functools.cache
def _scratch(pid: int) -> tempfile.TemporaryDirectory:
    """The folder of a process; a fork has its own."""
    return tempfile.TemporaryDirectory(prefix=f"t5x_domain-{pid}-")
