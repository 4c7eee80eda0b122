"""The linear product and its hand-written gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_domain.kernels.dense import dense


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_value_and_gradients_by_hand(dtype):
    """Small integers, which both dtypes multiply and add exactly: y = x w, dx = dy wᵀ, dw = xᵀ dy over positions."""
    rng = np.random.default_rng(0)
    x, w, dy = (rng.integers(-2, 3, shape).astype(np.float32) for shape in ((2, 3, 4), (4, 5), (2, 3, 5)))
    y, pull = jax.vjp(dense, jnp.asarray(x, dtype), jnp.asarray(w, dtype))
    dx, dw = pull(jnp.asarray(dy, dtype))
    assert y.dtype == dx.dtype == dw.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(y, np.float32), x @ w)
    np.testing.assert_array_equal(np.asarray(dx, np.float32), dy @ w.T)
    np.testing.assert_array_equal(np.asarray(dw, np.float32), x.reshape(-1, 4).T @ dy.reshape(-1, 5))
