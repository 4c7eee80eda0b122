"""What the forward and the backward kernel share: logits to the base 2, the soft cap, and the matrix product."""

import math

import jax
import jax.numpy as jnp

LOG2E = math.log2(math.e)
# Finite, so that no difference of two of them is NaN. The largest logit of a row starts above MASKED: exp2 of the
# difference is then exactly 0, also for a row that has seen no key yet.
MASKED, UNSEEN = -1e30, -5e29


def bias_unit(softcap: float | None) -> float:
    """What the kernels' tables of biases are multiplied with."""
    return LOG2E if softcap is None else 1.0 / softcap


def base2_logits(
    products: jax.Array, bias: jax.Array | None, *, scale: float, softcap: float | None
) -> tuple[jax.Array, jax.Array | None]:
    """log2(e) times the capped logits, and the cap's derivative (None without one).

    Args:
      products: q k^T, float32.
      bias: in `bias_unit`s, or None.
    """
    logits = products * (scale * bias_unit(softcap))
    if bias is not None:
        logits = logits + bias
    if softcap is None:
        return logits, None
    capped = jnp.tanh(logits)
    return capped * (softcap * LOG2E), 1.0 - capped * capped


def dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    """Product of two matrices along the given dimensions, summed in float32; float32 factors are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
