"""Attention of one new position to a cache of keys and values, for decoding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_domain.kernels.precision import accumulator

_MASKED = -1e30


class KeysValues(NamedTuple):
    """Keys and values of a layer, heads first: [B, Hk, S, D] each."""

    keys: jax.Array
    values: jax.Array


def decode_attention(
    q: jax.Array,
    past: KeysValues,
    new: KeysValues | None,
    *,
    start: jax.Array,
    stop: jax.Array,
    bias: jax.Array | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> jax.Array:
    """softmax(softcap(scale q k^T + bias)) v over past keys and, if given, the new one; see `kernels.attention`.

    The cache is only read, so a step of decoding copies none of it: what is new is attended to beside it and written
    by the caller, once for all layers.

    Args:
      q: [B, Q, H, D], queries that all see the same keys.
      past: S cached positions of each row.
      new: the query's own position, [B, Hk, 1, D]; only for Q = 1. None for cross-attention.
      start: [B, 1] int32, the first cached position that a row sees.
      stop: int32, [] or [B, 1], one past the last.
      bias: [H, S + 1] float32, of the cached positions and of the new one; None for none.
      scale: of the logits.
      softcap: soft cap of the logits; None for none.

    Returns:
      [B, Q, H, D].
    """
    batch, queries, heads, dim = q.shape
    kv_heads, length = past.keys.shape[1:3]
    kind = accumulator(q.dtype)
    # Queries of the heads that share a key head are rows of one product: [B, Hk, G * Q, D].
    rows = jnp.moveaxis(q.reshape(batch, queries, kv_heads, -1, dim), 1, 3).reshape(batch, kv_heads, -1, dim)

    def logits(keys: jax.Array, part: slice) -> jax.Array:
        scores = jnp.einsum("bkrd,bksd->bkrs", rows, keys, preferred_element_type=kind) * scale
        if bias is not None:
            head_bias = bias.reshape(kv_heads, heads // kv_heads, 1, -1)[..., part]
            scores = scores + jnp.repeat(head_bias, queries, axis=2).reshape(1, kv_heads, rows.shape[2], -1)
        return scores if softcap is None else jnp.tanh(scores / softcap) * softcap

    position = jnp.arange(length)
    seen = ((position >= start) & (position < stop))[:, None, None]  # [B, 1, 1, S]
    scores = jnp.where(seen, logits(past.keys, slice(0, length)), _MASKED)
    largest = scores.max(axis=-1, keepdims=True)
    if new is not None:
        own = logits(new.keys, slice(length, length + 1))
        largest = jnp.maximum(largest, own)
    weights = jnp.where(seen, jnp.exp(scores - largest), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bkrs,bksd->bkrd", weights.astype(q.dtype), past.values, preferred_element_type=kind)
    if new is not None:
        weight = jnp.exp(own - largest)
        out, total = out + weight * new.values.astype(kind), total + weight
    out = jnp.where(total > 0, out / jnp.where(total > 0, total, 1.0), 0.0).astype(q.dtype)  # 0 for a row without keys
    return jnp.moveaxis(out.reshape(batch, kv_heads, -1, queries, dim), 3, 1).reshape(batch, queries, heads, dim)
