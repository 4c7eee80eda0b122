"""Attention in plain JAX, for any device.

Queries are taken a chunk at a time and the backward pass recomputes the probabilities from their log-sum-exp
(Dao et al. 2022, "FlashAttention", section 3.1), so neither direction stores an array of queries times keys, and the
gradient of the bias table is summed along diagonals on the way.
"""

import functools
import math

import jax
import jax.numpy as jnp

from t5x_domain.kernels.barrier import computed_once
from t5x_domain.kernels.mask import KeyIntervals
from t5x_domain.kernels.precision import accumulator
from t5x_domain.kernels.relative_bias import RelativeBias, diagonals, toeplitz, toeplitz_transpose

_MASKED = -1e30  # finite: a row without keys must not become NaN


def attention_xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    relative_bias: RelativeBias | None,
    intervals: KeyIntervals,
    shift: jax.typing.ArrayLike,
    scale: float,
    softcap: float | None,
    chunk_size: int | None = None,
) -> jax.Array:
    """The part of `attention` that computes, for any device; the arguments are described there.

    Args:
      intervals: keys that each query sees, [B or 1, Sq].
      shift: position of the first key minus that of the first query.
      chunk_size: queries handled at once. By default 64 on a CPU, whose cache then holds the logits, else 1024.
    """
    batch, query_length, key_length = *q.shape[:2], k.shape[1]
    intervals = jax.tree.map(lambda a: jnp.broadcast_to(a, (batch, query_length)), intervals)
    largest = chunk_size or (64 if jax.default_backend() == "cpu" else 1024)
    chunks = math.ceil(query_length / largest)
    chunk = math.ceil(query_length / chunks)
    padding = chunks * chunk - query_length  # queries without keys, at the end
    pad = lambda a: jnp.pad(a, ((0, 0), (0, padding)) + ((0, 0),) * (a.ndim - 2))  # noqa: E731
    diagonal = None
    if relative_bias is not None:
        diagonal = diagonals(relative_bias, query_length + padding, key_length, -shift)
    out = _attention(pad(q), k, v, diagonal, jax.tree.map(pad, intervals), chunk, scale, softcap)
    return out[:, :query_length]


# Inside, heads stand before positions and are grouped by the key head they share: [B, Hk, G, S, D].


def _logits(q, k, diagonal, index, intervals, *, scale, softcap):
    """Masked logits [B, Hk, G, C, Sk] of one chunk and the soft cap's derivative (1.0 without one)."""
    chunk, key_length = q.shape[-2], k.shape[-2]
    logits = jnp.einsum("bkgcd,bksd->bkgcs", q, k, preferred_element_type=accumulator(q.dtype))
    if scale != 1.0:
        logits = logits * scale
    if diagonal is not None:
        logits = logits + _bias_chunk(diagonal, index, chunk, key_length).reshape(1, *logits.shape[1:])
    slope = 1.0
    if softcap is not None:
        capped = jnp.tanh(logits / softcap)
        logits, slope = capped * softcap, 1.0 - capped**2
    return jnp.where(_visible(intervals, key_length)[:, None, None], logits, _MASKED), slope


def _visible(intervals, key_length):
    """[B, C, Sk] bool."""
    column = jnp.arange(key_length)
    between = lambda start, stop: (column >= start[..., None]) & (column < stop[..., None])  # noqa: E731
    visible = between(intervals.start, intervals.stop)
    if intervals.global_start is None:
        return visible
    return visible | between(intervals.global_start, intervals.global_stop)


def _bias_chunk(diagonal, index, chunk, key_length):
    start, size = _diagonal_slice(diagonal, index, chunk, key_length)
    # Once, not again for each row of the batch.
    return computed_once(toeplitz(jax.lax.dynamic_slice_in_dim(diagonal, start, size, 1), chunk))


def _diagonal_slice(diagonal, index, chunk, key_length):
    """Start and length of the diagonals that cross the `index`-th chunk of queries."""
    last_query = index * chunk + chunk - 1
    return diagonal.shape[1] - key_length - last_query, chunk + key_length - 1


def _split(x, axis, chunk):
    """Moves chunks of `axis` to the front, to scan over."""
    shape = x.shape
    x = x.reshape(*shape[:axis], shape[axis] // chunk, chunk, *shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join(x, axis):
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def _heads_first(q, k, v):
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = jnp.moveaxis(q.reshape(batch, length, kv_heads, heads // kv_heads, dim), 1, 3)
    return q, jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)


def _queries_first(x):
    """[B, Hk, G, S, D] -> [B, S, H, D]."""
    batch, kv_heads, groups, length, dim = x.shape
    return jnp.moveaxis(x, 3, 1).reshape(batch, length, kv_heads * groups, dim)


def _forward(q, k, v, diagonal, intervals, *, chunk, scale, softcap):
    """Output [B, S, H, D] and log-sum-exp of the logits [chunks, B, Hk, G, C]."""
    q, k, v = _heads_first(q, k, v)

    def body(_, xs):
        index, q_chunk, rows = xs
        logits, _ = _logits(q_chunk, k, diagonal, index, rows, scale=scale, softcap=softcap)
        largest = logits.max(axis=-1, keepdims=True)
        # A row without keys has only _MASKED logits: exp(0) = 1 everywhere, so it is zeroed by its empty interval.
        probabilities = jnp.exp(logits - largest)
        total = probabilities.sum(axis=-1)
        out = jnp.einsum(
            "bkgcs,bksd->bkgcd", probabilities.astype(v.dtype), v, preferred_element_type=accumulator(q.dtype)
        )
        seen = rows.nonempty()[:, None, None]
        out = out * jnp.where(seen, 1.0 / total, 0.0)[..., None]
        return None, (out.astype(v.dtype), largest[..., 0] + jnp.log(total))

    rows = jax.tree.map(lambda a: _split(a, 1, chunk), intervals)
    _, (out, lse) = jax.lax.scan(body, None, (jnp.arange(q.shape[3] // chunk), _split(q, 3, chunk), rows))
    return _queries_first(_join(out, 3)), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q, k, v, diagonal, intervals, chunk, scale, softcap):
    return _forward(q, k, v, diagonal, intervals, chunk=chunk, scale=scale, softcap=softcap)[0]


def _attention_fwd(q, k, v, diagonal, intervals, chunk, scale, softcap):
    out, lse = _forward(q, k, v, diagonal, intervals, chunk=chunk, scale=scale, softcap=softcap)
    return out, (q, k, v, diagonal, intervals, out, lse)


def _attention_bwd(chunk, scale, softcap, residuals, d_out):
    q, k, v, diagonal, intervals, out, lse = residuals
    # sum_s p_s dp_s = out . d_out, once a query (FlashAttention, appendix B.2).
    delta = (out.astype(accumulator(q.dtype)) * d_out).sum(axis=-1)
    batch, length, heads = delta.shape
    delta = jnp.moveaxis(delta.reshape(batch, length, k.shape[2], -1), 1, 3)
    d_out, _, _ = _heads_first(d_out, k, v)
    q, k, v = _heads_first(q, k, v)

    def body(carry, xs):
        dk, dv, d_diagonal = carry
        index, q_chunk, rows, lse_chunk, delta_chunk, d_out_chunk = xs
        logits, slope = _logits(q_chunk, k, diagonal, index, rows, scale=scale, softcap=softcap)
        seen = rows.nonempty()[:, None, None, :, None]
        probabilities = jnp.where(seen, jnp.exp(logits - lse_chunk[..., None]), 0.0)
        dp = jnp.einsum("bkgcd,bksd->bkgcs", d_out_chunk, v, preferred_element_type=accumulator(q.dtype))
        # Once, not again for each of the three gradients made of it.
        ds = computed_once(probabilities * (dp - delta_chunk[..., None]) * slope)
        dv += jnp.einsum(
            "bkgcs,bkgcd->bksd", probabilities.astype(v.dtype), d_out_chunk, preferred_element_type=accumulator(q.dtype)
        )
        if d_diagonal is not None:
            block = ds.sum(axis=0).reshape(heads, chunk, k.shape[2])
            start, size = _diagonal_slice(d_diagonal, index, chunk, k.shape[2])
            here = jax.lax.dynamic_slice_in_dim(d_diagonal, start, size, 1) + toeplitz_transpose(block)
            d_diagonal = jax.lax.dynamic_update_slice_in_dim(d_diagonal, here, start, 1)
        ds = (ds * scale if scale != 1.0 else ds).astype(k.dtype)
        dk += jnp.einsum("bkgcs,bkgcd->bksd", ds, q_chunk, preferred_element_type=accumulator(q.dtype))
        dq = jnp.einsum("bkgcs,bksd->bkgcd", ds, k, preferred_element_type=accumulator(q.dtype))
        return (dk, dv, d_diagonal), dq.astype(q.dtype)

    zeros = lambda a: None if a is None else jnp.zeros(a.shape, accumulator(a.dtype))  # noqa: E731
    xs = (
        jnp.arange(length // chunk),
        _split(q, 3, chunk),
        jax.tree.map(lambda a: _split(a, 1, chunk), intervals),
        lse,
        _split(delta, 3, chunk),
        _split(d_out, 3, chunk),
    )
    (dk, dv, d_diagonal), dq = jax.lax.scan(body, (zeros(k), zeros(v), zeros(diagonal)), xs)
    positions_first = lambda a: jnp.moveaxis(a, 1, 2)  # noqa: E731
    return (
        _queries_first(_join(dq, 3)),
        positions_first(dk).astype(k.dtype),
        positions_first(dv).astype(v.dtype),
        d_diagonal,
        None,
    )


_attention.defvjp(_attention_fwd, _attention_bwd)
