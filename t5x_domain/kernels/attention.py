"""Attention with T5's relative bias inside: the one entry that models call."""

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp

from t5x_domain.errors import UserError
from t5x_domain.kernels.attention_tpu import Maps, Options, attention_tpu, plan_tpu
from t5x_domain.kernels.attention_xla import attention_xla
from t5x_domain.kernels.mask import Mask, SegmentIds, key_intervals
from t5x_domain.kernels.relative_bias import RelativeBias

Backend = Literal["auto", "xla", "tpu", "hopper"]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask,
    relative_bias: RelativeBias | None = None,
    segment_ids: SegmentIds | None = None,
    prefix: jax.Array | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    query_offset: jax.typing.ArrayLike = 0,
    key_offset: jax.typing.ArrayLike = 0,
    backend: Backend = "auto",
    plan: Maps | None = None,
    chunk_size: int | None = None,
) -> jax.Array:
    """softmax(softcap(scale q k^T + bias)) v, with f32 logits and probabilities.

    Args:
      q: [B, Sq, H, D], float32 or bfloat16.
      k: [B, Sk, Hk, D]; H must be a multiple of Hk (grouped-query attention: Ainslie et al. 2023).
      v: [B, Sk, Hk, D].
      mask: which keys a query sees, by position.
      relative_bias: T5's bias, added before the soft cap.
      segment_ids: packed examples, which do not see each other.
      prefix: [B, Sk], 1 on tokens seen by their whole segment although `mask` is causal.
      scale: factor of the logits; T5 uses 1.
      softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2, section 2).
      query_offset: position of the first query, int32, where the arrays are parts of longer sequences.
      key_offset: position of the first key.
      backend: "xla" runs anywhere, "tpu" is for TPUs; "auto" takes the one made for the device.
      plan: of `attention_plan`; None to find it out again.
      chunk_size: of `attention_xla`; None for its own choice.

    Returns:
      [B, Sq, H, D] in q's dtype. Queries that see no key give zeros.

    Raises:
      ValueError: shapes do not fit together.
      UserError: the backend cannot do what is asked for.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % kv_heads or k.shape != v.shape:
        raise ValueError(f"attention: {heads} query heads, keys {k.shape} and values {v.shape} do not fit together")
    if relative_bias is not None and relative_bias.table.shape[1] != heads:
        raise ValueError(f"attention: bias table {relative_bias.table.shape} is not for {heads} heads")
    place = _place(mask, q.shape[1], k.shape[1], relative_bias, segment_ids, prefix, query_offset, key_offset)
    if _choose(backend, q.dtype, q.shape[3]) == "xla":
        return attention_xla(q, k, v, **place, scale=scale, softcap=softcap, chunk_size=chunk_size)
    if _sees_everything(mask, segment_ids):
        place["intervals"] = None
    return attention_tpu(q, k, v, **place, options=Options(scale, softcap), maps=plan)


def attention_plan(
    q: jax.Array | jax.ShapeDtypeStruct,
    k: jax.Array | jax.ShapeDtypeStruct,
    *,
    mask: Mask,
    relative_bias: RelativeBias | None = None,
    segment_ids: SegmentIds | None = None,
    prefix: jax.Array | None = None,
    query_offset: jax.typing.ArrayLike = 0,
    key_offset: jax.typing.ArrayLike = 0,
    backend: Backend = "auto",
) -> Maps | None:
    """What `attention` would find out of the mask, so that layers with the same mask share it.

    Args:
      q: shape and dtype of the queries, [B, Sq, H, D].
      k: of the keys.

    The others are those of `attention`, which takes the result as `plan`. None where the backend has no use for it.
    """
    if _choose(backend, q.dtype, q.shape[3]) == "xla":
        return None
    place = _place(mask, q.shape[1], k.shape[1], relative_bias, segment_ids, prefix, query_offset, key_offset)
    if _sees_everything(mask, segment_ids):
        place["intervals"] = None
    return plan_tpu(q.shape[1], k.shape[1], q.shape[3], **place)


def _place(mask, query_length, key_length, relative_bias, segment_ids, prefix, query_offset, key_offset):
    """Where queries stand and what they see, as the backends take it."""
    whole = isinstance(query_offset, int) and isinstance(key_offset, int) and query_offset == key_offset
    if mask.global_tokens and not whole:
        raise UserError("attention: global_tokens needs whole sequences, but query_offset or key_offset is given")
    intervals = key_intervals(
        mask,
        query_length,
        key_length,
        segment_ids=segment_ids,
        prefix=prefix,
        query_offset=query_offset,
        key_offset=key_offset,
    )
    return {"relative_bias": relative_bias, "intervals": intervals, "shift": key_offset - query_offset}


def _sees_everything(mask: Mask, segment_ids: SegmentIds | None) -> bool:
    return not mask.causal and mask.window is None and segment_ids is None


def _choose(backend: Backend, dtype: jnp.dtype, head_dim: int) -> Backend:
    """The backend that is meant, if it can do it."""
    if backend == "auto":
        return _of_device(_platform(), dtype, head_dim)
    if backend not in ("xla", "tpu"):
        raise UserError(f'attention: backend="{backend}" is not available; take "auto", "xla" or "tpu"')
    if backend == "tpu" and (reason := _not_for_tpu(dtype, head_dim)) is not None:
        raise UserError(f'attention: backend="tpu" {reason}; take backend="xla"')
    return backend


@functools.cache
def _of_device(platform: str, dtype: jnp.dtype, head_dim: int) -> Backend:
    """The backend for a device, said once."""
    reason = _not_for_tpu(dtype, head_dim) if platform == "tpu" else f"the device is a {platform}"
    backend = "xla" if reason else "tpu"
    logging.info("attention: backend %s, because %s", backend, reason or "the device is a TPU")
    return backend


def _platform() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _not_for_tpu(dtype: jnp.dtype, head_dim: int) -> str | None:
    """Why the TPU's kernels cannot do it."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16, not {dtype}"
    return f"takes head_dim up to 256, not {head_dim}" if head_dim > 256 else None
