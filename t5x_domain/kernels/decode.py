"""Attention of one new position to a cache of keys and values, for decoding: the entry, and the backend "xla"."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_domain.kernels.attention import Backend, backend_for
from t5x_domain.kernels.precision import accumulator
from t5x_domain.kernels.tpu.decode import attend_to_cache, merged, splits_for
from t5x_domain.kernels.tpu.logits import LOG2E

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
    backend: Backend = "auto",
) -> jax.Array:
    """softmax(softcap(scale q k^T + bias)) v over past keys and, if given, the new one; see `kernels.attention`.

    Works on the arrays of one device; `parallel.attention.decode_attention` does the same over a mesh.

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
      backend: see `kernels.attention.backend_for`.

    Returns:
      [B, Q, H, D] in q's dtype; 0 for a row that sees nothing.

    Raises:
      ValueError: dtypes do not agree.
      UserError: the backend cannot do what is asked for.
    """
    batch, queries, heads, dim = q.shape
    kv_heads, length = past.keys.shape[1:3]
    if len(dtypes := {a.dtype for a in jax.tree.leaves((q, past, new))}) > 1:
        raise ValueError(f"decode_attention: q, past and new have dtypes {sorted(map(str, dtypes))}; they must agree")
    # Queries of the heads that share a key head are rows of one product: [B, Hk, G * Q, D].
    rows = jnp.moveaxis(q.reshape(batch, queries, kv_heads, -1, dim), 1, 3).reshape(batch, kv_heads, -1, dim)
    if bias is not None:
        bias = jnp.repeat(bias.reshape(kv_heads, heads // kv_heads, -1), queries, axis=1)  # [Hk, G * Q, S + 1]

    def logits(keys: jax.Array, part: slice) -> jax.Array:
        scores = jnp.einsum("bkrd,bksd->bkrs", rows, keys, preferred_element_type=accumulator(q.dtype)) * scale
        scores = scores if bias is None else scores + bias[..., part]
        return scores if softcap is None else jnp.tanh(scores / softcap) * softcap

    own = None if new is None else logits(new.keys, slice(length, None))
    value = None if new is None else new.values
    backend = backend_for(backend, q.dtype, dim)
    if backend == "xla":
        position = jnp.arange(length)
        seen = ((position >= start) & (position < stop))[:, None, None]  # [B, 1, 1, S]
        out = _weighted(logits(past.keys, slice(0, length)), seen, past.values, own, value)
    else:
        parts = attend_to_cache(
            rows,
            *past,
            *(jnp.broadcast_to(bound, (batch, 1))[:, 0] for bound in (start, stop)),
            None if bias is None else bias[..., :length],
            scale=scale,
            softcap=softcap,
            splits=splits_for(batch),
            interpret=backend == "tpu_interpreted",
        )
        out = merged(parts, None if own is None else (own * LOG2E, value))
    out = out.astype(q.dtype).reshape(batch, kv_heads, -1, queries, dim)
    return jnp.moveaxis(out, 3, 1).reshape(batch, queries, heads, dim)


def _weighted(
    scores: jax.Array, seen: jax.Array, values: jax.Array, own: jax.Array | None, own_value: jax.Array | None
) -> jax.Array:
    """Values [B, Hk, S, D] and the new one, weighted by the softmax of logits [B, Hk, R, S] and of its own [.., 1]."""
    scores = jnp.where(seen, scores, _MASKED)
    largest = scores.max(axis=-1, keepdims=True)
    largest = largest if own is None else jnp.maximum(largest, own)
    weights = jnp.where(seen, jnp.exp(scores - largest), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bkrs,bksd->bkrd", weights.astype(values.dtype), values, preferred_element_type=scores.dtype)
    if own is not None:
        weight = jnp.exp(own - largest)
        out, total = out + weight * own_value.astype(scores.dtype), total + weight
    return jnp.where(total > 0, out / jnp.where(total > 0, total, 1.0), 0.0)  # 0 for a row without keys
