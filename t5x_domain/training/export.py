"""A finished run as a Hugging Face folder (`Run.export_on_finish`)."""

import json

from t5x_domain.conversion.folders import require_free
from t5x_domain.conversion.formats import write_checkpoint
from t5x_domain.conversion.native import open_native
from t5x_domain.conversion.rtd import discriminator
from t5x_domain.conversion.stores import absolute
from t5x_domain.files import path, write_atomically
from t5x_domain.training.run import Run

_FLAG = "--export_on_finish"
_RECORD = "exports.json"  # in the run directory: the folders that were written, so that a restart does not mind them


def require_free_export(run: Run) -> None:
    """Raises UserError, before anything is trained, if the folder cannot be made at the end."""
    if run.export_on_finish is not None and not _is_done(run):
        require_free(run.export_on_finish, _FLAG)


def export(run: Run) -> None:
    """Writes the newest checkpoint of the run, unless that was done.

    Raises:
      UserError: the folder holds something else by now, or the disk is full.
    """
    target = run.export_on_finish
    if target is None or _is_done(run):
        return
    write_checkpoint(discriminator(open_native(run.run_dir)), target, "huggingface", flag=_FLAG)
    written = json.dumps([*_written(run), str(absolute(target))], indent=1)
    write_atomically(path(run.run_dir) / _RECORD, written.encode())
    print(f"{target}: written for Hugging Face")


def _written(run: Run) -> list[str]:
    record = path(run.run_dir) / _RECORD
    return json.loads(record.read_text(encoding="utf-8")) if record.exists() else []


def _is_done(run: Run) -> bool:
    target = absolute(run.export_on_finish)
    return str(target) in _written(run) and target.exists()
