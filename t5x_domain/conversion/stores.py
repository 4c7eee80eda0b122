"""Arrays in TensorStore's formats, local or in a bucket: what Orbax and T5X write."""

import os
import re
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from t5x_domain.conversion.tensors import Index, Tensor
from t5x_domain.errors import UserError


def kvstore(path: str) -> dict[str, Any]:
    """TensorStore's name for a folder: of this machine, or gs://bucket/folder."""
    if bucket := re.fullmatch(r"gs://([^/]+)/?(.*)", str(path), re.DOTALL):
        return {"driver": "gcs", "bucket": bucket[1], "path": bucket[2].rstrip("/") + "/"}
    return {"driver": "file", "path": str(path).rstrip("/") + "/"}


def absolute(path: str | os.PathLike) -> epath.Path:
    """An absolute path, of this machine or gs://bucket/folder."""
    return epath.Path(path) if "://" in str(path) else epath.Path(path).resolve()  # which takes gs: for a folder


def orbax_spec(folder: str | os.PathLike, key: str, *, bundled: bool, zarr3: bool = False) -> dict[str, Any]:
    """TensorStore's spec of an array of an Orbax checkpoint, `bundled` in one database or in a folder of its own."""
    place = kvstore(f"{folder}/{key}")
    if bundled:
        place = {"driver": "ocdbt", "base": kvstore(str(folder)), "path": f"{key}/"}
    # Orbax stores zeros, too, so what is missing is no zeros.
    return {"driver": "zarr3" if zarr3 else "zarr", "kvstore": place, "fill_missing_data_reads": False}


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
