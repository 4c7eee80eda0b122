"""A relative bias laid out so that the kernels read it in aligned slices.

The bias of a block of logits is a Toeplitz matrix. Row r of a skewed table is the vector of diagonals moved right by r:
`table[r, x] = bias(x - origin - r)`, so 128 rows of any block are one slice of the table whose offset is a multiple of
128 lanes, wherever the block lies. Beyond the distances where the bias stops to change offsets are clamped.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_domain.kernels.relative_bias import toeplitz, toeplitz_transpose
from t5x_domain.kernels.tpu.block_map import AFTER, Far
from t5x_domain.kernels.tpu.blocks import LANES


@dataclasses.dataclass(frozen=True)
class SkewedLayout:
    """Where distances lie in a skewed table.

    Attributes:
      lanes: columns of a block of logits.
      far: the bias of `column - row` is constant outside of these.
      linear: it is linear in the distance there, on both sides, not constant.
    """

    lanes: int
    far: Far
    linear: bool = False

    @property
    def origin(self) -> int:
        """Lane of distance 0 in row 0."""
        return _round_up(self.far.before + self.lanes - 1)

    @property
    def width(self) -> int:
        """Lanes of the table."""
        return self.origin + self.lanes + _round_up(self.far.after + LANES - 1)

    def offset(self, distance: jax.typing.ArrayLike) -> jax.Array:
        """First lane of 128 rows whose first row lies `distance` (a multiple of 128) left of their first column."""
        return jnp.clip(self.origin + distance, 0, self.width - self.lanes)

    def excess(self, distance: jax.typing.ArrayLike) -> jax.Array:
        """How much farther 128 rows lie than where `offset` reads them."""
        return jnp.abs(self.origin + distance - self.offset(distance))

    def window(self, distance: jax.typing.ArrayLike) -> jax.Array:
        """First lane of a 128 x 128 tile of which only the sum over each diagonal matters."""
        return jnp.clip(self.origin + distance, 0, self.width - LANES)

    @property
    def _padding(self):
        """Entries before and after the diagonals at distances -before ... after."""
        return (0, 0), (self.origin + LANES - 1 - self.far.before, self.width - self.origin - 1 - self.far.after)


class HeadBias(NamedTuple):
    """A bias as the kernels read it, float32.

    Attributes:
      skewed: [H, 128, width].
      far: [H, 2], of distances up to `-far.before` and from `far.after` on; if linear, its descent, [H].
    """

    skewed: jax.Array
    far: jax.Array


def far_bias(
    layout: SkewedLayout | None, far: jax.Array, head: jax.Array, flags: jax.Array, near: bool
) -> tuple[jax.Array | None, jax.Array | None]:
    """Inside a kernel: the constant of a far pair of blocks, or the descent of a linear bias; None for what is not so.

    Args:
      far: `HeadBias.far`, flat, in scalar memory.
      flags: of the pair.
      near: whether its bias is read from the table.
    """
    if layout is None:
        return None, None
    if layout.linear:
        return None, far[head]
    return None if near else far[2 * head + jnp.where(flags & AFTER != 0, 1, 0)], None


def skew(diagonals: jax.Array, layout: SkewedLayout) -> jax.Array:
    """[H, before + 1 + after] values at distances -before ... after -> [H, 128, width]."""
    return toeplitz(jnp.pad(diagonals, layout._padding, mode="edge"), LANES)


def skew_linear(slopes: jax.Array, layout: SkewedLayout) -> jax.Array:
    """[H] slopes -> [H, 128, width] of `-slope * |distance|`."""
    distance = jnp.arange(layout.width + LANES - 1) - (layout.origin + LANES - 1)
    return toeplitz(-slopes[:, None] * jnp.abs(distance).astype(jnp.float32), LANES)


def unskew(table: jax.Array, layout: SkewedLayout) -> jax.Array:
    """Gradient of `skew`: [H, 128, width] -> [H, before + 1 + after]."""
    sums = toeplitz_transpose(table)
    before, after = layout._padding[1]
    inner = sums[:, before : sums.shape[1] - after]
    inner = inner.at[:, 0].add(sums[:, :before].sum(axis=1))
    return inner.at[:, -1].add(sums[:, sums.shape[1] - after :].sum(axis=1))


def _round_up(size: int) -> int:
    return math.ceil(size / LANES) * LANES
