"""What a backend of attention is, and how its two passes become one differentiable function.

A kernel is an object that knows sizes and options, hashable, so that it is compiled for once. It works on the arrays of
one device; `parallel.attention` lays it over a mesh.
"""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from t5x_domain.kernels.mask import KeyIntervals
from t5x_domain.kernels.relative_bias import Bias

EMPTY = -1e30  # log-sum-exp of a query without keys: finite, so that no difference of two is NaN


class Place(NamedTuple):
    """Where queries stand and what they see.

    Attributes:
      intervals: keys that each query sees, [B or 1, Sq]; None if each sees all.
      maps: what `AttentionKernel.maps` made of them.
      shift: int32 scalar, position of the first key minus that of the first query.
    """

    intervals: KeyIntervals | None
    maps: Any
    shift: jax.Array


class AttentionKernel(Protocol):
    """A backend, for calls of given sizes and options."""

    def maps(self, intervals: KeyIntervals | None, shift: jax.Array) -> Any:
        """What the passes want to know of the mask beside it, a pytree, the same for all layers; may be None."""

    def forward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None, place: Place
    ) -> tuple[jax.Array, jax.Array]:
        """Attention.

        Args:
          q: [B, Sq, H, D]
          k: [B, Sk, Hk, D]
          v: [B, Sk, Hk, D]
          bias: added to the scaled logits; None for none.
          place: with the maps of this kernel.

        Returns:
          Output [B, Sq, H, D], 0 for a query without keys, and the log-sum-exp of each query's logits, [B, H, Sq]
          float32, `EMPTY` for a query without keys.
        """

    def backward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        bias: Bias | None,
        place: Place,
        out: jax.Array,
        lse: jax.Array,
        d_out: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, Bias | None]:
        """Gradients of q, k, v and the bias.

        `out` and `lse` may be those of attention to more keys than these: the gradients are then this part's share.
        """


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    kernel: AttentionKernel, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None, place: Place
) -> jax.Array:
    """`kernel.forward`, whose gradient is `kernel.backward`: [B, Sq, H, D]."""
    return kernel.forward(q, k, v, bias, place)[0]


def _attend_fwd(kernel, q, k, v, bias, place):
    out, lse = kernel.forward(q, k, v, bias, place)
    return out, (q, k, v, bias, place, out, lse)


def _attend_bwd(kernel, residuals, d_out):
    return *kernel.backward(*residuals, d_out), None


attend.defvjp(_attend_fwd, _attend_bwd)


class Part(NamedTuple):
    """Some of the keys that queries attend to.

    Attributes:
      k: [B, Sk, Hk, D].
      v: [B, Sk, Hk, D].
      bias: added to the scaled logits of these keys; None for none.
      place: what the part's kernel takes: where queries stand and which of these keys they see.
    """

    k: jax.Array
    v: jax.Array
    bias: Bias | None
    place: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_parts(kernels: tuple[AttentionKernel, ...], q: jax.Array, parts: tuple[Part, ...]) -> jax.Array:
    """Attention to the keys of all parts under one softmax: [B, Sq, H, D] in q's dtype.

    Args:
      kernels: one for each part, whose results are exact. What they give is merged by the log-sum-exp.
      q: [B, Sq, H, D].
      parts: no key may be visible to a query in two of them.
    """
    return _attend_parts_fwd(kernels, q, parts)[0]


def _attend_parts_fwd(kernels, q, parts):
    results = [kernel.forward(q, *part) for kernel, part in zip(kernels, parts, strict=True)]
    total = functools.reduce(jnp.logaddexp, [lse for _, lse in results])
    share = lambda lse: jnp.swapaxes(jnp.exp(lse - total), 1, 2)[..., None]  # noqa: E731
    out = sum(out * share(lse) for out, lse in results).astype(q.dtype)
    return out, (q, parts, out, total)


def _attend_parts_bwd(kernels, residuals, d_out):
    q, parts, out, lse = residuals
    cast = lambda new, old: jax.tree.map(lambda a, b: a.astype(b.dtype), new, old)  # noqa: E731
    shares, d_parts = [], []
    for kernel, part in zip(kernels, parts, strict=True):
        dq, *d_part = kernel.backward(q, *part, out, lse, d_out)
        shares.append(dq)
        d_parts.append(Part(*cast(d_part, list(part[:3])), None))
    return sum(shares).astype(q.dtype), tuple(d_parts)


attend_parts.defvjp(_attend_parts_fwd, _attend_parts_bwd)
