"""Published figures of accelerators, for arithmetic: what a program costs at least, and what share of it is reached."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one `jax.Device` of a kind can do; a TPU7x chip is two devices, every other chip is one.

    Attributes:
      name: as topologies name it.
      kinds: names among JAX's devices (`jax.Device.device_kind`).
      flops: dense bfloat16 FLOP/s.
      hbm_bytes: main memory. A compiler keeps a part of it for itself.
      hbm_bytes_per_second: to and from it.
      link_bytes_per_second: sent over all ICI or NVLink links together, one direction.
      dcn_bytes_per_second: sent over the network between slices or nodes, one direction.
      devices_per_chip: devices that are paid for together.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    hbm_bytes: int
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    dcn_bytes_per_second: float
    devices_per_chip: int = 1


_GIB = 2**30
_GBPS = 1e9 / 8  # bytes per second in a gigabit per second

# TPUs: the "System architecture" pages of cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. They give ICI as bits per
# second and chip, all links, one direction (v5e: 4 ports of 400 Gb/s make 1,600), TPU7x's as 1.2 TB/s both directions,
# and the data-center network by pod (v5e: 6.4 Tb/s, v6e: 25.6 Tb/s, of 256 chips each) or by chip (v5p: 50 Gb/s, TPU7x:
# 100 Gb/s); v4's is taken to be that of v5p, for its page gives none. GPUs: NVIDIA's data sheets of the SXM boards
# without sparsity, NVLink at half of what they give for both directions, and one InfiniBand port a GPU as in DGX
# systems (200 Gb/s for A100, 400 Gb/s for H100 and H200).
_ALL = (
    Chip("v4", ("TPU v4",), 275e12, 32 * _GIB, 1228e9, 2400 * _GBPS, 50 * _GBPS),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * _GIB, 819e9, 1600 * _GBPS, 25 * _GBPS),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * _GIB, 2765e9, 4800 * _GBPS, 50 * _GBPS),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * _GIB, 1638e9, 3200 * _GBPS, 100 * _GBPS),
    Chip("tpu7x", ("TPU7x",), 2307e12 / 2, 96 * _GIB, 7380e9 / 2, 1200e9 / 2 / 2, 100 * _GBPS / 2, devices_per_chip=2),
    Chip("a100", ("NVIDIA A100-SXM4-80GB",), 312e12, 80 * _GIB, 2039e9, 300e9, 200 * _GBPS),
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 80 * _GIB, 3350e9, 450e9, 400 * _GBPS),
    Chip("h200", ("NVIDIA H200",), 989e12, 141 * _GIB, 4800e9, 450e9, 400 * _GBPS),
)
CHIPS: Mapping[str, Chip] = MappingProxyType({chip.name: chip for chip in _ALL})


def chip_of(device: jax.Device) -> Chip | None:
    """What is known of a device; None for a CPU and for chips that are not in `CHIPS`."""
    return next((chip for chip in _ALL if device.device_kind in chip.kinds), None)
