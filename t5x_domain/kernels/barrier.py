"""Keeps XLA's CPU compiler from fusing what it had better compute once."""

import jax


def computed_once[Arrays](arrays: Arrays) -> Arrays:
    """The same array or arrays, which the CPU compiler now writes to memory instead of computing inside of each use.

    Its fusions repeat a producer for each consumer and for each broadcast row. Compilers for accelerators decide well
    by themselves, so nothing changes there.
    """
    return jax.lax.platform_dependent(arrays, cpu=jax.lax.optimization_barrier, default=lambda a: a)
