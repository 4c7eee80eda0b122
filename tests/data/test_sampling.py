import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.data.sampling import ConcatAndSplit, ExampleRandom, Piece, permuted

RATES = st.lists(st.sampled_from([0.1, 1 / 3, 0.5, 1.0, 2.0, 7.0]), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000), st.integers(2, 700), st.integers(0, 2**40), st.integers(0, 3))
def test_every_token_once_in_every_epoch(num_tokens, raw_length, seed, epoch):
    sampler = ConcatAndSplit([num_tokens], [raw_length], [1.0], seed)
    per_epoch = sampler.num_rows(1, [0])
    pieces = [piece for (piece,) in sampler.rows(epoch * per_epoch, (epoch + 1) * per_epoch)]
    assert {piece.epoch for piece in pieces} == {epoch}
    seen = np.concatenate([np.arange(piece.start, piece.stop) % num_tokens for piece in pieces])
    np.testing.assert_array_equal(np.sort(seen), np.arange(num_tokens))
    lengths = [piece.stop - piece.start for piece in pieces]
    assert sum(length != raw_length for length in lengths) <= 1, "only the remainder is short"


def test_epochs_differ_in_order_and_in_borders():
    sampler = ConcatAndSplit([100_000], [568], [1.0], seed=0)
    first, second = ([piece.start for (piece,) in sampler.rows(e * 177, (e + 1) * 177)] for e in (0, 1))
    assert first != sorted(first)
    assert not set(first) & set(second)


@settings(max_examples=50, deadline=None)
@given(RATES, st.integers(0, 10**9), st.integers(1, 500))
def test_rates_are_exact(rates, start, count):
    """After any number of rows n, component k has had n p_k of them, give or take one row per component."""
    sampler = ConcatAndSplit([1000] * len(rates), [10] * len(rates), rates, seed=0)
    shares = np.array(rates) / sum(rates)
    for end in (count, start + count):
        component, index = sampler._component(end)
        assert abs(index - end * shares[component]) < len(rates)
    # Each row continues its component's sequence where that component was left.
    following = {}
    for row in range(start, start + count):
        component, index = sampler._component(row)
        assert following.get(component, index) == index
        following[component] = index + 1


def test_rows_are_random_access():
    sampler = ConcatAndSplit([9999, 5555], [568, 100], [1.0, 3.0], seed=3)
    rows = sampler.rows(10**9, 10**9 + 64)
    assert rows[40:50] == ConcatAndSplit([9999, 5555], [568, 100], [1.0, 3.0], seed=3).rows(10**9 + 40, 10**9 + 50)
    assert rows != ConcatAndSplit([9999, 5555], [568, 100], [1.0, 3.0], seed=4).rows(10**9, 10**9 + 64)


@given(st.integers(1, 300), st.integers(0, 2**60))
def test_permuted_is_a_permutation(size, key):
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


def test_random_numbers_belong_to_the_piece():
    random = ExampleRandom(5)
    piece = Piece(component=1, epoch=2, start=300, stop=868)
    first = random.at(piece, 7).random(50)
    others = [(piece, 8), (piece._replace(epoch=3), 7), (piece._replace(start=301), 7)]
    for other in others:
        assert not np.array_equal(first, random.at(*other).random(50))
    np.testing.assert_array_equal(first, ExampleRandom(5).at(piece, 7).random(50))
    random.at(*others[0]).integers(10, dtype=np.int32)  # leaves half of a 64-bit word, which must not be used
    np.testing.assert_array_equal(
        ExampleRandom(5).at(piece, 7).integers(99, size=9), random.at(piece, 7).integers(99, size=9)
    )
    assert not np.array_equal(first, ExampleRandom(6).at(piece, 7).random(50))


@settings(max_examples=50, deadline=None)
@given(RATES, st.integers(1, 4))
def test_epochs_of_several_components_are_counted_together(rates, epochs):
    """A corpus of 1,000 tokens in chunks of 10 is passed over when all its components have had as much text."""
    sampler = ConcatAndSplit([1000] * len(rates), [10] * len(rates), rates, seed=0)
    assert sampler.num_rows(epochs, range(len(rates))) == pytest.approx(100 * epochs, abs=1)
    alone = int(np.argmax(rates))  # a rare one would take millions of rows
    rows = sampler.num_rows(epochs, [alone])
    had = sum(piece.stop - piece.start for (piece,) in sampler.rows(0, rows) if piece.component == alone)
    assert had == pytest.approx(1000 * epochs, abs=10 * len(rates) + 10)
