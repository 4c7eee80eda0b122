"""The one rule of precision: sums are kept in float32, or in float64 if that is what comes in (for exactness tests)."""

import jax
import jax.numpy as jnp


def accumulator(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype of logits, probabilities, norms and gradient sums over inputs of `dtype`."""
    return jnp.promote_types(dtype, jnp.float32)
