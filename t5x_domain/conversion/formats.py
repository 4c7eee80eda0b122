"""Which format a folder has, and how it is opened and written."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from t5x_domain import files
from t5x_domain.conversion.checkpoint import Checkpoint
from t5x_domain.conversion.description import DESCRIPTION
from t5x_domain.conversion.folders import new_folder
from t5x_domain.conversion.huggingface import CONFIG, open_huggingface, write_huggingface
from t5x_domain.conversion.native import find_params, open_native, write_native
from t5x_domain.conversion.safetensors_files import INDEX, SINGLE
from t5x_domain.conversion.stores import absolute
from t5x_domain.conversion.t5x import is_t5x, open_t5x
from t5x_domain.errors import UserError

READ: Mapping[str, Callable[..., Checkpoint]] = {
    "native": open_native,
    "huggingface": open_huggingface,
    "t5x": open_t5x,
}
WRITTEN = ("native", "huggingface")


def detect(path: str, flag: str = "--from") -> str:
    """The format of the model at `path`, which was given as `flag`.

    Raises:
      UserError: there is nothing, or nothing that is known.
    """
    folder = files.path(path)
    if not folder.exists():
        raise UserError(
            f"{flag}={path}: there is no such folder; download a model of a hub first: hf download NAME --local-dir=DIR"
        )
    if is_t5x(path):
        return "t5x"
    if (folder / CONFIG).exists():
        return "huggingface"
    if not folder.is_dir():
        raise UserError(f"{flag}={path}: a file; give the folder of the model that it belongs to.")
    if any((folder / name).exists() for name in (SINGLE, INDEX)):
        raise UserError(f"{flag}={path}: has weights as Hugging Face writes them, but no {CONFIG}; add that file.")
    try:
        find_params(path)
    except UserError as error:
        raise UserError(
            f"{flag}={path}: no model there; give a run with a checkpoint, a converted folder, a Hugging Face folder "
            "or a T5X checkpoint."
        ) from error
    return "native"


def state_of(path: str, flag: str = "--from") -> str:
    """What tells a model from another that takes its place: of a run its newest checkpoint, and its files' dates.

    Args:
      path: a folder that `open_checkpoint` opens.
      flag: where it was given, for messages.

    Returns:
      The folder of the parameters, and in brackets a digest of the names, sizes and dates of what it holds.
    """
    folder = find_params(path) if detect(path, flag) == "native" else absolute(path)
    digest = hashlib.sha256()
    for name, size, date in files.listing(folder):
        digest.update(f"{name} {size} {date}\n".encode())
    return f"{folder} ({digest.hexdigest()[:16]})"


def open_checkpoint(
    path: str, format_name: str | None = None, *, flag: str = "--from", t5x: Mapping[str, Any] = {}, **options: Any
) -> Checkpoint:
    """Opens the model at `path` without reading its parameters.

    Args:
      path: where it is.
      format_name: one of `READ`; None for what is found there.
      flag: where `path` was given, for messages.
      t5x: options of `open_t5x`, if it is T5X's.
      **options: those of the format's reader.

    Raises:
      UserError: there is none, or it is incomplete.
    """
    format_name = format_name or detect(path, flag)
    return READ[format_name](path, **options, **(t5x if format_name == "t5x" else {}))


def write_checkpoint(
    checkpoint: Checkpoint,
    target: str,
    format_name: str,
    *,
    flag: str = "--to",
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes the model into a new folder, which is complete or absent.

    Args:
      checkpoint: what to write.
      target: the folder, of this machine or in a bucket.
      format_name: one of `WRITTEN`.
      flag: where `target` was given, for messages.
      check: called with the finished folder before it gets its name; if it raises, there will be no folder.

    Raises:
      UserError: `target` holds something, the format cannot express the model, or the disk is full.
    """
    with new_folder(target, flag, last=DESCRIPTION if format_name == "native" else CONFIG) as folder:
        if format_name == "native":
            write_native(checkpoint, folder, home=target)
        else:
            write_huggingface(checkpoint, folder)
        check(folder)
