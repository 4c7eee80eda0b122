"""Folders that appear whole or not at all."""

import contextlib
import functools
import glob
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from t5x_domain.errors import UserError


def require_free(target: str, flag: str) -> None:
    """Raises UserError unless `target` can be made: a local folder that does not exist or is empty."""
    path = Path(target)
    if not target or "://" in target:
        raise UserError(f"{flag}={target}: give a folder of this machine, and copy it to a bucket when it is complete.")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{flag}={target}: exists and is not empty; name another folder or remove it.")


@contextlib.contextmanager
def new_folder(target: str, flag: str) -> Iterator[Path]:
    """A folder to write into, beside `target`; it gets that name when all is written, and is removed if not.

    Raises:
      UserError: `target` holds something, or the files cannot be written.
    """
    require_free(target, flag)
    final = Path(target).resolve()
    mark = f".{final.name}.partial-{platform.node()}"  # a shared disk knows the processes of other machines, too
    partial = final.with_name(f"{mark}-{os.getpid()}")
    for left in final.parent.glob(f"{glob.escape(mark)}-*"):
        if not _is_running(left.name.rpartition("-")[2]):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (partial, *partial.rglob("*")):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        os.replace(partial, final)
    except BaseException as error:
        _remove(partial)
        reason = _failed_write(error, partial)
        if reason is not None:
            raise UserError(f"{flag}={target}: could not be written ({reason}); nothing was left behind.") from error
        raise


def scratch_folder() -> Path:
    """A new folder that is removed when the process ends."""
    return Path(tempfile.mkdtemp(dir=_scratch().name))


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def _remove(folder: Path) -> None:
    """Removes a folder into which threads of TensorStore may still be writing."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
        if not folder.exists():
            return


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # it runs, as somebody else's
        return True
    return True


def _failed_write(error: BaseException, folder: Path) -> str | None:
    """Why the disk refused, if it did. TensorStore says so at the end of the text of a ValueError."""
    if isinstance(error, OSError):
        place = None if error.filename is None else Path(os.fsdecode(error.filename))
        return str(error) if place is None or place.is_relative_to(folder) or folder.is_relative_to(place) else None
    reason = re.search(r"([^:]+) \[os_error_code=", str(error)) if isinstance(error, ValueError) else None
    return reason and reason[1].strip()
