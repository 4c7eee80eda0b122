"""Attention with T5's relative bias inside: the one entry, for the arrays of one device, and the choice of a backend.

Models call `parallel.attention`, which does the same over a mesh. A backend to come, as for Hopper GPUs, is one more
object that `kernel_for` gives.
"""

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp

from t5x_domain.errors import UserError
from t5x_domain.kernels.attention_kernel import AttentionKernel, Place, attend
from t5x_domain.kernels.attention_tpu import TpuAttention
from t5x_domain.kernels.attention_xla import XlaAttention
from t5x_domain.kernels.device import platform
from t5x_domain.kernels.mask import KeyIntervals, Mask, SegmentIds, key_intervals
from t5x_domain.kernels.relative_bias import Bias

Backend = Literal["auto", "xla", "tpu", "tpu_interpreted"]
_logger = logging.getLogger(__name__)
BACKENDS = ("auto", "xla", "tpu", "tpu_interpreted")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask,
    relative_bias: Bias | None = None,
    segment_ids: SegmentIds | None = None,
    prefix: jax.Array | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> jax.Array:
    """softmax(softcap(scale q k^T + bias)) v, with f32 logits and probabilities.

    Args:
      q: [B, Sq, H, D], float32 or bfloat16.
      k: [B, Sk, Hk, D]; H must be a multiple of Hk (grouped-query attention: Ainslie et al. 2023).
      v: [B, Sk, Hk, D].
      mask: which keys a query sees, by position.
      relative_bias: T5's bias or ALiBi's, added before the soft cap.
      segment_ids: packed examples, which do not see each other.
      prefix: [B, Sk], 1 on tokens seen by their whole segment although `mask` is causal.
      scale: factor of the logits; T5 uses 1.
      softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2, section 2).
      backend: see `backend_for`.

    Returns:
      [B, Sq, H, D] in q's dtype. Queries that see no key give zeros.

    Raises:
      ValueError: shapes or dtypes do not fit together.
      UserError: the backend cannot do what is asked for.
    """
    check_shapes(q, k, v, relative_bias)
    intervals = visible_keys(mask, q, k, segment_ids=segment_ids, prefix=prefix)
    kernel = kernel_for(backend, q, k, relative_bias, scale=scale, softcap=softcap)
    shift = jnp.int32(0)
    return attend(kernel, q, k, v, relative_bias, Place(intervals, kernel.maps(intervals, shift), shift))


def check_shapes(q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None) -> None:
    """Raises ValueError if they do not fit together."""
    heads, kv_heads = q.shape[2], k.shape[2]
    same = q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and k.shape == v.shape
    if heads % kv_heads or not same:
        raise ValueError(f"attention: queries {q.shape}, keys {k.shape} and values {v.shape} do not fit together")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: queries, keys and values are {q.dtype}, {k.dtype} and {v.dtype}; they must agree")
    for parameter in jax.tree.leaves(bias):
        if parameter.shape[-1] != heads:
            raise ValueError(f"attention: a bias {parameter.shape} is not for {heads} heads")


def visible_keys(
    mask: Mask,
    q: jax.Array | jax.ShapeDtypeStruct,
    k: jax.Array | jax.ShapeDtypeStruct,
    *,
    segment_ids: SegmentIds | None,
    prefix: jax.Array | None,
) -> KeyIntervals | None:
    """`key_intervals`, or None if every query sees every key. Raises ValueError if ids do not fit q and k."""
    ids = SegmentIds(None, None) if segment_ids is None else segment_ids
    names = ("segment_ids.query", ids.query, q), ("segment_ids.key", ids.key, k), ("prefix", prefix, k)
    for name, found, like in names:
        if found is not None and found.shape != like.shape[:2]:
            raise ValueError(f"attention: {name} {found.shape} must be {like.shape[:2]}")
    if not mask.causal and mask.window is None and segment_ids is None:
        return None
    return key_intervals(mask, q.shape[1], k.shape[1], segment_ids=segment_ids, prefix=prefix)


def kernel_for(
    backend: Backend,
    q: jax.Array | jax.ShapeDtypeStruct,
    k: jax.Array | jax.ShapeDtypeStruct,
    bias: Bias | None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    exact: bool = False,
) -> AttentionKernel:
    """What computes attention for arrays of these shapes.

    Args:
      backend: see `backend_for`.
      q: [B, Sq, H, D].
      k: [B, Sk, Hk, D].
      bias: None for none.
      scale: factor of the logits.
      softcap: of the logits; None for none.
      exact: results stay in the dtype of sums, as others will be added to them.

    Raises:
      UserError: the backend cannot do what is asked for.
    """
    options = {"scale": scale, "softcap": softcap, "exact": exact}
    backend = backend_for(backend, q.dtype, q.shape[3])
    if backend == "xla":
        return XlaAttention(**options)
    interpret = backend == "tpu_interpreted"
    return TpuAttention.of(q.shape[1], k.shape[1], q.shape[3], bias, interpret=interpret, **options)


def backend_for(backend: Backend, dtype: jnp.dtype, head_dim: int) -> Backend:
    """The backend that is asked for, "auto" decided.

    Args:
      backend: "xla" runs anywhere; "tpu" is for TPUs, "tpu_interpreted" the same on any device, slowly; "auto" takes
        the one that is made for the device and says once which.
      dtype: of queries, keys and values.
      head_dim: their last axis.

    Raises:
      UserError: the backend is unknown, or cannot do it here.
    """
    if backend == "auto":
        return _of_device(platform(), dtype, head_dim)
    if backend == "xla":
        return backend
    if backend not in BACKENDS:
        raise UserError(f'attention: backend="{backend}" is not known; take one of {", ".join(BACKENDS)}.')
    if (reason := _not_for_tpu(dtype, head_dim)) is not None:
        raise UserError(f'attention: backend="{backend}" {reason}; take backend="xla".')
    if backend == "tpu" and platform() != "tpu":
        raise UserError(
            f'attention: backend="tpu" needs a TPU, but the device is a {platform()}; take "xla", or '
            '"tpu_interpreted" to run the kernel slowly.'
        )
    return backend


@functools.cache
def _of_device(platform: str, dtype: jnp.dtype, head_dim: int) -> Backend:
    """The backend for a device, said once."""
    reason = _not_for_tpu(dtype, head_dim) if platform == "tpu" else f"the device is a {platform}"
    backend = "xla" if reason else "tpu"
    _logger.info("attention: backend %s, because %s", backend, reason or "the device is a TPU")
    return backend


def _not_for_tpu(dtype: jnp.dtype, head_dim: int) -> str | None:
    """Why the TPU's kernels cannot do it."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16, not {dtype}"
    return f"takes head_dim up to 256, not {head_dim}" if head_dim > 256 else None
