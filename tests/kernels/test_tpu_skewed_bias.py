"""Slices of skewed tables against the Toeplitz matrices they stand for."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.kernels.tpu.block_map import Far
from t5x_domain.kernels.tpu.skewed_bias import SkewedLayout, skew, unskew

LAYOUTS = [SkewedLayout(128, Far(5, 0)), SkewedLayout(256, Far(91, 91)), SkewedLayout(128, Far(300, 17))]


def values(layout: SkewedLayout) -> np.ndarray:
    """Some bias at distances -before ... after of two heads."""
    size = layout.far.before + 1 + layout.far.after
    return np.random.default_rng(0).standard_normal((2, size)).astype(np.float32)


def at(diagonals: np.ndarray, layout: SkewedLayout, distance: np.ndarray) -> np.ndarray:
    """The bias at any distance."""
    return diagonals[:, np.clip(distance, -layout.far.before, layout.far.after) + layout.far.before]


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=20, deadline=None)
@given(strip=st.integers(-12, 12))
def test_a_slice_is_128_rows_of_a_block(layout, strip):
    diagonals = values(layout)
    table = np.asarray(skew(jnp.asarray(diagonals), layout))
    offset = int(layout.offset(128 * strip))
    assert table.shape == (2, 128, layout.width) and offset % 128 == 0
    expected = at(diagonals, layout, 128 * strip + np.arange(layout.lanes) - np.arange(128)[:, None])
    np.testing.assert_array_equal(table[:, :, offset : offset + layout.lanes], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=20, deadline=None)
@given(tile=st.integers(-12, 12))
def test_a_tile_of_gradients_reaches_the_diagonals_it_was_made_of(layout, tile):
    size = layout.far.before + 1 + layout.far.after
    gradient = np.random.default_rng(1).integers(-9, 9, (1, 128, 128)).astype(np.float32)  # sums are exact
    table = np.zeros((1, 128, layout.width), np.float32)
    window = int(layout.window(128 * tile))
    table[:, :, window : window + 128] = gradient
    distance = np.clip(128 * tile + np.arange(128) - np.arange(128)[:, None], -layout.far.before, layout.far.after)
    expected = np.bincount((distance + layout.far.before).ravel(), gradient.ravel(), size)
    np.testing.assert_array_equal(unskew(jnp.asarray(table), layout)[0], expected)
