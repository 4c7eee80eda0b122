"""Our own checkpoints: a run, or a folder of parameters that a conversion has made.

A run keeps parameters in `checkpoints/<step>/params`, a conversion in `params`; see `conversion.description` for what
says which model they belong to.
"""

import asyncio
import dataclasses
import functools
import json
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax import traverse_util

from t5x_domain.conversion import stores
from t5x_domain.conversion.checkpoint import Checkpoint, SecondMoments
from t5x_domain.conversion.description import DESCRIPTION, describe, read_description, write_gin
from t5x_domain.conversion.layout import Leaf, leaves
from t5x_domain.conversion.tensors import LastRead, Tensor
from t5x_domain.errors import UserError
from t5x_domain.files import is_remote

SECOND_MOMENTS = "second_moments.npz"
COMMITTED = "commit_success.txt"  # the last object that Orbax writes of a step in a bucket


def find_params(path: str) -> epath.Path:
    """The folder of parameters that `path` means: a run, its checkpoints/, one step of them, or a converted folder.

    Raises:
      UserError: there is no complete checkpoint.
    """
    root = stores.absolute(path)  # Orbax finds nothing under a relative path
    for folder in (root / "checkpoints", root):
        steps = [int(step.name) for step in folder.iterdir() if is_complete_step(step)] if folder.is_dir() else []
        if steps:
            return folder / str(max(steps)) / "params"
        if (folder / "params").exists():
            return folder / "params"
    raise UserError(f"{path}: no complete checkpoint there; give a run directory or one of its checkpoints.")


def is_complete_step(folder: epath.Path) -> bool:
    """Whether a folder is a complete checkpoint: renamed when it is on a disk, marked when it is in a bucket."""
    return folder.name.isdigit() and (not is_remote(folder) or (folder / COMMITTED).exists())


def open_native(path: str) -> Checkpoint:
    """The newest checkpoint of a run, one step of it, or a converted folder.

    Raises:
      UserError: it is none of these, or incomplete.
    """
    params = find_params(path)
    folder = next((f for f in list(params.parents)[:3] if (f / DESCRIPTION).exists()), None)
    if folder is None:
        raise UserError(
            f"{path}: no {DESCRIPTION} beside the parameters, so their model is unknown; restore that file, or start "
            "the run once more, which writes it."
        )
    model, config, vocabulary, facts = read_description(folder)
    return Checkpoint(
        str(path),
        model,
        config,
        _tensors(params, leaves(model, config)),
        vocabulary,
        second_moments=_read_second_moments(folder),
        facts=facts | _facts_of_run(folder, params),
    ).checked()


def write_native(checkpoint: Checkpoint, folder: Path, *, home: str) -> None:
    """Writes parameters as Orbax does, one layer in memory at a time, with model.json, model.gin and the vocabulary.

    Args:
      checkpoint: what to write.
      folder: an empty folder.
      home: where the folder will be in the end, for the paths in model.gin.
    """
    unread = {leaf.name: _Unread.of(leaf, checkpoint.tensors) for leaf in leaves(checkpoint.model, checkpoint.config)}
    params = traverse_util.unflatten_dict(unread, sep="/")
    save_args = jax.tree.map(lambda leaf: ocp.SaveArgs(shard_axes=(0,) if leaf.stacked else ()), params)
    writer = _Writer()
    registry = ocp.type_handlers.create_type_handler_registry((_Unread, writer))
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
            checkpointer.save((folder / "params").resolve(), args=ocp.args.PyTreeSave(params, save_args=save_args))
    finally:
        if writer.error is not None:  # the cause of what Orbax may have said of the folder
            raise writer.error
    if checkpoint.second_moments is not None:
        moments = checkpoint.second_moments
        named = {f"{slot}:{name}": value for name, slots in moments.slots.items() for slot, value in slots.items()}
        np.savez(folder / SECOND_MOMENTS, step=np.int64(moments.step), **named)
    describe(folder, checkpoint.model, checkpoint.config, checkpoint.vocabulary, checkpoint.facts)
    write_gin(folder, checkpoint.model, checkpoint.config, checkpoint.vocabulary, home=home)


@dataclasses.dataclass(frozen=True, eq=False)
class _Unread:
    """A parameter that Orbax takes for an array and `_Writer` reads piece by piece."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    parts: tuple[Tensor, ...]

    @classmethod
    def of(cls, leaf: Leaf, tensors: Mapping[str, Tensor]) -> "_Unread":
        dtype = functools.reduce(np.promote_types, (tensors[part].dtype for part in leaf.parts))
        return cls(leaf.shape, dtype, leaf.stacked, tuple(tensors[part].astype(dtype) for part in leaf.parts))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)


class _Writer(ocp.type_handlers.NumpyHandler):
    """Writes arrays that are not in memory; they are read back as NumPy's."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._one_at_a_time = asyncio.Lock()
        self.error: Exception | None = None  # raised when Orbax is done, lest it leave other writes behind

    async def _open_and_write(self, value: _Unread, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        async with self._one_at_a_time:
            if self.error is not None:
                return
            try:
                store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
                for position, part in enumerate(value.parts):
                    await (store[position] if value.stacked else store).write(part.read())
            except Exception as error:
                self.error = error


def _tensors(params: epath.Path, wanted: Sequence[Leaf]) -> dict[str, Tensor]:
    """Every array of an Orbax checkpoint, by layer where `wanted` says that it holds several."""
    try:
        stored = ["/".join(names) for names in stores.orbax_names(params / stores.ORBAX)]
        bundled = (params / "manifest.ocdbt").exists()
        specs = {name: stores.orbax_spec(params, name.replace("/", "."), bundled=bundled) for name in stored}
        stores_by_name = {name: stores.open_array(spec) for name, spec in specs.items()}
    except (ValueError, OSError, KeyError) as error:
        message = " ".join(str(error).split())[:300]
        raise UserError(f"{params}: incomplete or damaged ({message}); take another checkpoint of the run.") from error
    tensors, last_read = {}, LastRead()
    for leaf in wanted:
        store = stores_by_name.pop(leaf.name, None)
        if store is None:
            continue
        whole = stores.tensor(store)
        if not leaf.stacked or whole.shape[:1] != leaf.shape[:1]:
            tensors[leaf.parts[0]] = whole
        elif store.chunk_layout.read_chunk.shape[0] == 1:
            tensors |= {part: whole.at(0, layer) for layer, part in enumerate(leaf.parts)}
        else:
            tensors |= {part: last_read.layer(whole, 0, layer) for layer, part in enumerate(leaf.parts)}
    return tensors | {name: stores.tensor(store) for name, store in stores_by_name.items()}


def _read_second_moments(folder: epath.Path) -> SecondMoments | None:
    path = folder / SECOND_MOMENTS
    if not path.exists():
        return None
    slots: dict[str, dict[str, np.ndarray]] = {}
    try:
        with path.open("rb") as file, np.load(file) as saved:
            for key in saved.files:
                slot, _, name = key.partition(":")
                if name:
                    slots.setdefault(name, {})[slot] = saved[key]
            return SecondMoments(int(saved["step"]), slots)
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path}: damaged ({error}); restore it, or remove it to leave the optimizer's state."
        ) from error


def _facts_of_run(folder: epath.Path, params: epath.Path) -> dict[str, Any]:
    """What a run has written about itself, for the model card."""
    step = params.parent.name
    if not (folder / "run.json").exists() or not step.isdigit():
        return {}
    facts: dict[str, Any] = {"step": int(step), "run": _json(folder / "run.json")}
    scores = _json(folder / "eval.json") if (folder / "eval.json").exists() else {}
    if scores.get("after", {}).get("step") == int(step):  # and not of another checkpoint
        facts |= {"scores": scores["after"], "phases": _json(folder / "phases.json")}
    return facts


def _json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it, or remove it with its step.") from error
