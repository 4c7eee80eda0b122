"""safetensors files, read and written one tensor at a time.

The `safetensors` package has no bfloat16 for NumPy and writes a file from arrays that are all in memory, hence this
file. The format: 8 bytes, little-endian, the length of the header; the header, a JSON object {name: {dtype, shape,
data_offsets}} padded with spaces; the data (https://github.com/huggingface/safetensors#format).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from etils import epath

from t5x_domain import files
from t5x_domain.conversion.tensors import Index, Tensor
from t5x_domain.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def open_folder(folder: epath.PathLike) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder, in one file or in shards with an index.

    Raises:
      UserError: there are none, or a file is missing, cut off or not what the index says.
    """
    folder = files.path(folder)
    if (folder / SINGLE).exists():  # also where transformers looks first
        return open_file(folder / SINGLE)
    if (folder / INDEX).exists():
        try:
            places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            shards = [folder / file for file in dict.fromkeys(places.values())]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder / INDEX}: not an index of safetensors files ({error!r}); copy it anew."
            ) from error
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            tensors |= open_file(shard)
        if absent := sorted(set(places) - set(tensors)):
            raise UserError(f"{folder / INDEX}: names tensors that no file has: {', '.join(absent)}; copy them anew.")
        return tensors
    others = [path.name for path in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.h5"))]
    found = f" (only {', '.join(others)}: save the model as safetensors with transformers first)" if others else ""
    raise UserError(f"{folder}: has neither {SINGLE} nor {INDEX}{found}.")


def open_file(path: epath.PathLike) -> dict[str, Tensor]:
    """The tensors of one file.

    Raises:
      UserError: the file is missing, cut off, or no safetensors file.
    """
    path = files.path(path)
    try:
        size = path.stat().length
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if length <= size else b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(header) < length or size < 8:
        raise UserError(
            f"{path}: cut off or no safetensors file ({size:,} bytes are less than its header); copy it anew."
        )
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _tensor(path, 8 + length, name, entry) for name, entry in entries.items()}
        end = _end_of_data(entry["data_offsets"] for entry in entries.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its header is no safetensors header ({error!r}); copy it anew.") from error
    if size != 8 + length + end:
        raise UserError(f"{path}: cut off: it has {size:,} bytes, its header says {8 + length + end:,}; copy it anew.")
    return tensors


def _end_of_data(offsets: Iterable[Sequence[int]]) -> int:
    """Where the last tensor ends. Raises ValueError unless each begins where another ends."""
    end = 0
    for start, stop in sorted(offsets):
        if start != end:
            raise ValueError(f"tensors overlap or leave a gap at byte {start} of the data")
        end = stop
    return end


def _tensor(path: epath.Path, data: int, name: str, entry: Mapping) -> Tensor:
    if entry["dtype"] not in _DTYPES:
        raise UserError(
            f"{path}: {name} is of dtype {entry['dtype']}, which is not converted; save the model as float32 or "
            "bfloat16 first."
        )
    shape, dtype = tuple(entry["shape"]), np.dtype(_DTYPES[entry["dtype"]])
    start, stop = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"{name}: shape {shape} or offsets {start}, {stop} are no counts")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: {shape} of {dtype} are not {stop - start} bytes")

    def read(index: Index) -> np.ndarray:
        first, *others = index or [slice(None)]
        rows = range(*first.indices(shape[0])) if shape else range(1)
        row_shape = shape[1:]
        array = np.empty(len(rows) * math.prod(row_shape), dtype)
        with path.open("rb") as file:
            file.seek(data + start + rows.start * math.prod(row_shape) * dtype.itemsize)
            num_bytes = file.readinto(array.view(np.uint8))
        if num_bytes != array.nbytes:
            raise UserError(f"{path}: became shorter while it was read; copy it anew.")
        return array.reshape((len(rows), *row_shape) if shape else ())[(slice(None), *others) if shape else ()]

    return Tensor(shape, dtype, read)


def write_folder(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int | None = None) -> None:
    """Writes tensors in their order, one in memory at a time; above `max_shard_bytes` (5 GB) in shards with an index.

    Raises:
      UserError: a dtype that the format has not.
    """
    max_shard_bytes = max_shard_bytes or MAX_SHARD_BYTES
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise UserError(f"{name}: safetensors files hold no {tensor.dtype}; convert with --dtype=float32.")
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        return write_file(folder / SINGLE, shards[0])
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard)
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes one file; "format": "pt" tells transformers that matrices stand as in torch."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            array = np.asarray(tensor.read(), order="C")
            assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype), name
            file.write(array.reshape(-1).view(np.uint8).data)
            del array
