"""The matrix product of a linear layer, with a backward pass that XLA's CPU compiler handles well."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel for x [B, T, in] and kernel [in, out] of one dtype; [B, T, out].

    For the kernel's gradient, the CPU compiler transposes x and the incoming gradient, and fuses this into whatever
    makes them: strided writes that cost twice the product itself. A barrier leaves the product to read them as they
    are. Compilers for accelerators do better without.
    """
    return x @ kernel


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    x, dy = jax.lax.platform_dependent(x, dy, cpu=lambda *a: jax.lax.optimization_barrier(a), default=lambda *a: a)
    return jnp.einsum("bto,io->bti", dy, kernel), jnp.einsum("bti,bto->io", x, dy)


dense.defvjp(_forward, _backward)
