"""The tiles of a chunk of queries: each visible pair is new in one, and what no query sees is in none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.kernels.attention_tiles import Tile, fold_tiles
from t5x_domain.kernels.mask import KeyIntervals, Mask, key_intervals

LENGTH = 32


@functools.partial(jax.jit, static_argnames=("queries", "size", "keys"))
def visits(intervals, queries, size, keys=LENGTH):
    """How often each (row, query, key) is visible in a tile, [B, C, Sk], and the number of tiles."""

    def visit(tile, carry):
        seen, count = carry
        here = jnp.broadcast_to(tile.visible(intervals), (*seen.shape[:2], size)).astype(jnp.int32)
        place = tile.first_key + jnp.arange(size)
        return seen.at[:, :, place].add(here), count + 1

    rows = 1 if intervals is None else len(intervals.start)
    nothing = jnp.zeros((rows, queries, keys), jnp.int32), jnp.int32(0)
    return fold_tiles(visit, nothing, Tile(jnp.int32(0), queries, size, keys), intervals)


def needed(pairs, size):
    """Most tiles that two runs of keys may take: as if each began with a block of its own."""
    return sum(-(-(stop - start) // size) for start, stop in pairs if stop > start)


@st.composite
def two_intervals(draw):
    """Two rows of three queries, each with two runs of keys that do not overlap, either of which may be empty."""
    borders = st.lists(st.integers(0, LENGTH), min_size=4, max_size=4).map(sorted)
    cut = np.array([[draw(borders) for _ in range(3)] for _ in range(2)], np.int32)
    first, second = (cut[..., :2], cut[..., 2:]) if draw(st.booleans()) else (cut[..., 2:], cut[..., :2])
    return KeyIntervals(*(jnp.asarray(a) for run in (first, second) for a in (run[..., 0], run[..., 1])))


@settings(max_examples=examples(100), deadline=None)
@given(intervals=two_intervals(), size=st.sampled_from((1, 5, 16, LENGTH)))
def test_each_visible_pair_is_new_in_one_tile(intervals, size):
    seen, count = visits(intervals, 3, size)
    column = np.arange(LENGTH)
    starts, stops = (np.asarray([a, b]) for a, b in ((intervals[0], intervals[2]), (intervals[1], intervals[3])))
    expected = ((column >= starts[..., None]) & (column < stops[..., None])).sum(axis=0)
    np.testing.assert_array_equal(seen, expected)
    if size < LENGTH:
        hulls = [(a[a < b].min(), b[a < b].max()) for a, b in zip(starts, stops, strict=True) if (a < b).any()]
        assert count <= needed(hulls, size)


def test_queries_that_see_all():
    for size, count in ((LENGTH, 1), (16, 2), (15, 3)):
        seen, found = visits(None, 2, size)
        assert (seen == 1).all() and found == count


def test_a_window_takes_as_many_tiles_at_any_length():
    """Queries 500 ... 507 and 16 keys on either side: 40 keys are 3 blocks of 16; a global key at 0 is a fourth."""
    for length in (600, 6000):
        for global_tokens, count in ((0, 3), (1, 4)):
            intervals = key_intervals(Mask(window=(16, 16), global_tokens=global_tokens), length, length)
            chunk = KeyIntervals(*(None if a is None else a[:, 500:508] for a in intervals))
            assert visits(chunk, 8, 16, length)[1] == count


def test_queries_without_keys_take_none():
    empty = KeyIntervals(jnp.full((1, 4), 7), jnp.full((1, 4), 7))
    assert visits(empty, 4, 8)[1] == 0
