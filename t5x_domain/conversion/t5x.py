"""Checkpoints of T5X, read without T5X or TensorFlow.

T5X has written three formats, each into `MODEL_DIR/checkpoint_<step>/`:
  msgpack: one file `checkpoint`, arrays inside.
  msgpack and zarr: in place of large arrays the file names folders beside it (`t5x.checkpoints.Checkpointer`).
  Orbax: arrays in a folder, mostly `state/`, named by its `_METADATA` or by placeholders in its file `checkpoint`.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath
from flax import serialization

from t5x_domain.conversion import stores
from t5x_domain.conversion.checkpoint import Checkpoint
from t5x_domain.conversion.t5x_adafactor import SKIP, read_second_moments
from t5x_domain.conversion.t5x_gin import unsaid_fields
from t5x_domain.conversion.t5x_names import find_sources, infer_config, is_gated
from t5x_domain.conversion.tensors import LastRead, Tensor
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.models.config import ModelConfig

VERSION = 3  # of the msgpack formats, since June 2021
_MSGPACK, _PLACEHOLDER = "checkpoint", "PLACEHOLDER://"
_MESH_TENSORFLOW = b"model_checkpoint_path"
_TARGET, _SLOTS, _STEP = "target/", "state/param_states/", "state/step"


def is_t5x(path: str) -> bool:
    """Whether `path` is a checkpoint of T5X, its file, or a MODEL_DIR that holds checkpoints."""
    return _find(stores.absolute(path)) is not None


def open_t5x(
    path: str,
    *,
    overrides: Mapping[str, Any] = {},
    defaults: Mapping[str, Any] = {},
    vocabulary: Vocabulary | ByteVocabulary | None = None,
    optimizer: bool = True,
) -> Checkpoint:
    """A checkpoint of T5X: the newest of a MODEL_DIR, one folder `checkpoint_<step>`, or the file in it.

    The shape of the model is read from its arrays; what they do not tell is taken from `config.gin`, which T5X writes
    into MODEL_DIR, or assumed, and then said in `facts["assumed"]`.

    Args:
      path: local, or gs://bucket/folder.
      overrides: fields of `ModelConfig` that are known better.
      defaults: fields to take in place of an assumption.
      vocabulary: what the model was trained with; T5X does not keep it with its checkpoints.
      optimizer: whether to read the state of Adafactor.

    Raises:
      UserError: not a checkpoint of T5X, damaged, of another version, or not a T5.
    """
    file = _find(stores.absolute(path))
    if file is None:
        raise UserError(f"{path}: no T5X checkpoint there; give a folder checkpoint_<step>, or one that holds such.")
    origin, tensors = str(file), read_t5x(file, optimizer=optimizer)
    step = int(tensors.pop(_STEP).read()) if _STEP in tensors else None
    tree, slots = _taken(tensors, _TARGET), _taken(tensors, _SLOTS)
    if tensors:
        raise UserError(f"{origin}: neither parameters nor the state of Adafactor: {', '.join(tensors)}; {SKIP}.")
    if slots and step is None:
        raise UserError(f"{origin}: it has the state of an optimizer but no {_STEP}; {SKIP}.")
    for name, tensor in tree.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise UserError(f"{origin}: {name} holds {tensor.dtype}, not real numbers; save it anew with T5X.")
    sources = find_sources({name: tensor.shape for name, tensor in tree.items()}, origin)
    model, fields = infer_config(sources, origin)
    last_read = LastRead()  # T5X cuts large arrays along their largest axes, so chunks hold all layers
    unsaid, assumed = unsaid_fields(file.parent, is_gated(sources), overrides, defaults)
    return Checkpoint(
        origin,
        model,
        _config(fields | unsaid | dict(overrides)),
        {name: source.part(tree[source.path], last_read) for name, source in sources.items()},
        vocabulary,
        second_moments=read_second_moments(slots, step, sources, origin) if slots else None,
        facts={"step": step, "assumed": assumed},
    ).checked()


def read_t5x(file: epath.Path, *, optimizer: bool = True) -> dict[str, Tensor]:
    """Arrays by their names in T5X's training state, such as `target/decoder/decoder_norm/scale`.

    Args:
      file: the msgpack file of a checkpoint, or the `_METADATA` of an Orbax one.
      optimizer: whether also those that are neither parameters nor the step.

    Raises:
      UserError: it is damaged, of another version, or arrays that it names are missing.
    """
    folder, metadata = file.parent, file.parent / stores.ORBAX
    bundled = (folder / "manifest.ocdbt").exists()
    zarr3 = metadata.exists() and stores.read_json(metadata).get("use_zarr3", False)

    def read(leaf: tuple[str, Any]) -> Tensor:
        name, value = leaf
        if isinstance(value, str) and value.startswith(_PLACEHOLDER):
            key = value.removeprefix(_PLACEHOLDER)
            return _open(file, name, stores.orbax_spec(folder, key, bundled=bundled, zarr3=zarr3))
        if isinstance(value, Mapping):
            return _open(file, name, zarr_spec(str(folder), value))
        if isinstance(value, np.ndarray | np.generic | int | float):
            return Tensor.of(np.asarray(value))
        raise UserError(f"{file}: {name} is {str(value)[:80]!r}, not an array; the file is damaged.")

    values = dict(_orbax_leaves(file) if file.name == stores.ORBAX else _msgpack_leaves(file))
    values = {name: value for name, value in values.items() if optimizer or name.startswith((_TARGET, _STEP))}
    with ThreadPoolExecutor(32) as threads:  # opening one reads a small file, in a bucket too slow to do in turn
        return dict(zip(values, threads.map(read, values.items()), strict=True))


def zarr_spec(folder: str, written: Mapping[str, Any]) -> dict[str, Any]:
    """TensorStore's spec of an array that T5X has written, at the place where its checkpoint is now.

    The place that the file names is only a name within the checkpoint, in a bucket that never was. How the array is
    cut and compressed is left for the array itself to say.
    """
    name = written["kvstore"].get("path") or written.get("path", "")  # where it was before TensorStore 0.1.14
    metadata = {key: value for key, value in written["metadata"].items() if key not in ("chunks", "compressor")}
    return {"driver": written["driver"], "kvstore": stores.kvstore(f"{folder}/{name}"), "metadata": metadata}


def _find(root: epath.Path) -> epath.Path | None:
    """The file that lists the arrays of a checkpoint."""
    if root.is_file():
        return root if _is_msgpack(root) else None
    if not root.is_dir():
        return None
    for folder in (root, root / "state"):
        if (folder / _MSGPACK).is_file() and _is_msgpack(folder / _MSGPACK):
            return folder / _MSGPACK
        if (folder / stores.ORBAX).is_file() and any(
            names[0] == "target" for names in stores.orbax_names(folder / stores.ORBAX)
        ):
            return folder / stores.ORBAX
    names = [re.fullmatch(r"checkpoint_(\d+)", child.name) for child in root.iterdir()]
    newest = max((name for name in names if name), key=lambda name: int(name[1]), default=None)
    return None if newest is None else _find(root / newest[0])


def _is_msgpack(file: epath.Path) -> bool:
    """Whether it begins like a file of T5X, or of Mesh TensorFlow, which `read_t5x` refuses with its reason."""
    with file.open("rb") as stream:
        head = stream.read(64)
    is_map = len(head) > 0 and head[0] & 0xF0 == 0x80
    return (
        head.startswith(_MESH_TENSORFLOW)
        or is_map
        and any(key in head for key in (b"version", b"optimizer", b"target", b"state"))
    )


def _msgpack_leaves(file: epath.Path) -> Iterator[tuple[str, Any]]:
    data = file.read_bytes()
    if data.startswith(_MESH_TENSORFLOW):
        raise UserError(
            f"{file}: a checkpoint of Mesh TensorFlow; bring it into T5X's format first with T5X's "
            "scripts/convert_tf_checkpoint.py."
        )
    try:
        tree = serialization.msgpack_restore(data)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: cut short or damaged ({error}); copy the checkpoint again.") from error
    if not isinstance(tree, Mapping) or not {"optimizer", "target"} & tree.keys():
        raise UserError(f"{file}: holds neither 'optimizer' nor 'target'; it is no training state of T5X.")
    if "optimizer" not in tree:  # Orbax's
        return _flatten(tree)
    version = tree.get("version", 0)
    if version != VERSION:
        reason = "keeps bfloat16 as whole numbers" if version < VERSION else "is unknown here"
        raise UserError(
            f"{file}: version {version} of the format {reason}; restore and save it with T5X of 2022 or later."
        )
    return _flatten(tree["optimizer"])


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by their paths. None and empty nodes stand for parameters without a state."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and not value.keys() >= {"driver", "kvstore", "metadata"}:
            yield from _flatten(value, f"{prefix}{key}/")
        elif value is not None:
            yield f"{prefix}{key}", value


def _orbax_leaves(metadata: epath.Path) -> Iterator[tuple[str, Any]]:
    for path in stores.orbax_names(metadata):
        yield "/".join(path), _PLACEHOLDER + ".".join(path)


def _open(file: epath.Path, name: str, spec: Mapping[str, Any]) -> Tensor:
    try:
        store = stores.open_array(spec)
        missing = _missing_chunks(store) if name.startswith(_TARGET) else 0
    except ValueError as error:
        message = str(error).partition(" [tensorstore_spec")[0]
        raise UserError(f"{file}: {name} cannot be read ({message}); copy the checkpoint again.") from error
    if missing:
        raise UserError(f"{file}: {missing} files of {name} are missing; copy the checkpoint again.")
    return stores.tensor(store)


def _missing_chunks(store: ts.TensorStore) -> int:
    """Files that should be in the folder of an array but are not; zarr would silently read zeros there."""
    if store.spec().to_json()["driver"] != "zarr" or store.kvstore.spec().to_json()["driver"] == "ocdbt":
        return 0
    files = [key for key in store.kvstore.list().result() if not key.startswith(b".")]
    chunk = store.chunk_layout.read_chunk.shape
    return max(0, math.prod(-(-size // part) for size, part in zip(store.shape, chunk, strict=True)) - len(files))


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Takes out those whose names begin with `prefix`, and shortens the names by it."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}


def _config(fields: Mapping[str, Any]) -> ModelConfig:
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    for key in fields:
        if key not in known:
            raise UserError(f"ModelConfig has no field {key!r}; there are {', '.join(sorted(known))}.")
    return ModelConfig(**fields)
