"""Tiles of the (query, key) plane, and the loop over those of a chunk of queries that the mask leaves something of."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_domain.kernels.barrier import computed_once
from t5x_domain.kernels.mask import KeyIntervals
from t5x_domain.kernels.relative_bias import toeplitz


class Tile(NamedTuple):
    """A chunk of queries and a block of keys.

    Attributes:
      first_query: position of the first, an int32 scalar.
      num_queries: of the chunk.
      num_keys: of the block.
      all_keys: how many there are to cut blocks of.
      start: position of the first key that is new. A block that would reach beyond the last key begins before it.
    """

    first_query: jax.Array
    num_queries: int
    num_keys: int
    all_keys: int
    start: jax.Array | int = 0

    @property
    def first_key(self) -> jax.Array:
        """Position of the block's first key."""
        return jnp.minimum(self.start, self.all_keys - self.num_keys)

    def keys(self, x: jax.Array) -> jax.Array:
        """The block's part of keys or values [B, Hk, Sk, D]."""
        return jax.lax.dynamic_slice_in_dim(x, self.first_key, self.num_keys, 2)

    def first_diagonal(self, diagonal: jax.Array) -> jax.Array:
        """Index in `relative_bias.diagonals`, [H, Sq + Sk - 1], of the first that crosses the tile."""
        last_query = self.first_query + self.num_queries - 1
        return diagonal.shape[1] - self.all_keys + self.first_key - last_query

    def bias(self, diagonal: jax.Array | None) -> jax.Array | None:
        """[H, C, K] made of the diagonals; None for none."""
        if diagonal is None:
            return None
        size = self.num_queries + self.num_keys - 1
        here = jax.lax.dynamic_slice_in_dim(diagonal, self.first_diagonal(diagonal), size, 1)
        # Once, not again for each row of the batch.
        return computed_once(toeplitz(here, self.num_queries))

    def visible(self, intervals: KeyIntervals | None) -> jax.Array:
        """[B or 1, C or 1, K] bool, the new keys that the chunk's queries see; of [B, C] intervals, None for all."""
        column = self.first_key + jnp.arange(self.num_keys)
        new = (column >= self.start)[None, None]
        if intervals is None:
            return new
        between = lambda start, stop: (column >= start[..., None]) & (column < stop[..., None])  # noqa: E731
        visible = between(intervals.start, intervals.stop)
        if intervals.global_start is not None:
            visible |= between(intervals.global_start, intervals.global_stop)
        return visible & new


def fold_tiles[Carry](
    visit: Callable[[Tile, Carry], Carry], carry: Carry, tile: Tile, intervals: KeyIntervals | None
) -> Carry:
    """`carry = visit(tile, carry)` for blocks of keys from left to right, without those that no query of a chunk sees.

    Args:
      visit: told each key that a query of the chunk sees in one tile, as a new one.
      carry: what the first visit gets.
      tile: the chunk, and the size of the blocks.
      intervals: of the chunk's queries, [B, C]; None if each sees all keys.
    """
    if tile.num_keys == tile.all_keys:
        return visit(tile, carry)
    start, gap, resume, stop = _spans(intervals, tile.all_keys)

    def body(state):
        start, carry = state
        after = start + tile.num_keys
        return jnp.where(after < gap, after, jnp.maximum(after, resume)), visit(tile._replace(start=start), carry)

    return jax.lax.while_loop(lambda state: state[0] < stop, body, (start, carry))[1]


def _spans(intervals, length):
    """start, gap, resume, stop: all keys that the queries see are in start ... gap or in resume ... stop."""
    if intervals is None:
        return jnp.int32(0), jnp.int32(length), jnp.int32(0), jnp.int32(length)

    def hull(start, stop):
        return jnp.where(start < stop, start, length).min(), jnp.where(start < stop, stop, 0).max()

    near = hull(intervals.start, intervals.stop)
    if intervals.global_start is None:
        return *near, *near
    far = hull(intervals.global_start, intervals.global_stop)
    (start, gap), (resume, stop) = near, far
    in_order = start <= resume
    return (
        jnp.minimum(start, resume),
        jnp.where(in_order, gap, stop),
        jnp.maximum(start, resume),
        jnp.maximum(gap, stop),
    )
