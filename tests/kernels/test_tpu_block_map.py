"""The list of block pairs against the mask, block by block."""

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import leading, segments
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.kernels.mask import Mask, SegmentIds, key_intervals
from t5x_domain.kernels.tpu.block_map import ACTIVE, AFTER, FIRST, LAST, NEAR, PARTIAL, Far, block_map, read
from t5x_domain.kernels.tpu.blocks import Blocks

BLOCKS = Blocks(queries=4, keys=3, chunk=3)
ROWS, COLUMNS = 5, 7


def pairs(built, batch) -> list[list[tuple[int, int, int]]]:
    """(row, column, flags) of each row of the batch, without what only fills up."""
    entries = np.asarray(built.entries).reshape(batch, -1)
    taken = [[read(row, i) for i in range(int(built.steps))] for row in entries]
    return [[tuple(map(int, entry)) for entry in row if entry[2]] for row in taken]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)),
    global_tokens=st.integers(0, 3),
    packed=st.integers(0, 4),
    by_key=st.booleans(),
)
def test_pairs_are_those_with_visible_keys(seed, causal, window, global_tokens, packed, by_key):
    rng = np.random.default_rng(seed)
    queries, keys, batch = ROWS * BLOCKS.queries, COLUMNS * BLOCKS.keys, 2
    ids = prefix = None
    if packed:
        query_ids = segments(rng, batch, keys, packed)
        ids = SegmentIds(jnp.asarray(query_ids[:, :queries]), jnp.asarray(query_ids))
        prefix = jnp.asarray(leading(rng, query_ids)) if causal else None
    mask = Mask(causal, window, global_tokens)
    intervals = key_intervals(mask, queries, keys, segment_ids=ids, prefix=prefix)
    rows = len(intervals.start)
    found = pairs(block_map(intervals, ROWS, COLUMNS, BLOCKS, far=None, by_key=by_key), rows)

    column = np.arange(keys)
    start, stop, *second = (np.asarray(a)[..., None] for a in jax.tree.leaves(intervals))
    visible = (start <= column) & (column < stop)
    if second:
        visible |= (second[0] <= column) & (column < second[1])
    tiles = visible.reshape(rows, ROWS, BLOCKS.queries, COLUMNS, BLOCKS.keys)
    some, every = tiles.any(axis=(2, 4)), tiles.all(axis=(2, 4))
    for b, entries in enumerate(found):
        active = {(i, j): flags for i, j, flags in entries if flags & ACTIVE}
        assert set(active) >= set(zip(*np.nonzero(some[b]), strict=True)), "a visible key is left out"
        for place, flags in active.items():
            assert flags & PARTIAL or every[b][place], "a masked pair would be taken for an open one"
        # Unions of the queries' intervals have no holes in these cases, so nothing is visited in vain.
        assert global_tokens or packed or set(active) == set(zip(*np.nonzero(some[b]), strict=True))

        groups = [entry[by_key] for entry in entries]
        assert groups == sorted(groups) and set(groups) == set(range(COLUMNS if by_key else ROWS))
        for at, (group, (_, _, flags)) in enumerate(zip(groups, entries, strict=True)):
            assert bool(flags & FIRST) == (at == 0 or groups[at - 1] != group)
            assert bool(flags & LAST) == (at == len(groups) - 1 or groups[at + 1] != group)


def test_steps_are_those_of_the_row_with_most_pairs_and_the_rest_does_nothing():
    """Row 0 is one segment, 5 x 7 pairs; row 1 is padding: each of the 5 query blocks still writes its zeros."""
    ids = jnp.asarray(np.array([[1] * 21, [0] * 21], np.int32))
    intervals = key_intervals(Mask(), 20, 21, segment_ids=SegmentIds(ids[:, :20], ids))
    built = block_map(intervals, ROWS, COLUMNS, BLOCKS, far=None)
    assert int(built.steps) == 35
    rows = pairs(built, 2)
    assert [len(row) for row in rows] == [35, 5]
    assert all(flags == FIRST | LAST for _, _, flags in rows[1])
    assert np.unique(built.entries.reshape(2, -1)[1, 5:]).tolist() == [4 << 18], "later steps copy another block"


@settings(max_examples=40, deadline=None)
@given(before=st.integers(0, 12), after=st.integers(0, 12), shift=st.integers(-25, 25))
def test_far_blocks_hold_one_bias(before, after, shift):
    built = block_map(None, ROWS, COLUMNS, BLOCKS, far=Far(before, after), shift=shift)
    for i, j, flags in pairs(built, 1)[0]:
        query = np.arange(BLOCKS.queries)[:, None] + i * BLOCKS.queries
        distance = np.arange(BLOCKS.keys) + j * BLOCKS.keys + shift - query
        is_before, is_after = (distance <= -before).all(), (distance >= after).all()
        assert bool(flags & NEAR) == (not is_before and not is_after)
        if not flags & NEAR and not (is_before and is_after):
            assert bool(flags & AFTER) == is_after
