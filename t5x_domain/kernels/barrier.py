"""Keeps XLA's CPU compiler from fusing what it had better compute once."""

import jax


def computed_once(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The same arrays, which the CPU compiler now writes to memory instead of computing them inside of each use.

    Its fusions repeat a producer for each consumer and for each broadcast row. Compilers for accelerators decide well
    by themselves, so nothing changes there. Not differentiable: for use inside of hand-written gradients.
    """
    return jax.lax.platform_dependent(*arrays, cpu=lambda *a: jax.lax.optimization_barrier(a), default=lambda *a: a)
