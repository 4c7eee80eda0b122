"""T5's buckets and the Toeplitz form of its bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.kernels.relative_bias import (
    Alibi,
    RelativeBias,
    diagonals,
    relative_position_bucket,
    saturation,
    toeplitz,
    toeplitz_transpose,
)

# First distance of each bucket, read off T5Attention._relative_position_bucket of transformers 5.23 (32 buckets, 128).
PUBLISHED = {
    True: [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91],
    False: [*range(17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113],
}


def bucket_of(relative_position: int, bidirectional: bool, num_buckets: int, max_distance: int) -> int:
    """The definition in exact integers: bucket e + j starts at the first d with (d/e)^(n-e) >= (max/e)^j."""
    after = 0
    if bidirectional:
        num_buckets //= 2
        after = num_buckets if relative_position > 0 else 0
        distance = abs(relative_position)
    else:
        distance = max(-relative_position, 0)
    exact = num_buckets // 2
    if distance < exact:
        return after + distance
    log_buckets = num_buckets - exact
    # (d/e)^m >= (M/e)^j  <=>  d^m e^j >= M^j e^m
    reached = [
        j for j in range(log_buckets) if distance**log_buckets * exact**j >= max_distance**j * exact**log_buckets
    ]
    return after + exact + max(reached)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_first_distances_are_the_published_ones(bidirectional):
    buckets = relative_position_bucket(-np.arange(3001), bidirectional=bidirectional)
    np.testing.assert_array_equal(np.unique(buckets, return_index=True)[1], PUBLISHED[bidirectional])


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 12), (64, 300)])
def test_buckets_equal_the_definition(bidirectional, num_buckets, max_distance):
    positions = np.arange(-3000, 3001)
    options = {"bidirectional": bidirectional, "num_buckets": num_buckets, "max_distance": max_distance}
    expected = [bucket_of(int(p), bidirectional, num_buckets, max_distance) for p in positions]
    np.testing.assert_array_equal(relative_position_bucket(positions, **options), expected)


def test_keys_after_the_query():
    assert relative_position_bucket(np.array([1, 7, 16, 500]), bidirectional=True).tolist() == [17, 23, 26, 31]
    assert relative_position_bucket(np.array([1, 7, 16, 500]), bidirectional=False).tolist() == [0, 0, 0, 0]


@settings(max_examples=10, deadline=None)
@given(
    queries=st.integers(1, 12),
    keys=st.integers(1, 12),
    offset=st.integers(0, 40),
    bidirectional=st.booleans(),
    seed=st.integers(0, 99),
)
def test_diagonals_at_an_offset_equal_the_dense_bias(queries, keys, offset, bidirectional, seed):
    """`query_offset` is where a decoder that has already written that many tokens goes on."""
    table = np.random.default_rng(seed).standard_normal((8, 3)).astype(np.float32)
    bias = RelativeBias(jnp.asarray(table), bidirectional, max_distance=20)
    actual = toeplitz(diagonals(bias, queries, keys, offset), queries)
    position = np.arange(keys)[None] - (np.arange(queries)[:, None] + offset)
    bucket = relative_position_bucket(position, bidirectional=bidirectional, num_buckets=8, max_distance=20)
    np.testing.assert_array_equal(actual, table[bucket].transpose(2, 0, 1))  # copies of table entries: exact


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_toeplitz_transpose_is_the_transpose(rows, columns, seed):
    """<toeplitz(d), b> = <d, toeplitz_transpose(b)>, in small integers, which float32 adds exactly."""
    rng = np.random.default_rng(seed)
    diagonal = rng.integers(-9, 10, (2, rows + columns - 1)).astype(np.float32)
    block = rng.integers(-9, 10, (2, rows, columns)).astype(np.float32)
    left = (np.asarray(toeplitz(jnp.asarray(diagonal), rows)) * block).sum()
    assert left == (diagonal * np.asarray(toeplitz_transpose(jnp.asarray(block)))).sum()


def test_gradient_of_the_table_counts_its_uses():
    """d(sum of the bias)/d(table) is how many (query, key) pairs use each bucket."""
    queries, keys = 30, 20

    def total(table):
        return toeplitz(diagonals(RelativeBias(table, True), queries, keys), queries).sum()

    buckets = relative_position_bucket(np.arange(keys)[None] - np.arange(queries)[:, None], bidirectional=True)
    expected = np.bincount(buckets.ravel(), minlength=32)
    gradient = jax.grad(total)(jnp.zeros((32, 2)))
    np.testing.assert_array_equal(gradient, np.stack([expected, expected], axis=1))


@pytest.mark.parametrize("bidirectional, buckets, largest", [(True, 32, 128), (False, 32, 128), (True, 8, 20)])
def test_saturation(bidirectional, buckets, largest):
    """One bucket from there on, another one step closer. 91 and 113 are where T5's 32 buckets up to 128 end."""
    bias = RelativeBias(jnp.zeros((buckets, 1)), bidirectional, largest)
    before, after = saturation(bias)
    of = lambda *d: relative_position_bucket(  # noqa: E731
        np.array(d), bidirectional=bidirectional, num_buckets=buckets, max_distance=largest
    ).tolist()
    far = np.arange(2 * largest)
    assert len(set(of(*(-before - far)))) == len(set(of(*(after + far)))) == 1
    assert of(-before) != of(1 - before) and (after == 0 or of(after) != of(after - 1))
    if buckets == 32:
        assert (before, after) == ((91, 91) if bidirectional else (113, 0))


def test_slopes_of_alibi():
    """Press et al. 2022, section 3: 1/2, 1/4 ... 1/256 for 8 heads; 12 heads take 4 of those of 16 beside them."""
    np.testing.assert_allclose(Alibi.of(8).slopes, 0.5 ** np.arange(1, 9))
    expected = [*0.5 ** np.arange(1, 9), *0.5 ** np.arange(0.5, 4.5)]
    np.testing.assert_allclose(Alibi.of(12).slopes, expected, rtol=1e-6)
