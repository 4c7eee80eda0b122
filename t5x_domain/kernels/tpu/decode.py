"""Attention of one or few query rows to a cache of keys and values on a TPU.

Decoding is bound by reading the cache, so a step of the grid takes a block of positions of all heads, blocks that a row
of the batch does not see are neither fetched nor computed, and where the rows of the batch do not keep all cores of a
chip busy, they share the positions (Dao et al. 2023, "Flash-Decoding"). What the parts found is merged outside, with
the new position's own key.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from t5x_domain.kernels.device import num_cores
from t5x_domain.kernels.tpu.blocks import LANES
from t5x_domain.kernels.tpu.logits import LOG2E, MASKED, UNSEEN, dot

_SUBLANES = 8
_VMEM = 2**23  # bytes for what a block takes of vector memory, half of what every chip has


class Part(NamedTuple):
    """Attention to some of the positions, not yet divided by the sum of its weights; float32.

    Attributes:
      out: [B, N, Hk, R, D], of N parts.
      top: [B, N, Hk, R], largest logit, to the base 2.
      total: [B, N, Hk, R], sum of exp2(logit - top); 0 if no position is seen.
    """

    out: jax.Array
    top: jax.Array
    total: jax.Array


def attend_to_cache(
    rows: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    bias: jax.Array | None,
    *,
    scale: float,
    softcap: float | None,
    splits: int = 1,
    block: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Part:
    """Attention of each key head's rows to the positions `start <= s < stop` of its cache.

    Args:
      rows: queries, [B, Hk, R, D].
      keys: [B, Hk, S, D] in the dtype of `rows`.
      values: [B, Hk, S, D].
      start: [B] int32.
      stop: [B] int32.
      bias: [Hk, R, S] float32, added to the scaled logits; None for none.
      scale: of the logits.
      softcap: of the logits; None for none.
      splits: parts of the positions that are attended to independently; they take turns, a block each, so that a cache
        of which little is in use keeps all of them busy.
      block: positions fetched at once, a multiple of 128; None for what fits.
      interpret: run by the interpreter.
    """
    batch, kv_heads, num_rows, dim = rows.shape
    length = keys.shape[2]
    padding = -num_rows % _SUBLANES
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, padding), (0, 0)))
    bias = None if bias is None else jnp.pad(bias, ((0, 0), (0, padding), (0, 0)))
    if block is None:
        bias_rows = 0 if bias is None else kv_heads * rows.shape[2]
        block = _block(length, kv_heads * dim * keys.dtype.itemsize, bias_rows, rows.shape[2])
    steps = math.ceil(math.ceil(length / block) / splits)

    def seen_block(b: jax.Array, part: jax.Array, step: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
        """The block of a step, or the nearest that the row sees, which then stands in vector memory already."""
        first, last = start[b] // block, jnp.maximum(stop[b] - 1, start[b]) // block
        return jnp.clip(step * splits + part, first, jnp.minimum(last, (length - 1) // block))

    # The positions come last, as the lanes of vector registers: heads of 64 would fill half of them. Where the cache is
    # carried by a loop, the compiler keeps it so, and nothing is moved here.
    keys, values = jnp.swapaxes(keys, 2, 3), jnp.swapaxes(values, 2, 3)
    cache_spec = pl.BlockSpec((None, kv_heads, dim, block), lambda *a: (a[0], 0, 0, seen_block(*a)))
    row_spec = pl.BlockSpec((None, *rows.shape[1:]), lambda b, *_: (b, 0, 0, 0))
    bias_spec = None if bias is None else pl.BlockSpec((*bias.shape[:2], block), lambda *a: (0, 0, seen_block(*a)))

    def part(width: int) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        return (
            pl.BlockSpec((None, None, *rows.shape[1:3], width), lambda b, n, *_: (b, n, 0, 0, 0)),
            jax.ShapeDtypeStruct((batch, splits, *rows.shape[1:3], width), jnp.float32),
        )

    specs, shapes = zip(part(dim), part(LANES), part(LANES), strict=True)
    out, top, total = pl.pallas_call(
        functools.partial(_kernel, block=block, splits=splits, scale=scale, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, splits, steps),
            in_specs=[row_spec, cache_spec, cache_spec, bias_spec],
            out_specs=list(specs),
        ),
        out_shape=list(shapes),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * kv_heads * num_rows * length * dim,
            transcendentals=batch * kv_heads * num_rows * length,
            bytes_accessed=keys.nbytes + values.nbytes,
        ),
        interpret=interpret,
        name="attend_to_cache",
    )(start, stop, rows, keys, values, bias)
    return Part(out[..., :num_rows, :], top[..., :num_rows, 0], total[..., :num_rows, 0])


def _kernel(start, stop, rows, keys, values, bias, out, top, total, *, block, splits, scale, softcap):
    b, part, step = (pl.program_id(axis) for axis in range(3))
    first = (step * splits + part) * block

    @pl.when(step == 0)
    def _():
        out[...] = jnp.zeros_like(out)
        top[...] = jnp.full_like(top, UNSEEN)
        total[...] = jnp.zeros_like(total)

    @pl.when((first < stop[b]) & (first + block > start[b]))
    def _():
        column = first + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
        seen = (column >= start[b]) & (column < stop[b])
        for head in range(keys.shape[0]):
            logits = dot(rows[head], keys[head], 1, 0) * scale
            if bias is not None:
                logits += bias[head]
            if softcap is not None:
                logits = jnp.tanh(logits / softcap) * softcap
            logits = jnp.where(seen, logits * LOG2E, MASKED)
            before = top[head]
            now = jnp.maximum(before, logits.max(axis=1, keepdims=True))
            weights = jnp.exp2(logits - now[:, :1])
            shrink = jnp.exp2(before - now)
            # Where nothing was written anything may lie in memory, and 0 times NaN is NaN.
            value = jnp.where(seen, values[head], 0)
            total[head] = shrink * total[head] + weights.sum(axis=1, keepdims=True)
            out[head] = shrink[:, :1] * out[head] + dot(weights.astype(value.dtype), value, 1, 1)
            top[head] = now


def merged(parts: Part, own: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """The parts' attention, and that to the new position, as one.

    Args:
      parts: see `attend_to_cache`.
      own: logits [B, Hk, R, 1] (to the base 2) and value [B, Hk, 1, D] of the new position; None for none.

    Returns:
      [B, Hk, R, D] float32; 0 for a row that sees nothing.
    """
    top = parts.top.max(axis=1)
    if own is not None:
        top = jnp.maximum(top, own[0][..., 0])
    share = jnp.exp2(parts.top - top[:, None])
    out = (parts.out * share[..., None]).sum(axis=1)
    total = (parts.total * share).sum(axis=1)
    if own is not None:
        weight = jnp.exp2(own[0] - top[..., None])
        out, total = out + weight * own[1], total + weight[..., 0]
    return out * jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)[..., None]


def splits_for(batch: int) -> int:
    """Parts of the positions: as few as let the cores of a chip share them and the rows of the batch evenly."""
    return num_cores() // math.gcd(batch, num_cores())


def _block(length: int, key_bytes: int, bias_rows: int, rows: int) -> int:
    """Positions of a block: as many as fit, no more than there are, in equal parts.

    A position takes the bytes of its keys and values and its column of the bias, two buffers each, and some four
    float32 for each of a key head's rows while these are computed.
    """
    taken = 2 * (2 * key_bytes + 4 * bias_rows) + 16 * rows
    largest = max(LANES, _VMEM // taken // LANES * LANES)
    parts = math.ceil(length / largest)
    return math.ceil(length / parts / LANES) * LANES
