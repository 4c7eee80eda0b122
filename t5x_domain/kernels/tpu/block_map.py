"""Which pairs of a query block and a key block a kernel visits, and what each of them needs.

Built once a step from the intervals of keys, inside jit, and read by the kernels as prefetched scalars: pairs without a
visible key are not in the list, so they cost neither a copy nor a grid step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_domain.kernels.mask import KeyIntervals
from t5x_domain.kernels.tpu.blocks import Blocks

# An entry is row << 18 | column << 6 | flags.
FIRST, LAST = 1, 2  # of the pairs that share an output block
ACTIVE = 4  # computes; the others only let a block without partners write its zeros
PARTIAL = 8  # needs mask arithmetic
NEAR = 16  # the bias differs inside the block; else it is one constant a head,
AFTER = 32  # that of keys far after the query rather than far before
_COLUMN, _ROW, _INDEX = 6, 18, 2**12 - 1


class BlockMap(NamedTuple):
    """Pairs of blocks in the order of a kernel's grid.

    Attributes:
      entries: [rows of the batch, or 1, times largest number of pairs] int32.
      steps: pairs of the row of the batch that has most, int32 scalar.
    """

    entries: jax.Array
    steps: jax.Array


class Far(NamedTuple):
    """Where a bias stops to change: it is constant for `key - query <= -before` and for `key - query >= after`."""

    before: int
    after: int


EVERYWHERE = Far(2**30, 2**30)  # of a bias that never stops to change


def block_map(
    intervals: KeyIntervals | None,
    query_blocks: int,
    key_blocks: int,
    blocks: Blocks,
    *,
    far: Far | None,
    shift: jax.typing.ArrayLike = 0,
    by_key: bool = False,
) -> BlockMap:
    """Lists the pairs of blocks.

    Args:
      intervals: [B or 1, query_blocks * blocks.queries]; None if every query sees every key.
      far: borders of the bias; None without a bias.
      shift: position of the first key minus that of the first query.
      by_key: pairs of one key block follow each other (for the backward pass), not those of one query block.

    Returns:
      The map. Its order is that of rows, then columns, or with `by_key` of columns, then rows.
    """
    flags = ACTIVE | _bias_flags(query_blocks, key_blocks, blocks, far, shift)
    if intervals is None:
        needed = jnp.ones((1, query_blocks, key_blocks), bool)
    else:
        needed, full = _coverage(intervals, query_blocks, key_blocks, blocks)
        flags = jnp.where(full, flags, flags | PARTIAL)
        flags = jnp.where(needed, flags, 0)
    row, column = jnp.indices((query_blocks, key_blocks), jnp.int32)
    entries = row << _ROW | column << _COLUMN | jnp.broadcast_to(flags, needed.shape)
    if by_key:
        needed, entries = jnp.swapaxes(needed, 1, 2), jnp.swapaxes(entries, 1, 2)
    # An output block without partners still takes one step.
    needed = needed.at[:, :, 0].set(needed[:, :, 0] | ~needed.any(axis=2))
    needed, entries = needed.reshape(len(needed), -1), entries.reshape(len(needed), -1)
    group_shift = _COLUMN if by_key else _ROW
    entries, count = jax.vmap(lambda n, e: _compress(n, e, group_shift))(needed, entries)
    return BlockMap(entries.reshape(-1), count.max())


def read(entries, index) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Row, column and flags of an entry, inside a kernel."""
    entry = entries[index]
    return entry >> _ROW, (entry >> _COLUMN) & _INDEX, entry & (2**_COLUMN - 1)


def _coverage(intervals, query_blocks, key_blocks, blocks):
    """[B or 1, query blocks, key blocks] bool each: some query of a block may see some key; all see all."""
    first = jnp.arange(key_blocks, dtype=jnp.int32) * blocks.keys
    last = first + blocks.keys

    def reaches(start, stop):
        empty = start >= stop
        low = jnp.where(empty, jnp.iinfo(jnp.int32).max, start).reshape(-1, query_blocks, blocks.queries).min(axis=2)
        high = jnp.where(empty, -1, stop).reshape(-1, query_blocks, blocks.queries).max(axis=2)
        return (low[..., None] < last) & (high[..., None] > first)

    needed = reaches(intervals.start, intervals.stop)
    if intervals.global_start is not None:
        needed |= reaches(intervals.global_start, intervals.global_stop)
    start = intervals.start.reshape(-1, query_blocks, blocks.queries).max(axis=2)
    stop = intervals.stop.reshape(-1, query_blocks, blocks.queries).min(axis=2)
    return needed, (start[..., None] <= first) & (stop[..., None] >= last)


def _bias_flags(query_blocks, key_blocks, blocks, far, shift):
    if far is None:
        return jnp.zeros((1, query_blocks, key_blocks), jnp.int32)
    key = jnp.arange(key_blocks, dtype=jnp.int32) * blocks.keys + shift
    distance = key - jnp.arange(query_blocks, dtype=jnp.int32)[:, None] * blocks.queries
    before = distance + blocks.keys - 1 <= -far.before
    after = distance - (blocks.queries - 1) >= far.after
    return jnp.where(before, 0, jnp.where(after, AFTER, NEAR))[None]


def _compress(needed, entries, group_shift):
    """The needed entries in front; behind them their last one, without flags: neither copies nor computes anything."""
    running = jnp.cumsum(needed.astype(jnp.int32))
    count = running[-1]
    position = jnp.arange(len(entries), dtype=jnp.int32)
    # Unrolled, so that XLA can move all of this out of a loop over layers.
    index = jnp.searchsorted(running, jnp.minimum(position, count - 1) + 1, method="scan_unrolled").astype(jnp.int32)
    packed = entries[index]
    group = packed >> group_shift & _INDEX
    inside = position < count
    first = (position == 0) | (group != jnp.roll(group, 1))
    last = (position == count - 1) | (group != jnp.roll(group, -1))
    marks = jnp.where(first, FIRST, 0) | jnp.where(last, LAST, 0)
    return jnp.where(inside, packed | marks, packed >> _COLUMN << _COLUMN), count
