"""Folders that appear whole or not at all."""

import contextlib
import glob
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from t5x_domain import files
from t5x_domain.errors import UserError


def require_free(target: str, flag: str) -> None:
    """Raises UserError unless `target` can be made: a folder that does not exist or is empty."""
    if not target:
        raise UserError(f"{flag}=: name a folder.")
    path = files.path(target)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{flag}={target}: exists and is not empty; name another folder or remove it.")


@contextlib.contextmanager
def new_folder(target: str, flag: str, *, last: str) -> Iterator[Path]:
    """A folder to write into, beside `target`; it gets that name when all is written, and is removed if not.

    For a bucket it is a folder of this machine, which is uploaded when all is written.

    Args:
      target: where the files are to be in the end.
      flag: where `target` was given, for messages.
      last: the file without which nobody takes the folder for whole: the last one to be uploaded.

    Raises:
      UserError: `target` holds something, or the files cannot be written.
    """
    require_free(target, flag)
    if files.is_remote(target):
        folder = files.scratch_folder()
        try:
            yield folder
            files.upload_folder(folder, files.path(target), last=last)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
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
