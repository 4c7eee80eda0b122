"""Attention in plain JAX, for any device.

Queries are taken a chunk at a time, keys a block at a time with an online softmax, and the backward pass recomputes the
probabilities from their log-sum-exp (Dao et al. 2022, "FlashAttention", section 3.1), so neither direction stores an
array of queries times keys, and the gradient of the bias table is summed along diagonals on the way. Blocks that no
query of a chunk sees are left out: with a window, time grows with the length and not with its square.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from t5x_domain.kernels.attention_kernel import EMPTY, Place
from t5x_domain.kernels.attention_tiles import Tile, fold_tiles
from t5x_domain.kernels.barrier import computed_once
from t5x_domain.kernels.device import platform
from t5x_domain.kernels.mask import KeyIntervals
from t5x_domain.kernels.precision import accumulator
from t5x_domain.kernels.relative_bias import Bias, RelativeBias, diagonals, toeplitz_transpose


@dataclasses.dataclass(frozen=True)
class XlaAttention:
    """Attention for any device, see `AttentionKernel`.

    Attributes:
      scale: factor of the logits.
      softcap: of the logits; None for none.
      exact: results stay in the dtype of sums, as others will be added to them.
      chunk_size: queries handled at once, see `_sizes` for the default.
      block_size: keys handled at once, likewise.
    """

    scale: float = 1.0
    softcap: float | None = None
    exact: bool = False
    chunk_size: int | None = None
    block_size: int | None = None

    def maps(self, intervals: KeyIntervals | None, shift: jax.Array) -> None:
        """Nothing: the intervals say which blocks to visit."""

    def forward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None, place: Place
    ) -> tuple[jax.Array, jax.Array]:
        """See `AttentionKernel.forward`."""
        length, (chunk, block) = q.shape[1], self._sizes(q.shape[1], k.shape[1])
        padding = -length % chunk
        diagonal = _diagonal(bias, length + padding, k.shape[1], place.shift)
        dtype, exact = accumulator(q.dtype) if self.exact else q.dtype, accumulator(q.dtype)
        intervals = _pad(_whole(place.intervals, q), padding)
        q, k, v = _heads_first(_pad(q, padding), k, v)

        def body(_, xs):
            index, q, rows = xs

            def visit(tile, carry):
                out, total, largest = carry
                logits, _ = self._logits(q, tile.keys(k), tile.bias(diagonal), tile.visible(rows))
                # A row that has seen no key has only EMPTY logits: exp(0) = 1 everywhere. Its first key wipes that out,
                # or its empty interval does in the end.
                larger = jnp.maximum(largest, logits.max(axis=-1))
                probabilities = jnp.exp(logits - larger[..., None])
                shrink = jnp.exp(largest - larger)
                here = _product("bkgcs,bksd->bkgcd", probabilities.astype(v.dtype), tile.keys(v))
                return out * shrink[..., None] + here, total * shrink + probabilities.sum(axis=-1), larger

            nothing = jnp.zeros(q.shape, exact), jnp.zeros(q.shape[:-1], exact), jnp.full(q.shape[:-1], EMPTY, exact)
            out, total, largest = fold_tiles(visit, nothing, Tile(index * chunk, chunk, block, k.shape[2]), rows)
            seen = _seen(rows)
            out = out * jnp.where(seen, 1.0 / total, 0.0)[..., None]
            return None, (out.astype(dtype), jnp.where(seen, largest + jnp.log(total), EMPTY))

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
        length, (chunk, block) = q.shape[1], self._sizes(q.shape[1], k.shape[1])
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
            index, q, rows, lse, delta, d_out = xs

            def visit(tile, carry):
                dq, dk, dv, d_diagonal = carry
                keys = tile.keys(k)
                logits, slope = self._logits(q, keys, tile.bias(diagonal), tile.visible(rows))
                probabilities = jnp.where(_seen(rows)[..., None], jnp.exp(logits - lse[..., None]), 0.0)
                dp = _product("bkgcd,bksd->bkgcs", d_out, tile.keys(v))
                # Once, not again for each of the three gradients made of it.
                ds = computed_once(probabilities * (dp - delta[..., None]) * slope)
                dv = _add(dv, _product("bkgcs,bkgcd->bksd", probabilities.astype(v.dtype), d_out), tile.first_key, 2)
                if d_diagonal is not None:
                    summed = toeplitz_transpose(ds.sum(axis=0).reshape(-1, chunk, block))
                    d_diagonal = _add(d_diagonal, summed, tile.first_diagonal(d_diagonal), 1)
                ds = (ds * self.scale if self.scale != 1.0 else ds).astype(k.dtype)
                dk = _add(dk, _product("bkgcs,bkgcd->bksd", ds, q), tile.first_key, 2)
                return dq + _product("bkgcs,bksd->bkgcd", ds, keys), dk, dv, d_diagonal

            tile = Tile(index * chunk, chunk, block, k.shape[2])
            dq, *carry = fold_tiles(visit, (zeros(q), *carry), tile, rows)
            return tuple(carry), dq if self.exact else dq.astype(q.dtype)

        zeros = lambda a: jnp.zeros(a.shape, exact)  # noqa: E731
        d_diagonal = zeros(diagonal) if isinstance(bias, RelativeBias) else None  # ALiBi learns nothing
        chunks = (jnp.arange(q.shape[3] // chunk), _split(q, 3, chunk), intervals, *by_query, _split(d_out, 3, chunk))
        (dk, dv, d_diagonal), dq = jax.lax.scan(body, (zeros(k), zeros(v), d_diagonal), chunks)
        dk, dv = (jnp.moveaxis(a, 1, 2).astype(exact if self.exact else k.dtype) for a in (dk, dv))
        d_bias = (
            jax.tree.map(jnp.zeros_like, bias) if d_diagonal is None else to_bias(d_diagonal.astype(diagonal.dtype))[0]
        )
        return _queries_first(_join(dq, 3))[:, :length], dk, dv, d_bias

    def _sizes(self, queries, keys):
        """Queries of a chunk and keys of a block, at most: on a CPU so few that its cache holds their logits."""
        chunk, block = (1024, 1024) if platform() != "cpu" else (128, 128) if keys > 256 else (64, 256)
        return _equal_parts(queries, self.chunk_size or chunk), _equal_parts(keys, self.block_size or block)

    def _logits(self, q, k, bias, visible):
        """Masked logits [B, Hk, G, C, K] of one tile and the soft cap's derivative (1.0 without one)."""
        logits = _product("bkgcd,bksd->bkgcs", q, k)
        if self.scale != 1.0:
            logits = logits * self.scale
        if bias is not None:
            logits = logits + bias.reshape(1, *logits.shape[1:])
        slope = 1.0
        if self.softcap is not None:
            capped = jnp.tanh(logits / self.softcap)
            logits, slope = capped * self.softcap, 1.0 - capped**2
        return jnp.where(visible[:, None, None], logits, EMPTY), slope


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


def _add(total, part, start, axis):
    """total[..., start : start + n, ...] += part."""
    here = jax.lax.dynamic_slice_in_dim(total, start, part.shape[axis], axis) + part
    return jax.lax.dynamic_update_slice_in_dim(total, here, start, axis)


def _equal_parts(length, limit):
    """Size of parts, at most `limit`, all alike: the least padding."""
    return math.ceil(length / math.ceil(length / limit))


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
