"""What a step takes at least, by arithmetic: hardly a program on these chips is faster, and most are slower.

Counted as if each row were one text (kernels skip what packed texts do not see of one another), the devices of a chip
shared its links evenly, and no switch did sums of its own.
"""

import dataclasses
from collections.abc import Sequence

from t5x_domain.parallel.chips import Chip
from t5x_domain.planning.collectives import Collective
from t5x_domain.planning.memory import Memory


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds of a step at least, if all else came for nothing.

    Attributes:
      compute: the model's FLOPs at the chips' peak; rematerialisation is not in them.
      memory: what is read of main memory and written to it at least.
      links: what a device sends over ICI or NVLink, on all its links at once.
      network: what it sends to other slices or nodes.
    """

    compute: float
    memory: float
    links: float
    network: float

    @property
    def step(self) -> float:
        """The largest: all may overlap."""
        return max(dataclasses.astuple(self))

    @property
    def largest(self) -> str:
        """Which it is."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def bounds(chip: Chip, num_devices: int, flops: float, touched: float, collectives: Sequence[Collective]) -> Bounds:
    """The bounds of a step.

    Args:
      chip: of which all devices are.
      num_devices: that share the FLOPs evenly.
      flops: of the step, on all devices.
      touched: bytes that a device reads and writes at least, see `touched_by_training`.
      collectives: of the compiled step.
    """
    sent = {network: sum(c.bytes for c in collectives if c.network == network) for network in ("ici", "dcn")}
    return Bounds(
        compute=flops / (num_devices * chip.flops),
        memory=touched / chip.hbm_bytes_per_second,
        links=sent["ici"] / chip.link_bytes_per_second,
        network=sent["dcn"] / chip.dcn_bytes_per_second,
    )


def touched_by_training(memory: Memory) -> float:
    """Bytes of a train step: state is read and written once, kept activations are written and read, the batch read."""
    return 2 * (memory.parameters + memory.optimizer + (memory.activations or 0)) + memory.batch


def touched_by_decoding(memory: Memory, reads: float, steps: int) -> float:
    """Bytes of writing so many positions: each reads all kernels of the decoder, `reads` bytes, whatever the batch."""
    return memory.parameters + steps * reads + memory.batch


def cost(seconds: float, num_chips: int, price: float) -> float:
    """What so many chips cost for so many seconds, at a price for a chip and an hour."""
    return seconds / 3600 * num_chips * price
