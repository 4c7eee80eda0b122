"""Arrays that lie in files and are read when they are needed, so that a conversion never holds a whole model."""

import dataclasses
from collections.abc import Callable

import numpy as np

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array that has not been read.

    Attributes:
      shape: its shape.
      dtype: its dtype; bfloat16 is `ml_dtypes.bfloat16`, as in JAX.
      reader: index with a slice for each axis -> that part of the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    reader: Callable[[Index], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> "Tensor":
        """An array that is there already."""
        return cls(array.shape, array.dtype, lambda index: array[index])

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def read(self, index: Index = ()) -> np.ndarray:
        """The part that `index` selects, a slice of step 1 for each of the first axes; without it the whole."""
        return self.reader(tuple(index) + (slice(None),) * (len(self.shape) - len(index)))

    def transposed(self) -> "Tensor":
        """A matrix on its side; reads no more than is asked for."""
        rows, columns = self.shape
        return Tensor((columns, rows), self.dtype, lambda index: self.read(index[::-1]).T)

    def reshaped(self, shape: tuple[int, ...]) -> "Tensor":
        """Another shape of the same size; every read reads the whole."""
        return Tensor(shape, self.dtype, lambda index: self.read().reshape(shape)[index])

    def at(self, axis: int, position: int) -> "Tensor":
        """Without `axis`, at `position` of it: one layer of a stacked parameter."""
        here = slice(position, position + 1)
        return Tensor(
            self.shape[:axis] + self.shape[axis + 1 :],
            self.dtype,
            lambda index: self.read((*index[:axis], here, *index[axis:])).squeeze(axis),
        )

    def repeated(self, rows: int) -> "Tensor":
        """`rows` entries of the first axis: all of it again and again."""

        def read(index: Index) -> np.ndarray:
            return self.read((slice(None), *index[1:]))[np.arange(rows)[index[0]] % self.shape[0]]

        return Tensor((rows, *self.shape[1:]), self.dtype, read)

    def astype(self, dtype: np.dtype) -> "Tensor":
        """Cast when it is read."""
        dtype = np.dtype(dtype)
        return self if dtype == self.dtype else Tensor(self.shape, dtype, lambda index: self.read(index).astype(dtype))


class LastRead:
    """Layers of arrays that are stored in chunks of several layers: a chunk is decoded once, not once for each layer.

    What was read last is kept, of all arrays together, and let go of before the next is read.
    """

    def __init__(self) -> None:
        """Nothing has been read."""
        self._key: tuple | None = None
        self._array: np.ndarray | None = None

    def layer(self, whole: Tensor, axis: int, position: int) -> Tensor:
        """As `whole.at(axis, position)`; reads that part of all layers."""

        def read(index: Index) -> np.ndarray:
            key = (id(whole), index)
            if key != self._key:
                self._key = self._array = None
                self._array = np.moveaxis(whole.read((*index[:axis], slice(None), *index[axis:])), axis, 0)
                self._key = key
            return self._array[position]

        return Tensor(whole.shape[:axis] + whole.shape[axis + 1 :], whole.dtype, read)
