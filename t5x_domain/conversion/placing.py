"""Parameters from files into the arrays of a model, each device's share where it belongs."""

from collections.abc import Mapping

import jax
import numpy as np

from t5x_domain.conversion.layout import Leaf
from t5x_domain.conversion.tensors import Index, Tensor


def place(leaf: Leaf, tensors: Mapping[str, Tensor], target: jax.ShapeDtypeStruct) -> jax.Array:
    """A parameter of the dtype and sharding of `target`; a process reads what its own devices hold, layer by layer."""
    parts = [tensors[name].astype(target.dtype) for name in leaf.parts]
    read: dict[tuple, np.ndarray] = {}  # devices that hold copies share one reading

    def share(index: Index) -> np.ndarray:
        key = tuple(part.indices(size) for part, size in zip(index, leaf.shape, strict=True))
        if key not in read:
            if not leaf.stacked:
                read[key] = parts[0].read(index)
            else:
                layers = range(*key[0])
                shape = tuple(len(range(*part)) for part in key)
                read[key] = np.empty(shape, target.dtype)
                for position, layer in enumerate(layers):
                    read[key][position] = parts[layer].read(index[1:])
        return read[key]

    return jax.make_array_from_callback(leaf.shape, target.sharding, share)
