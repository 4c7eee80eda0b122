import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.data.offsets import Offsets, ShardLengths

LENGTHS = np.random.default_rng(0).integers(1, 2000, 5000).astype(np.uint32)


class Load:
    """Reads a shard's lengths, and counts how often."""

    def __init__(self, lengths):
        self.lengths, self.calls = lengths, 0

    def __call__(self):
        self.calls += 1
        return self.lengths


def sharded(lengths, borders):
    loads = [Load(part) for part in np.split(np.asarray(lengths, np.uint32), borders)]
    return Offsets([ShardLengths(len(load.lengths), int(load.lengths.sum()), load) for load in loads]), loads


def test_parts_share_what_they_have_read():
    offsets, loads = sharded(LENGTHS, [2000])
    for _ in range(3):
        part = offsets.part(10, 1990)
        assert part.searchsorted(part[900]) == 900
    assert [load.calls for load in loads] == [1, 0]


def plain(lengths, separator=0):
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64) + separator)])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_is_the_array_that_it_stands_for(data):
    """Any shards, also empty ones, any part, with or without separators: numpy's own answers."""
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=40))
    borders = sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=5)))
    first = data.draw(st.integers(0, len(lengths) - 1))
    stop = data.draw(st.integers(first + 1, len(lengths)))
    separator = data.draw(st.integers(0, 1))
    ours, _ = sharded(lengths, borders)
    ours = ours.with_separators() if separator else ours
    ours = pickle.loads(pickle.dumps(ours.part(first, stop)))
    expected = plain(lengths[first:stop], separator)
    np.testing.assert_array_equal(ours, expected)
    assert [ours[i] for i in range(-len(expected), len(expected))] == [*expected, *expected]
    start, end = data.draw(st.integers(-45, 45)), data.draw(st.integers(-45, 45))
    np.testing.assert_array_equal(ours[start:end], expected[start:end])
    for side in ("left", "right"):
        for token in range(-1, int(expected[-1]) + 2):
            assert ours.searchsorted(token, side=side) == np.searchsorted(expected, token, side=side), (token, side)


@pytest.mark.parametrize("separator", [0, 1])
def test_beyond_the_coarse_index(separator):
    """Shards of several times 256 documents, whose every 256th offset is kept."""
    ours, _ = sharded(LENGTHS, [1024, 1025, 3500])
    ours = ours.with_separators() if separator else ours
    expected = plain(LENGTHS, separator)
    np.testing.assert_array_equal(ours, expected)
    for i in (0, 1, 1023, 1024, 1025, 2049, 3500, 4999, 5000):
        assert ours[i] == expected[i]
        for token in expected[i] + np.arange(-1, 2):
            for side in ("left", "right"):
                assert ours.searchsorted(token, side) == np.searchsorted(expected, token, side)


def test_reads_only_the_shards_it_is_asked_about():
    ours, loads = sharded(LENGTHS, [1000, 2000, 3000, 4000])
    assert ours[3000] == LENGTHS[:3000].sum() and ours[-1] == LENGTHS.sum()
    assert [load.calls for load in loads] == [0] * 5, "shards' totals are known"
    for token in (ours[2000], ours[3000] - 1):
        assert 2000 < ours.searchsorted(token, "right") <= 3000
    ours[2100:2900]
    assert [load.calls for load in loads] == [0, 0, 1, 0, 0]
    with pytest.raises(IndexError, match="offset 5001 of 5001"):
        ours[5001]
