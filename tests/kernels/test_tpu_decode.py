"""The decoding kernel, interpreted, against attention in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from t5x_domain.kernels.tpu.decode import attend_to_cache, merged
from t5x_domain.kernels.tpu.logits import LOG2E

BATCH, DIM = 3, 64


def reference(rows, keys, values, start, stop, bias, own_key, own_value, scale, softcap):
    rows, keys, values, own_key, own_value = (
        np.asarray(a, np.float64) for a in (rows, keys, values, own_key, own_value)
    )
    keys, values = np.concatenate([keys, own_key], axis=2), np.concatenate([values, own_value], axis=2)
    logits = np.einsum("bkrd,bksd->bkrs", rows, keys) * scale
    logits += 0 if bias is None else np.asarray(bias, np.float64)
    logits = logits if softcap is None else np.tanh(logits / softcap) * softcap
    position = np.arange(keys.shape[2])
    seen = (position >= start[:, None]) & (position < stop[:, None]) | (position == keys.shape[2] - 1)
    weights = np.where(seen[:, None, None], np.exp(logits - logits.max(axis=-1, keepdims=True)), 0)
    return np.einsum("bkrs,bksd->bkrd", weights / weights.sum(axis=-1, keepdims=True), values)


@settings(max_examples=examples(6), deadline=None)
@given(
    length=st.integers(1, 400),
    rows=st.sampled_from([1, 4, 9]),
    kv_heads=st.sampled_from([1, 2]),
    splits=st.sampled_from([1, 2]),
    with_bias=st.booleans(),
    softcap=st.sampled_from([None, 5.0]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    data=st.data(),
)
def test_it_is_attention(length, rows, kv_heads, splits, with_bias, softcap, dtype, data):
    start = np.array([data.draw(st.integers(0, length)) for _ in range(BATCH)], np.int32)
    stop = np.array([data.draw(st.integers(s, length)) for s in start], np.int32)
    random = np.random.default_rng(length)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), dtype)  # noqa: E731
    q, own_key, own_value = (
        draw(BATCH, kv_heads, rows, DIM),
        draw(BATCH, kv_heads, 1, DIM),
        draw(BATCH, kv_heads, 1, DIM),
    )
    keys, values = draw(BATCH, kv_heads, length, DIM), draw(BATCH, kv_heads, length, DIM)
    bias = jnp.asarray(random.standard_normal((kv_heads, rows, length + 1)), jnp.float32) if with_bias else None
    scale = DIM**-0.5
    parts = attend_to_cache(
        q, keys, values, jnp.asarray(start), jnp.asarray(stop), None if bias is None else bias[..., :length],
        scale=scale, softcap=softcap, splits=splits, block=128, interpret=pltpu.InterpretParams(),
    )  # fmt: skip
    own = jnp.einsum("bkrd,bksd->bkrs", q, own_key, preferred_element_type=jnp.float32) * scale
    own = own if bias is None else own + bias[..., length:]
    own = own if softcap is None else jnp.tanh(own / softcap) * softcap
    found = merged(parts, (own * LOG2E, own_value.astype(jnp.float32)))
    expected = reference(q, keys, values, start, stop, bias, own_key, own_value, scale, softcap)
    # Weights are rounded to the values' dtype, at most half a unit in the last place each; they add up to 1. Logits of
    # DIM products err by DIM/2 units of float32 relative to the sum of their sizes, below 8, and their exp as much.
    largest = float(np.abs(np.asarray(values, np.float64)).max(initial=4.0))
    bound = largest * (float(jnp.finfo(dtype).eps) / 2 + 2 * 8 * DIM * 2.0**-24)
    np.testing.assert_allclose(found, expected, atol=bound, rtol=0)


def test_a_row_that_sees_nothing_is_zero_and_what_lies_behind_the_cache_does_not_matter():
    ones = jnp.ones((1, 1, 130, DIM), jnp.float32)
    parts = attend_to_cache(
        ones[:, :, :1], ones, ones * jnp.nan, jnp.array([5]), jnp.array([5]), None,
        scale=1.0, softcap=None, block=128, interpret=pltpu.InterpretParams(),
    )  # fmt: skip
    assert not np.asarray(merged(parts, None)).any()


def test_parts_take_turns():
    """Of four blocks the first two are in use, one for each part."""
    ones = jnp.ones((1, 1, 512, DIM), jnp.float32)
    parts = attend_to_cache(
        ones[:, :, :1], ones, ones, jnp.array([0]), jnp.array([256]), None,
        scale=1.0, softcap=None, splits=2, block=128, interpret=True,
    )  # fmt: skip
    np.testing.assert_array_equal(parts.total, np.full((1, 2, 1, 1), 128))


@pytest.mark.parametrize("splits", [1, 2])
def test_blocks_that_no_row_sees_are_not_fetched(splits):
    """NaN in them would show."""
    keys = jnp.ones((1, 1, 512, DIM), jnp.float32).at[:, :, :128].set(jnp.nan).at[:, :, 256:].set(jnp.nan)
    parts = attend_to_cache(
        jnp.ones((1, 1, 1, DIM)), keys, keys, jnp.array([128]), jnp.array([256]), None,
        scale=1.0, softcap=None, splits=splits, block=128, interpret=pltpu.InterpretParams(),
    )  # fmt: skip
    np.testing.assert_array_equal(merged(parts, None), np.ones((1, 1, 1, DIM)))
