"""Forward pass on a TPU: FlashAttention over a list of block pairs (Dao et al. 2022, algorithm 1).

The grid is (heads, batch, pairs): a head's table of biases is fetched once, and the pairs of one query block follow
each other, so that its output stays in vector memory until it is complete. Logits lie as [queries, keys].
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from t5x_domain.kernels.mask import KeyIntervals
from t5x_domain.kernels.tpu.block_map import ACTIVE, FIRST, LAST, NEAR, PARTIAL, BlockMap, read
from t5x_domain.kernels.tpu.blocks import LANES
from t5x_domain.kernels.tpu.logits import MASKED, UNSEEN, base2_logits, dot
from t5x_domain.kernels.tpu.settings import Settings
from t5x_domain.kernels.tpu.skewed_bias import HeadBias, far_bias
from t5x_domain.kernels.tpu.specs import block_specs


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: HeadBias | None,
    intervals: KeyIntervals | None,
    pairs: BlockMap,
    shift: jax.Array,
    settings: Settings,
    dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """Attention with heads before positions, all lengths multiples of their blocks.

    Args:
      q: [B, H, Sq, D]
      k: [B, Hk, Sk, D]
      v: [B, Hk, Sk, D]
      bias: skewed to `settings.layout`.
      intervals: [B or 1, Sq]; None if every query sees every key.
      pairs: of the blocks, query block by query block.
      shift: int32 scalar, a multiple of 128: position of the first key minus that of the first query.
      dtype: of the output.

    Returns:
      Output [B, H, Sq, D], and log2 of the sum of exp of each query's logits, [B, H, 1, Sq] float32, a
      huge number for a query without keys.
    """
    (batch, heads, query_length, dim), (kv_heads, key_length) = q.shape, k.shape[1:3]
    blocks, masked = settings.blocks, intervals is not None
    specs = block_specs(pairs, intervals, blocks, dim, heads // kv_heads)
    rows = jax.tree.map(lambda a: a[:, None], intervals)  # [B or 1, 1, Sq]
    skewed, far = (None, jnp.zeros(1)) if bias is None else (bias.skewed, bias.far.reshape(-1))
    head_spec = None if bias is None else specs.head(skewed.shape)
    statistic = pltpu.VMEM((blocks.queries, LANES), jnp.float32)
    scratch = [statistic, statistic, pltpu.VMEM((blocks.queries, dim), jnp.float32)]
    if masked:
        scratch.append(pltpu.VMEM((len(jax.tree.leaves(rows)), blocks.queries, LANES), jnp.int32))
    return pl.pallas_call(
        functools.partial(_kernel, settings=settings, entry=specs.entry),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(heads, batch, pairs.steps),
            in_specs=[specs.query, specs.key, specs.key, head_spec, jax.tree.map(lambda _: specs.interval, rows)],
            out_specs=[specs.query, specs.lane],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, query_length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=settings.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * heads * query_length * key_length * dim,
            transcendentals=batch * heads * query_length * key_length,
            bytes_accessed=2 * q.nbytes + k.nbytes + v.nbytes,
        ),
        interpret=settings.interpret,
        name="attention_forward",
    )(pairs.entries, shift.reshape(1), far, q, k, v, skewed, rows)


def _kernel(entries, shift, far, q, k, v, skewed, intervals, out, lse, top, total, acc, *seen, settings, entry):
    head, b, step = (pl.program_id(axis) for axis in range(3))
    row, column, flags = read(entries, entry(b, step))
    blocks = settings.blocks
    distance = column * blocks.keys - row * blocks.queries + shift[0]

    @pl.when(flags & FIRST != 0)
    def _():
        top[...] = jnp.full_like(top, UNSEEN)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)
        for i, border in enumerate(jax.tree.leaves(intervals)):
            seen[0][i] = jnp.broadcast_to(border[...], (LANES, blocks.queries)).T

    def attend(partial, near):
        side, descent = far_bias(settings.layout, far, head, flags, near)
        for start in range(0, blocks.keys, blocks.chunk):
            bias = side if settings.softcap is not None else None
            if near:
                bias = _bias(skewed, descent, settings, distance + start)
            products = dot(q[...], k[pl.ds(start, blocks.chunk)], 1, 1)
            logits, _ = base2_logits(products, bias, scale=settings.scale, softcap=settings.softcap)
            if partial:
                logits = jnp.where(_visible(seen[0], column * blocks.keys + start, logits.shape), logits, MASKED)
            # Without a soft cap a constant bias is added to a row's maximum, not to its every logit.
            constant = side if settings.softcap is None else None
            _accumulate(logits, constant, v[pl.ds(start, blocks.chunk)], top, total, acc)

    for kind, partial, near in settings.kinds(intervals is not None):
        pl.when(flags & (ACTIVE | PARTIAL | NEAR) == kind)(functools.partial(attend, partial, near))

    @pl.when(flags & LAST != 0)
    def _():
        empty = total[...] == 0.0
        inverse = jnp.where(empty, 0.0, 1.0 / total[...])
        out[...] = (acc[...] * _lanes(inverse, acc.shape[1])).astype(out.dtype)
        lse[...] = jnp.where(empty, -MASKED, top[...] + jnp.log2(total[...])).T[:1]


def _accumulate(logits, constant, v, top, total, acc):
    """One step of the online softmax, to the base 2."""
    top_before, top_here = top[...], logits.max(axis=1, keepdims=True)
    top_now = jnp.maximum(top_before, top_here if constant is None else top_here + constant)
    reference = top_now if constant is None else top_now - constant
    weights = jnp.exp2(logits - _lanes(reference, logits.shape[1]))
    shrink = jnp.exp2(top_before - top_now)
    total[...] = shrink * total[...] + weights.sum(axis=1, keepdims=True)
    top[...] = top_now
    acc[...] = acc[...] * _lanes(shrink, acc.shape[1]) + dot(weights.astype(v.dtype), v, 1, 0)


def _bias(skewed, descent, settings, distance):
    """[queries, chunk] of bias: strips of 128 queries, each an aligned slice."""
    strips = []
    for first in range(0, settings.blocks.queries, LANES):
        here = distance - first
        window = pl.ds(pl.multiple_of(settings.layout.offset(here), LANES), settings.blocks.chunk)
        strip = skewed[:, window]
        strips.append(strip if descent is None else strip - descent * settings.layout.excess(here).astype(jnp.float32))
    return jnp.concatenate(strips, axis=0)


def _visible(borders, first_key, shape):
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    start, stop, *second = (_lanes(borders[i] - first_key, shape[1]) for i in range(borders.shape[0]))
    visible = (key >= start) & (key < stop)
    return visible | (key >= second[0]) & (key < second[1]) if second else visible


def _lanes(x, width):
    """[rows, 128] of equal columns -> [rows, width]."""
    return x[:, :width] if width <= LANES else jnp.tile(x, (1, width // LANES))
