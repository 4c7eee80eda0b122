"""Which tokens are global, and which token belongs to which block, against loops over the tokens of each segment."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.kernels.global_blocks import block_sums, every_nth, put, take, transient

SIZES = st.sampled_from((1, 3, 4, 14))


@st.composite
def packed_rows(draw, batch=2, length=14):
    """Segment ids [B, S], ascending from 1, zeros at the end."""
    ids = np.zeros((batch, length), np.int32)
    for row in ids:
        ends = np.minimum(np.cumsum([0, *draw(st.lists(st.integers(1, 9), max_size=4))]), length)
        for segment, (start, end) in enumerate(zip(ends, ends[1:], strict=False), 1):
            row[start:end] = segment
    return ids


def blocks_of(row, size):
    """(segment, tokens) of the blocks of a row; tokens left over belong to the last one of their segment."""
    result = []
    for segment in range(1, row.max() + 1):
        tokens = np.flatnonzero(row == segment)
        blocks = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
        if blocks:
            blocks[-1] = tokens[len(tokens) // size * size - size :]
        result += [(segment, block) for block in blocks]
    return result


@functools.partial(jax.jit, static_argnums=(0, 2))
def found_tokens(size, ids, leading):
    return every_nth(size, ids, window=5, leading=leading), transient(size, ids)


@functools.partial(jax.jit, static_argnums=1)
def sums_and_gradient(x, size, ids, weights):
    sums, pull = jax.vjp(lambda x: block_sums(x, size, transient(size, ids)), x)
    return sums, pull(weights)[0]


@settings(max_examples=examples(40), deadline=None)
@given(ids=packed_rows(), size=SIZES, leading=st.sampled_from((0, 2)))
def test_tokens_by_the_definition(ids, size, leading):
    every, blocks = found_tokens(size, ids, leading)
    assert every.index.shape == blocks.index.shape == (2, 14 // size)
    every, blocks = jax.tree.map(np.asarray, (every, blocks))
    assert (int(every.place.hidden), int(every.own.hidden), int(blocks.place.hidden)) == (5, -1, -1)
    for b, row in enumerate(ids):
        found = blocks_of(row, size)
        last = [tokens[size - 1] for _, tokens in found]
        chosen = [i for i in last if (row[:i] == row[i]).sum() >= leading]
        assert every.index[b].tolist() == chosen + [14] * (14 // size - len(chosen))
        assert every.place.key_segment[b].tolist() == [*row[chosen], *[0] * (14 // size - len(chosen))]
        first = [(row[:i] == row[i]).sum() < leading for i in range(14)]
        assert every.place.query_segment[b].tolist() == np.where(first, 0, row).tolist()
        assert every.own.key_segment[b].tolist() == row.tolist()

        assert blocks.index[b].tolist() == last + [14] * (14 // size - len(last))
        assert blocks.stop[b, : len(found)].tolist() == [tokens[-1] + 1 for _, tokens in found]
        assert blocks.place.key_segment[b, : len(found)].tolist() == [segment for segment, _ in found]
        assert not blocks.place.key_segment[b, len(found) :].any()
        for slot, (_, tokens) in enumerate(found):
            assert (blocks.place.query[b, tokens] == blocks.place.key[b, slot]).all()


@settings(max_examples=examples(15), deadline=None)
@given(ids=packed_rows(), size=SIZES)
def test_sums_and_their_gradient(ids, size):
    """Small whole numbers, whose sums are exact."""
    x = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (2, 14, 3)), jnp.float32)
    weights = np.arange(1, 14 // size * 6 + 1, dtype=np.float32).reshape(2, -1, 3)
    sums, gradients = sums_and_gradient(x, size, ids, weights)
    expected, gradient = np.zeros(sums.shape), np.zeros(x.shape)
    for b, row in enumerate(ids):
        for slot, (_, tokens) in enumerate(blocks_of(row, size)):
            expected[b, slot] = np.asarray(x)[b, tokens].sum(0)
            gradient[b, tokens] = weights[b, slot]
    np.testing.assert_array_equal(sums, expected)
    np.testing.assert_array_equal(gradients, gradient)


def test_sums_are_made_in_float32():
    """257 = 256 + 1 needs nine bits, bfloat16 has eight: added one by one, 512 ones would stay at 256."""
    x = jnp.ones((1, 512, 1), jnp.bfloat16)
    assert sums_and_gradient(x, 512, np.ones((1, 512), np.int32), x[:, :1])[0] == 512


def test_what_is_put_is_what_was_taken():
    x, index = jnp.arange(10.0).reshape(2, 5), jnp.array([[0, 3], [2, 5]])
    assert take(x, index).tolist() == [[0, 3], [7, 0]]
    assert put(x, index, jnp.full((2, 2), -1.0)).tolist() == [[-1, 1, 2, -1, 4], [5, 6, -1, 8, 9]]
