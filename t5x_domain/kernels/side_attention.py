"""Attention to few keys, or of few queries, that stand anywhere: global tokens beside a sliding window.

Each query and each key has a coordinate and a segment, so the bias is formed for every pair, a chunk of queries at a
time. Plain JAX, for any device; the arithmetic is that of sums, float32.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_domain.kernels.attention_kernel import EMPTY
from t5x_domain.kernels.device import platform
from t5x_domain.kernels.precision import accumulator
from t5x_domain.kernels.relative_bias import Bias, bias_at


class SidePlace(NamedTuple):
    """Where queries and keys stand: a query sees the keys of its segment that are more than `hidden` away.

    Attributes:
      query: [B, Sq] int32, coordinates of the queries; the bias is that of differences of coordinates.
      query_segment: [B, Sq] int32; a query of segment 0 sees nothing.
      key: [B, Sk] int32, coordinates of the keys.
      key_segment: [B, Sk] int32.
      hidden: int32 scalar, keys up to this far from the query are left to another part; -1 if there are none.
    """

    query: jax.Array
    query_segment: jax.Array
    key: jax.Array
    key_segment: jax.Array
    hidden: jax.Array


@dataclasses.dataclass(frozen=True)
class SideAttention:
    """An `AttentionKernel` whose place is a `SidePlace` and whose results are exact.

    Attributes:
      scale: factor of the logits.
      softcap: of the logits; None for none.
      chunk_size: queries handled at once. By default as many as have 2^16 logits a head on a CPU, 2^18 elsewhere.
    """

    scale: float = 1.0
    softcap: float | None = None
    chunk_size: int | None = None

    def maps(self, intervals: None, shift: jax.Array) -> None:
        """Nothing: a `SidePlace` says it all."""

    def forward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None, place: SidePlace
    ) -> tuple[jax.Array, jax.Array]:
        """See `AttentionKernel.forward`."""
        k, v = _exact(k), _exact(v)

        def body(_, chunk):
            logits, visible = self._logits(*chunk, k, bias, place)
            largest = logits.max(axis=-1, keepdims=True)
            weights = jnp.where(visible, jnp.exp(logits - largest), 0.0)
            total = weights.sum(axis=-1)
            out = _weighted(weights, v) / _queries_first(jnp.where(total > 0, total, 1.0))[..., None]
            lse = jnp.where(total > 0, largest[..., 0] + jnp.log(total), EMPTY)
            return None, (out, _queries_first(lse))

        _, (out, lse) = jax.lax.scan(body, None, self._chunks(k, q, place.query, place.query_segment))
        return _joined(out, q.shape[1]), jnp.swapaxes(_joined(lse, q.shape[1]), 1, 2)

    def backward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        bias: Bias | None,
        place: SidePlace,
        out: jax.Array,
        lse: jax.Array,
        d_out: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, Bias | None]:
        """See `AttentionKernel.backward`."""
        keys = _exact(k), _exact(v), bias
        # sum_s p_s dp_s = out . d_out, once a query (FlashAttention, appendix B.2).
        delta = (_exact(out) * _exact(d_out)).sum(axis=-1)

        def body(sums, chunk):
            q, query, segment, lse, delta, d_out = chunk

            def weighted(q, k, v, bias):
                logits, visible = self._logits(q, query, segment, k, bias, place)
                weights = jnp.where(visible, jnp.exp(logits - _heads_first(lse, k)[..., None]), 0.0)
                return _weighted(weights, v), _queries_first(weights.sum(axis=-1))

            # With the log-sum-exp held constant a logit's gradient is p dp - p delta, as it must be.
            _, pull = jax.vjp(weighted, q, *keys)
            dq, *new = pull((d_out, -delta))
            return jax.tree.map(jnp.add, sums, tuple(new)), dq

        by_query = q, place.query, place.query_segment, jnp.swapaxes(lse, 1, 2), delta, d_out
        sums, dq = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, keys), self._chunks(k, *by_query))
        return _joined(dq, q.shape[1]), *sums

    def _logits(self, q, query, segment, k, bias, place):
        """Masked logits [B, Hk, H/Hk, C, Sk] of a chunk of queries, and which of them are visible."""
        batch, length, heads, dim = q.shape
        grouped = q.reshape(batch, length, k.shape[2], -1, dim)
        logits = jnp.einsum("bckgd,bskd->bkgcs", grouped, k) * self.scale
        distance = place.key[:, None] - query[..., None]
        if bias is not None:
            logits += jnp.swapaxes(bias_at(bias, distance), 0, 1).reshape(logits.shape)
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        same = (place.key_segment[:, None] == segment[..., None]) & (segment[..., None] != 0)
        visible = (same & (jnp.abs(distance) > place.hidden))[:, None, None]
        return jnp.where(visible, logits, EMPTY), visible

    def _chunks(self, k, *by_query):
        """Chunks of arrays [B, Sq, ...], to scan over; queries that fill up the last one have segment 0."""
        length = by_query[0].shape[1]
        most = self.chunk_size or max(1, (2**16 if platform() == "cpu" else 2**18) // k.shape[1])
        count = math.ceil(length / most)
        chunk = math.ceil(length / count)

        def split(a):
            a = jnp.pad(a, [(0, count * chunk - length if axis == 1 else 0) for axis in range(a.ndim)])
            return jnp.moveaxis(a.reshape(a.shape[0], count, chunk, *a.shape[2:]), 1, 0)

        integers = lambda a: jnp.issubdtype(a.dtype, jnp.integer)  # noqa: E731
        return tuple(split(a if integers(a) else _exact(a)) for a in by_query)


def _exact(a):
    return a.astype(accumulator(a.dtype))


def _weighted(weights, v):
    """[B, C, H, D]."""
    out = jnp.einsum("bkgcs,bskd->bckgd", weights, v)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


def _queries_first(a):
    """[B, Hk, H/Hk, C] -> [B, C, H]."""
    return jnp.moveaxis(a.reshape(a.shape[0], -1, a.shape[-1]), 1, 2)


def _heads_first(a, k):
    """[B, C, H] -> [B, Hk, H/Hk, C]."""
    return jnp.moveaxis(a, 1, 2).reshape(a.shape[0], k.shape[2], -1, a.shape[1])


def _joined(a, length):
    """[chunks, B, C, ...] -> [B, length, ...]."""
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :length]
