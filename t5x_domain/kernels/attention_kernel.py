"""What a backend of attention is, and how its two passes become one differentiable function.

A kernel is an object that knows sizes and options, hashable, so that it is compiled for once. It works on the arrays of
one device; `parallel.attention` lays it over a mesh.
"""

import functools
from typing import Any, NamedTuple, Protocol

import jax

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
