"""Block sizes of the TPU kernels, by chip and head size, and the memories that they must fit into."""

import dataclasses
import functools
import logging
import math

from t5x_domain.kernels.device import device_kind
from t5x_domain.kernels.tpu.block_table import BACKWARD, FORWARD

_logger = logging.getLogger(__name__)
LANES = 128  # of a vector register; lengths are padded to it
# Bytes of scalar memory for the block map. Found by compiling for v4, v5e, v5p, v6e and tpu7x: each has 1 MiB, and both
# kernels, with a bias, segments and global tokens, take a map of 1008 KiB, but none takes one of 1025 KiB. What is left
# is for scalars that the compiler puts there itself.
SMEM = 992 * 1024


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
# What the compiler keeps for itself is left out: v4 has 16, v5p and tpu7x 64, v5e and v6e 128 MiB.
_VMEM = {"TPU v4": 14, "TPU v5 lite": 100, "TPU v5": 56, "TPU v6 lite": 100, "TPU7x": 56}


def _sizes(table: dict[tuple[str, int], tuple[int, int, int]], kind: str) -> dict[int, Blocks]:
    return {head_dim: Blocks(*sizes) for (chip, head_dim), sizes in table.items() if chip == kind}


_CHIPS = {kind: Chip(vmem * _MIB, _sizes(FORWARD, kind), _sizes(BACKWARD, kind)) for kind, vmem in _VMEM.items()}


def chip(kind: str | None = None) -> Chip:
    """The chip that is compiled for; the smallest where that is no TPU (the interpreter's device)."""
    return _known(kind or device_kind())


@functools.cache
def _known(kind: str) -> Chip:
    if kind.startswith("TPU") and kind not in _CHIPS:
        _logger.warning("attention: no block sizes for %s, taking those of TPU v4; benchmarks/tune_blocks.py", kind)
    return _CHIPS.get(kind, _CHIPS["TPU v4"])


def _equal_parts(length: int, largest: int, unit: int) -> int:
    """Size of the parts, a multiple of `unit`, that a length is cut into when none may be longer than `largest`."""
    parts = math.ceil(length / largest)
    return math.ceil(length / parts / unit) * unit
