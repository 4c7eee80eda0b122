"""How blocks of the arrays go to and from the chip's vector memory, the same way in both passes."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl

from t5x_domain.kernels.mask import KeyIntervals
from t5x_domain.kernels.tpu.block_map import BlockMap, read
from t5x_domain.kernels.tpu.blocks import Blocks


class Specs(NamedTuple):
    """Blocks that belong to a step (head, row of the batch, pair) of the grid.

    Attributes:
      entry: index in the block map, of a row of the batch and a pair.
      query: of [B, H, Sq, D].
      key: of [B, Hk, Sk, D], of the key head that the head shares.
      key_sum: of [B, H, Sk, D].
      lane: of [B, H, 1, Sq].
      interval: of [B or 1, 1, Sq].
      head: of [H, ...], all of a head.
    """

    entry: Callable
    query: pl.BlockSpec
    key: pl.BlockSpec
    key_sum: pl.BlockSpec
    lane: pl.BlockSpec
    interval: pl.BlockSpec
    head: Callable[[tuple[int, ...]], pl.BlockSpec]


def block_specs(pairs: BlockMap, intervals: KeyIntervals | None, blocks: Blocks, dim: int, group: int) -> Specs:
    """The specs for `group` query heads a key head; the block map is the kernels' first prefetched scalar."""
    batch = 1 if intervals is None else len(intervals.start)
    largest = len(pairs.entries) // batch

    def entry(b, step):
        return step if batch == 1 else b * largest + step

    def row(b, step, entries):
        return read(entries, entry(b, step))[0]

    def column(b, step, entries):
        return read(entries, entry(b, step))[1]

    # lax.div, because // asks for the chip's generation, which is not known ahead of time.
    index_maps = (
        lambda h, b, step, entries, *_: (b, h, row(b, step, entries), 0),
        lambda h, b, step, entries, *_: (b, jax.lax.div(h, group), column(b, step, entries), 0),
        lambda h, b, step, entries, *_: (b, h, column(b, step, entries), 0),
        lambda h, b, step, entries, *_: (b, h, 0, row(b, step, entries)),
        lambda h, b, step, entries, *_: (0 if batch == 1 else b, 0, row(b, step, entries)),
    )
    query_block, key_block = (None, None, blocks.queries, dim), (None, None, blocks.keys, dim)
    shapes = query_block, key_block, key_block, (None, None, 1, blocks.queries), (None, 1, blocks.queries)
    specs = (pl.BlockSpec(*pair) for pair in zip(shapes, index_maps, strict=True))
    return Specs(
        entry, *specs, lambda shape: pl.BlockSpec((None, *shape[1:]), lambda h, *_: (h, *[0] * len(shape[1:])))
    )
