"""What clouds call TPU slices: by chips, by TensorCores, by topology."""

import dataclasses
import math
import re

from t5x_domain.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tpu:
    """Names of a TPU generation.

    Attributes:
      prefix: of Cloud TPU's accelerator types, `v5litepod` of v5litepod-256
        (https://cloud.google.com/tpu/docs/supported-tpu-configurations).
      cores_per_chip: what those types count: 2 where they count TensorCores, 1 where chips.
      gke: the value of the node label cloud.google.com/gke-tpu-accelerator
        (https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus).
      runtime_version: of a TPU VM for JAX (https://cloud.google.com/tpu/docs/runtimes); None where GKE is the only way.
      axes: of a topology.
    """

    prefix: str
    cores_per_chip: int
    gke: str
    runtime_version: str | None
    axes: int


TPUS = {
    "v4": Tpu("v4", 2, "tpu-v4-podslice", "tpu-ubuntu2204-base", axes=3),
    "v5e": Tpu("v5litepod", 1, "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite", axes=2),
    "v5p": Tpu("v5p", 2, "tpu-v5p-slice", "v2-alpha-tpuv5", axes=3),
    "v6e": Tpu("v6e", 1, "tpu-v6e-slice", "v2-alpha-tpuv6e", axes=2),
    "tpu7x": Tpu("tpu7x", 2, "tpu7x", None, axes=3),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice of a TPU."""

    tpu: Tpu
    topology: str
    chips: int

    @property
    def accelerator_type(self) -> str:
        """As Cloud TPU names it: v5litepod-256, v5p-128."""
        return f"{self.tpu.prefix}-{self.chips * self.tpu.cores_per_chip}"

    @property
    def vm_hosts(self) -> int:
        """TPU VMs of the slice: four chips each, but one VM for a slice of up to eight chips of a flat topology."""
        return 1 if self.tpu.axes == 2 and self.chips <= 8 else max(self.chips // 4, 1)

    @property
    def chips_per_node(self) -> int:
        """Chips of a GKE node, with machines of four chips (ct5lp-hightpu-4t, ct6e-standard-4t, …)."""
        return min(self.chips, 4)


def slice_of(accelerator: str, topology: str) -> Slice:
    """The slice of that topology. Raises UserError if the TPU has no such slice."""
    tpu = TPUS[accelerator]
    if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (tpu.axes - 1), topology):
        example = "16x16" if tpu.axes == 2 else "4x4x8"
        raise UserError(
            f"config.topology = {topology!r}: {accelerator} has {tpu.axes} axes; write it as in {example!r}."
        )
    chips = math.prod(map(int, topology.split("x")))
    if chips > 1 and chips % 4:
        raise UserError(f"config.topology = {topology!r} has {chips} chips: 1, or a multiple of 4, is what hosts hold.")
    return Slice(tpu, topology, chips)
