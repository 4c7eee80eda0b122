"""Large files of a cache, on this machine or in a bucket: written whole or not at all, read from this machine."""

import contextlib
import errno
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from t5x_domain import files
from t5x_domain.errors import UserError


@contextlib.contextmanager
def whole_file(path: epath.Path) -> Iterator[Path]:
    """A file of this machine to write, that becomes `path` when the block ends and goes if it fails.

    Several processes may write the same file at once; it is one of theirs. On this machine it is durable.
    """
    if files.is_remote(path):
        local = files.scratch_folder() / path.name
        try:
            yield local
            path.upload(local)
        finally:
            shutil.rmtree(local.parent)
        return
    with files.replacing(Path(path)) as partial:
        yield partial


@contextlib.contextmanager
def at_hand(path: epath.Path, check: dict | None = None) -> Iterator[Path]:
    """A file of this machine with what is in `path`: itself, or a copy that goes when the block ends.

    What has opened or mapped a copy keeps it, and its room on the disk, until it is closed.

    Raises:
      UserError: there is no such object; a copy has another size or SHA-256 than `check` says (as `size_and_digest`
        gives them); or the disk is too full for it.
    """
    if not files.is_remote(path):
        yield Path(path)
        return
    copy = files.scratch_folder() / path.name
    try:
        try:
            path.download(copy)
        except FileNotFoundError as error:
            raise UserError(
                f"{path}: is not there any more; put it back, or if it is a token cache's, write that again with "
                "`python -m t5x_domain.prepare --overwrite`."
            ) from error
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(
                f"{copy.parent.parent}: the disk is too full for a copy of {path}; set TMPDIR to a folder with more "
                "room, or in training Run.lanes, so that every host reads fewer shards."
            ) from error
        if check is not None and size_and_digest(copy) != check:
            raise UserError(
                f"{path}: damaged, its SHA-256 is not the manifest's; write the token cache again with `python -m "
                "t5x_domain.prepare --overwrite`."
            )
        yield copy
    finally:
        shutil.rmtree(copy.parent)


def size_and_digest(path: Path) -> dict:
    """{"size": bytes, "sha256": hexadecimal digits} of a file of this machine."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}
