"""Intervals of keys against masks written down pair by pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.kernels.mask import BIDIRECTIONAL, CAUSAL, Mask, SegmentIds, key_intervals


def dense(intervals, batch: int, key_length: int) -> np.ndarray:
    """[B, Sq, Sk] bool."""
    start, stop, *second = (np.broadcast_to(a, (batch, a.shape[1]))[..., None] for a in jax.tree.leaves(intervals))
    inside = lambda start, stop: (start <= np.arange(key_length)) & (np.arange(key_length) < stop)  # noqa: E731
    first = inside(start, stop)
    assert not (second and (first & inside(*second)).any()), "the intervals overlap"
    return first | inside(*second) if second else first


def by_pairs(mask: Mask, query_ids, key_ids, prefix) -> np.ndarray:
    """The definition: same segment, and not after the query unless in the prefix, and within the window."""
    allowed = np.zeros((*query_ids.shape, key_ids.shape[1]), bool)
    for b, i, j in np.ndindex(allowed.shape):
        same = query_ids[b, i] == key_ids[b, j] != 0
        before = not mask.causal or j <= i or bool(prefix[b, j])
        near = mask.window is None or -mask.window[0] <= j - i <= mask.window[1]
        place = min((query_ids[b, :i] == query_ids[b, i]).sum(), (key_ids[b, :j] == key_ids[b, j]).sum())
        near = near or place < mask.global_tokens
        allowed[b, i, j] = same and before and near
    return allowed


@st.composite
def packed_rows(draw, batch=2, length=9):
    """Segment ids [B, S] (ascending from 1, zeros at the end) and a prefix of leading tokens of each segment."""
    ids, prefix = np.zeros((batch, length), np.int32), np.zeros((batch, length), np.int32)
    for row in range(batch):
        lengths = draw(st.lists(st.integers(1, 5), max_size=4))
        ends = np.minimum(np.cumsum([0, *lengths]), length)
        for segment, (start, end) in enumerate(zip(ends, ends[1:], strict=False), 1):
            ids[row, start:end] = segment
            prefix[row, start : min(end, start + draw(st.integers(0, 5)))] = 1
    return ids, prefix


WINDOWS = st.none() | st.tuples(st.integers(0, 6), st.integers(0, 6))


@settings(max_examples=60, deadline=None)
@given(
    row=packed_rows(), causal=st.booleans(), window=WINDOWS, global_tokens=st.integers(0, 3), with_prefix=st.booleans()
)
def test_packed_self_attention(row, causal, window, global_tokens, with_prefix):
    ids, prefix = row
    mask = Mask(causal, window, global_tokens)
    given_prefix = jnp.asarray(prefix) if with_prefix else None
    intervals = key_intervals(
        mask, 9, 9, segment_ids=SegmentIds(jnp.asarray(ids), jnp.asarray(ids)), prefix=given_prefix
    )
    expected = by_pairs(mask, ids, ids, prefix if with_prefix else np.zeros_like(prefix))
    np.testing.assert_array_equal(dense(intervals, 2, 9), expected)


@settings(max_examples=40, deadline=None)
@given(queries=packed_rows(length=7), keys=packed_rows(length=9))
def test_packed_cross_attention(queries, keys):
    ids = SegmentIds(jnp.asarray(queries[0]), jnp.asarray(keys[0]))
    intervals = key_intervals(BIDIRECTIONAL, 7, 9, segment_ids=ids)
    expected = by_pairs(BIDIRECTIONAL, queries[0], keys[0], np.zeros_like(keys[1]))
    np.testing.assert_array_equal(dense(intervals, 2, 9), expected)


@pytest.mark.parametrize("prefix, pairs", [(9, 127), (0, 91), (13, 169)])
def test_pairs_of_a_prefix_lm(prefix, pairs):
    """P² + (T-P)(T+P+1)/2 pairs: T = 13, P = 9 -> 127; P = 0, causal -> 91; P = T, bidirectional -> 169."""
    length = 13
    assert prefix**2 + (length - prefix) * (length + prefix + 1) // 2 == pairs
    marked = (jnp.arange(length) < prefix)[None].astype(jnp.int32)
    intervals = key_intervals(CAUSAL, length, length, prefix=marked)
    assert int((intervals.stop - intervals.start).sum()) == pairs


def test_without_segments_one_row_serves_the_batch():
    assert key_intervals(CAUSAL, 5, 5).stop.tolist() == [[1, 2, 3, 4, 5]]
    assert key_intervals(BIDIRECTIONAL, 2, 5).stop.tolist() == [[5, 5]]
