"""What the TPU kernels know when they are traced."""

import dataclasses

from jax.experimental.pallas import tpu as pltpu

from t5x_domain.kernels.tpu.block_map import ACTIVE, NEAR, PARTIAL
from t5x_domain.kernels.tpu.blocks import Blocks
from t5x_domain.kernels.tpu.skewed_bias import SkewedLayout


@dataclasses.dataclass(frozen=True)
class Settings:
    """Static options of one kernel.

    Attributes:
      blocks: sizes of what is computed at once.
      scale: factor of the logits.
      softcap: of the logits; None for none.
      layout: of the table of biases; None without a bias.
      vmem: bytes of vector memory that the kernel may take.
      interpret: run by the interpreter: False, True or `pltpu.InterpretParams`.
      branches: kinds of block pairs, as (partial, near), that the kernel is compiled for; None for all that can occur.
    """

    blocks: Blocks
    scale: float
    softcap: float | None
    layout: SkewedLayout | None
    vmem: int
    interpret: bool | pltpu.InterpretParams = False
    branches: tuple[tuple[bool, bool], ...] | None = None

    def kinds(self, masked: bool) -> list[tuple[int, bool, bool]]:
        """Of the block pairs: their flags, whether they are partial, and whether the bias varies inside."""
        partial = (False, True) if masked else (False,)
        near = (False,) if self.layout is None else (True,) if self.layout.linear else (False, True)
        branches = self.branches or [(p, n) for p in partial for n in near]
        return [(ACTIVE | PARTIAL * p | NEAR * n, p, n) for p, n in branches]
