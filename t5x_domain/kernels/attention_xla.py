"""Attention in plain JAX, for any device.

Queries are taken a chunk at a time and the backward pass recomputes the probabilities from their log-sum-exp
(Dao et al. 2022, "FlashAttention", section 3.1), so neither direction stores an array of queries times keys, and the
gradient of the bias table is summed along diagonals on the way.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from t5x_domain.kernels.attention_kernel import EMPTY, Place
from t5x_domain.kernels.barrier import computed_once
from t5x_domain.kernels.device import platform
from t5x_domain.kernels.mask import KeyIntervals
from t5x_domain.kernels.precision import accumulator
from t5x_domain.kernels.relative_bias import Bias, RelativeBias, diagonals, toeplitz, toeplitz_transpose


@dataclasses.dataclass(frozen=True)
class XlaAttention:
    """Attention for any device, see `AttentionKernel`.

    Attributes:
      scale: factor of the logits.
      softcap: of the logits; None for none.
      exact: results stay in the dtype of sums, as others will be added to them.
      chunk_size: queries handled at once. By default 64 on a CPU, whose cache then holds the logits, else 1024.
    """

    scale: float = 1.0
    softcap: float | None = None
    exact: bool = False
    chunk_size: int | None = None

    def maps(self, intervals: KeyIntervals | None, shift: jax.Array) -> None:
        """Nothing: what is masked is computed all the same."""

    def forward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None, place: Place
    ) -> tuple[jax.Array, jax.Array]:
        """See `AttentionKernel.forward`."""
        length, chunk = q.shape[1], self._chunk(q.shape[1])
        padding = -length % chunk
        diagonal = _diagonal(bias, length + padding, k.shape[1], place.shift)
        dtype = accumulator(q.dtype) if self.exact else q.dtype
        intervals = _pad(_whole(place.intervals, q), padding)
        q, k, v = _heads_first(_pad(q, padding), k, v)

        def body(_, xs):
            index, q, rows = xs
            logits, _ = self._logits(q, k, diagonal, index, rows)
            largest = logits.max(axis=-1, keepdims=True)
            # A row without keys has only EMPTY logits: exp(0) = 1 everywhere, so it is zeroed by its empty interval.
            probabilities = jnp.exp(logits - largest)
            total = probabilities.sum(axis=-1)
            out = _product("bkgcs,bksd->bkgcd", probabilities.astype(v.dtype), v)
            out = out * jnp.where(_seen(rows), 1.0 / total, 0.0)[..., None]
            return None, (out.astype(dtype), largest[..., 0] + jnp.log(total))

        chunks = (jnp.arange(q.shape[3] // chunk), _split(q, 3, chunk), _split(intervals, 1, chunk))
        _, (out, lse) = jax.lax.scan(body, None, chunks)
        lse = _join(lse, 3)
        return _queries_first(_join(out, 3))[:, :length], lse.reshape(lse.shape[0], -1, lse.shape[3])[..., :length]

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
        """See `AttentionKernel.backward`."""
        length, chunk = q.shape[1], self._chunk(q.shape[1])
        padding = -length % chunk
        shape = length + padding, k.shape[1]
        diagonal, to_bias = jax.vjp(lambda bias: _diagonal(bias, *shape, place.shift), bias)
        exact = accumulator(q.dtype)
        # sum_s p_s dp_s = out . d_out, once a query (FlashAttention, appendix B.2).
        delta = jnp.moveaxis((out.astype(exact) * d_out).sum(axis=-1), 1, 2)
        by_query = [_split(_grouped(_pad(a, padding, axis=2), k), 3, chunk) for a in (lse, delta)]
        intervals = _split(_pad(_whole(place.intervals, q), padding), 1, chunk)
        d_out, *_ = _heads_first(_pad(d_out.astype(q.dtype), padding), k, v)
        q, k, v = _heads_first(_pad(q, padding), k, v)

        def body(carry, xs):
            dk, dv, d_diagonal = carry
            index, q, rows, lse, delta, d_out = xs
            logits, slope = self._logits(q, k, diagonal, index, rows)
            probabilities = jnp.where(_seen(rows)[..., None], jnp.exp(logits - lse[..., None]), 0.0)
            dp = _product("bkgcd,bksd->bkgcs", d_out, v)
            # Once, not again for each of the three gradients made of it.
            ds = computed_once(probabilities * (dp - delta[..., None]) * slope)
            dv += _product("bkgcs,bkgcd->bksd", probabilities.astype(v.dtype), d_out)
            if d_diagonal is not None:
                block = ds.sum(axis=0).reshape(d_diagonal.shape[0], chunk, k.shape[2])
                start, size = _diagonal_slice(d_diagonal, index, chunk, k.shape[2])
                here = jax.lax.dynamic_slice_in_dim(d_diagonal, start, size, 1) + toeplitz_transpose(block)
                d_diagonal = jax.lax.dynamic_update_slice_in_dim(d_diagonal, here, start, 1)
            ds = (ds * self.scale if self.scale != 1.0 else ds).astype(k.dtype)
            dk += _product("bkgcs,bkgcd->bksd", ds, q)
            dq = _product("bkgcs,bksd->bkgcd", ds, k)
            return (dk, dv, d_diagonal), dq if self.exact else dq.astype(q.dtype)

        zeros = lambda a: jnp.zeros(a.shape, exact)  # noqa: E731
        d_diagonal = zeros(diagonal) if isinstance(bias, RelativeBias) else None  # ALiBi learns nothing
        chunks = (jnp.arange(q.shape[3] // chunk), _split(q, 3, chunk), intervals, *by_query, _split(d_out, 3, chunk))
        (dk, dv, d_diagonal), dq = jax.lax.scan(body, (zeros(k), zeros(v), d_diagonal), chunks)
        dk, dv = (jnp.moveaxis(a, 1, 2).astype(exact if self.exact else k.dtype) for a in (dk, dv))
        d_bias = (
            jax.tree.map(jnp.zeros_like, bias) if d_diagonal is None else to_bias(d_diagonal.astype(diagonal.dtype))[0]
        )
        return _queries_first(_join(dq, 3))[:, :length], dk, dv, d_bias

    def _chunk(self, length):
        """Queries of a chunk, no larger than asked for: chunks of equal size, the least padding."""
        chunks = math.ceil(length / (self.chunk_size or (64 if platform() == "cpu" else 1024)))
        return math.ceil(length / chunks)

    def _logits(self, q, k, diagonal, index, intervals):
        """Masked logits [B, Hk, G, C, Sk] of one chunk and the soft cap's derivative (1.0 without one)."""
        chunk, key_length = q.shape[-2], k.shape[-2]
        logits = _product("bkgcd,bksd->bkgcs", q, k)
        if self.scale != 1.0:
            logits = logits * self.scale
        if diagonal is not None:
            logits = logits + _bias_chunk(diagonal, index, chunk, key_length).reshape(1, *logits.shape[1:])
        slope = 1.0
        if self.softcap is not None:
            capped = jnp.tanh(logits / self.softcap)
            logits, slope = capped * self.softcap, 1.0 - capped**2
        if intervals is None:
            return logits, slope
        return jnp.where(_visible(intervals, key_length)[:, None, None], logits, EMPTY), slope


# Inside, heads stand before positions and are grouped by the key head they share: [B, Hk, G, S, D].


def _product(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=accumulator(a.dtype))


def _diagonal(bias, query_length, key_length, shift):
    return None if bias is None else diagonals(bias, query_length, key_length, -shift)


def _whole(intervals, q):
    """[B, Sq], a row for each of the batch."""
    return jax.tree.map(lambda a: jnp.broadcast_to(a, q.shape[:2]), intervals)


def _seen(intervals):
    """[B, 1, 1, C], queries that see a key; True if all do."""
    return jnp.ones((1, 1, 1, 1), bool) if intervals is None else intervals.nonempty()[:, None, None]


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


def _pad(tree, padding, axis=1):
    """Zeros behind `axis`: for intervals, queries without keys."""
    widths = lambda a: [(0, padding if i == axis else 0) for i in range(a.ndim)]  # noqa: E731
    return jax.tree.map(lambda a: jnp.pad(a, widths(a)), tree)


def _split(tree, axis, chunk):
    """Moves chunks of `axis` to the front, to scan over."""

    def split(x):
        x = x.reshape(*x.shape[:axis], x.shape[axis] // chunk, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    return jax.tree.map(split, tree)


def _join(x, axis):
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def _grouped(x, k):
    """[B, H, S] -> [B, Hk, G, S]."""
    return x.reshape(x.shape[0], k.shape[2], -1, x.shape[2])


def _heads_first(q, k, v):
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = jnp.moveaxis(q.reshape(batch, length, kv_heads, heads // kv_heads, dim), 1, 3)
    return q, jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)


def _queries_first(x):
    """[B, Hk, G, S, D] -> [B, S, H, D]."""
    batch, kv_heads, groups, length, dim = x.shape
    return jnp.moveaxis(x, 3, 1).reshape(batch, length, kv_heads * groups, dim)
