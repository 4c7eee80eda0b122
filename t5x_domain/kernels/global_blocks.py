"""Global tokens spread over a row: every n-th one, or one that stands for each block of n (LongT5's transient global).

A packed segment of length L has L // n of them, counted from its own start, so a row of S tokens has at most S // n
whatever is packed into it, and no document's result depends on its neighbours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_domain.kernels.mask import BIDIRECTIONAL, SegmentIds, key_intervals
from t5x_domain.kernels.precision import accumulator
from t5x_domain.kernels.side_attention import SidePlace


class EveryNth(NamedTuple):
    """Global tokens among the others (Beltagy et al. 2020, "Longformer", section 3.1).

    Attributes:
      index: [B, S // n] int32, where they stand in the row; S in slots without one.
      place: of all queries among them.
      own: of their own queries among all tokens of the row.
    """

    index: jax.Array
    place: SidePlace
    own: SidePlace


class Transient(NamedTuple):
    """Tokens that stand for blocks (Guo et al. 2022, "LongT5", section 3.1).

    Attributes:
      index: [B, S // n] int32, where each block's n-th token stands; S in slots without a block.
      stop: [B, S // n] int32, one past the last token that belongs to the block; 0 in slots without.
      place: of all queries among the blocks. Coordinates count blocks; a query has that of the block it belongs to.
    """

    index: jax.Array
    stop: jax.Array
    place: SidePlace


def every_nth(size: int, segment_ids: jax.Array, *, window: int, leading: int = 0) -> EveryNth:
    """The tokens number n, 2n, 3n, … of each segment see all of it and are seen by all of it.

    Args:
      size: n.
      segment_ids: [B, S] int32, non-decreasing from 1, then 0 for padding; S is at least n.
      window: keys up to this far from a query, which it sees anyway.
      leading: the first tokens of each segment, so many, are global already (`Mask.global_tokens`).
    """
    position, _ = _positions(segment_ids)
    ends = _ends(size, segment_ids, position)
    index = _indices(ends & (position >= leading), segment_ids.shape[1] // size)
    token = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    of_slot = take(segment_ids, index)
    # The leading tokens' own queries see the whole segment through the mask.
    place = SidePlace(token, jnp.where(position < leading, 0, segment_ids), index, of_slot, jnp.int32(window))
    return EveryNth(index, place, SidePlace(index, of_slot, token, segment_ids, jnp.int32(-1)))


def transient(size: int, segment_ids: jax.Array) -> Transient:
    """Blocks of n tokens; those left over at a segment's end belong to its last block, if it has one.

    Args:
      size: n.
      segment_ids: [B, S] int32, non-decreasing from 1, then 0 for padding; S is at least n.
    """
    position, length = _positions(segment_ids)
    ends = _ends(size, segment_ids, position)
    index = _indices(ends, segment_ids.shape[1] // size)
    number, last = position // size, length // size - 1  # of a token's block in its segment
    # Blocks that end before a token, less those of its own segment, are the blocks of the segments before.
    earlier = jnp.cumsum(ends, axis=1, dtype=jnp.int32) - ends - number
    token = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    stop = take(jnp.where(number == last, token - position + length, token + 1), index)
    slot = jnp.broadcast_to(jnp.arange(index.shape[1], dtype=jnp.int32), index.shape)
    block = earlier + jnp.minimum(number, last)
    return Transient(index, stop, SidePlace(block, segment_ids, slot, take(segment_ids, index), jnp.int32(-1)))


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Tokens of each row: x [B, S, ...] and an index [B, ...] -> [B, ..., ...]; 0 where the index is S."""
    rows = jnp.arange(len(x)).reshape(-1, *[1] * (index.ndim - 1))
    return x.at[rows, index].get(mode="fill", fill_value=0)


def put(x: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """x [B, S, ...] with values [B, G, ...] in the places of an index [B, G]; what has index S is dropped."""
    return x.at[jnp.arange(len(x))[:, None], index].set(values, mode="drop")


def block_sums(x: jax.Array, size: int, blocks: Transient) -> jax.Array:
    """Sum of the tokens that belong to each block: [B, S, E] -> [B, S // size, E] in x's dtype."""
    # A block has less than twice `size` tokens. No token is taken twice, so the gradient adds in no order.
    token = blocks.index[..., None] - (size - 1) + jnp.arange(2 * size - 1, dtype=jnp.int32)
    token = jnp.where(token < blocks.stop[..., None], token, x.shape[1])
    return take(x, token).astype(accumulator(x.dtype)).sum(axis=2).astype(x.dtype)


def _positions(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, S] each: a token's position in its segment, and the segment's length; 0 for padding."""
    length = segment_ids.shape[1]
    start, stop = key_intervals(BIDIRECTIONAL, length, length, segment_ids=SegmentIds(segment_ids, segment_ids))[:2]
    return jnp.arange(length, dtype=jnp.int32) - start, stop - start


def _ends(size: int, segment_ids: jax.Array, position: jax.Array) -> jax.Array:
    """[B, S] bool, the tokens number n, 2n, … of each segment."""
    return (position % size == size - 1) & (segment_ids != 0)


def _indices(chosen: jax.Array, count: int) -> jax.Array:
    """[B, count] int32, where the chosen tokens of each row stand, in order; the row's length behind the last."""
    running = jnp.cumsum(chosen, axis=1, dtype=jnp.int32)
    find = lambda row: jnp.searchsorted(row, jnp.arange(1, count + 1, dtype=jnp.int32))  # noqa: E731
    return jax.vmap(find)(running).astype(jnp.int32)
