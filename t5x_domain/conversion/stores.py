"""Arrays in TensorStore's formats, local or in a bucket: what Orbax and T5X write."""

import json
import os
import re
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from t5x_domain import files
from t5x_domain.conversion.tensors import Index, Tensor
from t5x_domain.errors import UserError

ORBAX = "_METADATA"  # the file of an Orbax checkpoint that lists its arrays


def kvstore(path: str) -> dict[str, Any]:
    """TensorStore's name for a folder: of this machine, gs://bucket/folder or s3://bucket/folder."""
    if bucket := re.fullmatch(r"(gs|s3)://([^/]+)/?(.*)", str(path), re.DOTALL):
        place = {"bucket": bucket[2], "path": bucket[3].rstrip("/") + "/"}
        if bucket[1] == "gs":
            return {"driver": "gcs", **place}
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")  # as Amazon's tools do
        return {"driver": "s3", **place, **({"endpoint": endpoint} if endpoint else {})}
    return {"driver": "file", "path": str(path).rstrip("/") + "/"}


def absolute(path: str | os.PathLike) -> epath.Path:
    """An absolute path, of this machine or in a bucket."""
    return files.path(path) if files.is_remote(path) else files.path(path).resolve()  # which takes gs: for a folder


def orbax_spec(folder: str | os.PathLike, key: str, *, bundled: bool, zarr3: bool = False) -> dict[str, Any]:
    """TensorStore's spec of an array of an Orbax checkpoint, `bundled` in one database or in a folder of its own."""
    place = kvstore(f"{folder}/{key}")
    if bundled:
        place = {"driver": "ocdbt", "base": kvstore(str(folder)), "path": f"{key}/"}
    # Orbax stores zeros, too, so what is missing is no zeros.
    return {"driver": "zarr3" if zarr3 else "zarr", "kvstore": place, "fill_missing_data_reads": False}


def orbax_names(metadata: epath.Path) -> list[tuple[str, ...]]:
    """Where the arrays of an Orbax checkpoint stand in its tree, as its file `ORBAX` says.

    Raises:
      OSError: there is no such file.
      UserError: it is damaged.
    """
    return [
        tuple(str(key["key"]) for key in entry["key_metadata"])
        for entry in read_json(metadata).get("tree_metadata", {}).values()
        if not entry["value_metadata"]["skip_deserialize"]  # None and empty nodes
    ]


def read_json(file: epath.Path) -> dict[str, Any]:
    """A file that describes a checkpoint. Raises UserError if it is damaged."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: cut short or damaged ({error}); copy the checkpoint again.") from error


def open_array(spec: dict[str, Any]) -> ts.TensorStore:
    """An array's store. Raises ValueError, as TensorStore does, if there is none."""
    return ts.open(ts.Spec(spec), open=True, read=True).result()


def tensor(store: ts.TensorStore) -> Tensor:
    """An array of which only what is asked for is read.

    Reading raises UserError if the files are damaged.
    """

    def read(index: Index) -> np.ndarray:
        try:
            return store[index].read().result()
        except ValueError as error:  # TensorStore's for every kind of damage; it names the file
            message = " ".join(str(error).split())[:300]
            raise UserError(f"a part of a checkpoint is damaged or missing, copy it anew: {message}") from error

    return Tensor(tuple(store.shape), np.dtype(store.dtype.numpy_dtype), read)
