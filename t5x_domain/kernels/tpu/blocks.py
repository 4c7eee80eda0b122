"""Block sizes of the TPU kernels: a plain table by chip and head size."""

import dataclasses
import math

from t5x_domain.kernels.device import device_kind

LANES = 128  # of a vector register; lengths are padded to it
SMEM = 512 * 1024  # bytes of scalar memory for the block map


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the parts in which attention is computed, all multiples of 128.

    Attributes:
      queries: of a block that is moved to the chip's vector memory and computed at once.
      keys: of a block that is moved there.
      chunk: keys computed at once; divides `keys`.
    """

    queries: int
    keys: int
    chunk: int

    def fit(self, query_length: int, key_length: int) -> "Blocks":
        """The same, not larger than the arrays ask for: equal blocks, the least padding."""
        queries = _equal_parts(query_length, self.queries, LANES)
        keys = _equal_parts(key_length, self.keys, LANES)
        return Blocks(queries, keys, math.gcd(keys, self.chunk))


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the kernels must know of a chip.

    Attributes:
      vmem: bytes of vector memory that a kernel may take.
      forward: blocks of the forward pass by head size.
      backward: blocks of the backward pass by head size.
    """

    vmem: int
    forward: dict[int, Blocks]
    backward: dict[int, Blocks]

    def resident_queries(self, head_dim: int) -> int:
        """Queries whose gradient the backward pass keeps in vector memory: a float32 sum and two output buffers."""
        return self.vmem // 4 // (max(head_dim, LANES) * 12)


_MIB = 2**20
_LARGE, _MEDIUM = Blocks(1024, 1024, 512), Blocks(512, 512, 512)
_ROOMY = {64: _LARGE, 128: _LARGE, 256: Blocks(512, 1024, 512)}
_TIGHT = {64: _MEDIUM, 128: _MEDIUM, 256: Blocks(256, 512, 256)}
_CHIPS = {
    "TPU v4": Chip(14 * _MIB, _TIGHT, _TIGHT),
    "TPU v5 lite": Chip(100 * _MIB, _ROOMY, _ROOMY),
    "TPU v5": Chip(56 * _MIB, _ROOMY, _ROOMY),
    "TPU v6 lite": Chip(100 * _MIB, _ROOMY, _ROOMY),
    "TPU7x": Chip(56 * _MIB, _ROOMY, _ROOMY),
}


def chip(kind: str | None = None) -> Chip:
    """The chip that is compiled for; the smallest one where that is not known (ahead of time, without a mesh)."""
    return _CHIPS.get(kind or device_kind(), _CHIPS["TPU v4"])


def _equal_parts(length: int, largest: int, unit: int) -> int:
    """Size of the parts, a multiple of `unit`, that a length is cut into when none may be longer than `largest`."""
    parts = math.ceil(length / largest)
    return math.ceil(length / parts / unit) * unit
