"""Shapes of everything a traced function computes, loops included."""

from collections.abc import Iterator

import jax


def intermediate_shapes(function, *args) -> set[tuple[int, ...]]:
    """Shapes of the results of all equations of `function(*args)`."""
    return {aval.shape for aval in _results(jax.make_jaxpr(function)(*args).jaxpr)}


def _results(jaxpr) -> Iterator:
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _results(inner)
