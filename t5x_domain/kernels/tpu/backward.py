"""Backward pass on a TPU: all gradients from one visit of each block pair (Dao et al. 2022, algorithm 4).

The grid is (heads, batch, pairs), the pairs of one key block after each other: gradients of keys and values stay in
vector memory until they are complete, the queries' for a whole row of the batch, the bias's for a whole head. So
nothing is added up in main memory and the order of sums is fixed. Logits lie as [keys, queries]: what belongs to a
query is then one row of lanes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from t5x_domain.kernels.mask import KeyIntervals
from t5x_domain.kernels.tpu.block_map import ACTIVE, FIRST, LAST, NEAR, PARTIAL, BlockMap, read
from t5x_domain.kernels.tpu.blocks import LANES
from t5x_domain.kernels.tpu.logits import MASKED, base2_logits, dot
from t5x_domain.kernels.tpu.settings import Settings
from t5x_domain.kernels.tpu.skewed_bias import HeadBias, far_bias
from t5x_domain.kernels.tpu.specs import block_specs


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: HeadBias | None,
    intervals: KeyIntervals | None,
    pairs: BlockMap,
    shift: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    settings: Settings,
    dtype: jax.typing.DTypeLike,
    sum_dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of `forward`, whose arguments these are, but for `bias` and `pairs`.

    Args:
      bias: of `query - key`, skewed to `settings.layout` with queries as lanes.
      pairs: of the blocks, key block by key block.
      d_out: gradient of the output, [B, H, Sq, D].
      lse: as the forward pass gave it.
      delta: sum of output times its gradient, [B, H, 1, Sq] float32.
      dtype: of dq.
      sum_dtype: of dk and dv.

    Returns:
      dq [B, H, Sq, D], dk and dv of each query head, [B, H, Sk, D], and the gradient of `bias.skewed` as if it were
      added to the logits as it is; None without a bias that learns.
    """
    (batch, heads, query_length, dim), (kv_heads, key_length) = q.shape, k.shape[1:3]
    blocks = settings.blocks
    specs = block_specs(pairs, intervals, blocks, dim, heads // kv_heads)
    whole_spec = pl.BlockSpec((None, None, query_length, dim), lambda h, b, *_: (b, h, 0, 0))
    rows = jax.tree.map(lambda a: a[:, None], intervals)  # [B or 1, 1, Sq]
    skewed, far = (None, jnp.zeros(1)) if bias is None else (bias.skewed, bias.far.reshape(-1))
    head_spec = None if bias is None else specs.head(skewed.shape)
    learns = bias is not None and not settings.layout.linear
    sums = jax.ShapeDtypeStruct((batch, heads, key_length, dim), sum_dtype)
    return pl.pallas_call(
        functools.partial(_kernel, settings=settings, entry=specs.entry),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(heads, batch, pairs.steps),
            in_specs=[specs.query, specs.key, specs.key, head_spec, jax.tree.map(lambda _: specs.interval, rows)]
            + [specs.query, specs.lane, specs.lane],
            out_specs=[whole_spec, specs.key_sum, specs.key_sum, head_spec if learns else None],
            scratch_shapes=[pltpu.VMEM((query_length, dim), jnp.float32)]
            + [pltpu.VMEM((blocks.keys, dim), jnp.float32)] * 2,
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, dtype),
            sums,
            sums,
            jax.ShapeDtypeStruct(skewed.shape, jnp.float32) if learns else None,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=settings.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * batch * heads * query_length * key_length * dim,
            transcendentals=batch * heads * query_length * key_length,
            bytes_accessed=3 * q.nbytes + 2 * (k.nbytes + v.nbytes),
        ),
        interpret=settings.interpret,
        name="attention_backward",
    )(pairs.entries, jnp.stack([shift, pairs.steps]), far, q, k, v, skewed, rows, d_out, lse, delta)


def _kernel(
    entries, sizes, far, q, k, v, skewed, intervals, d_out, lse, delta,
    dq, dk, dv, d_skewed, dq_sum, dk_sum, dv_sum, *, settings, entry,
):  # fmt: skip
    head, b, step = (pl.program_id(axis) for axis in range(3))
    row, column, flags = read(entries, entry(b, step))
    blocks = settings.blocks
    distance = column * blocks.keys - row * blocks.queries + sizes[0]

    @pl.when(step == 0)
    def _():
        _each_block(dq_sum, 0, lambda part: jnp.zeros(part.shape, part.dtype))

    if d_skewed is not None:

        @pl.when((step == 0) & (b == 0))
        def _():
            _each_block(d_skewed, 1, lambda part: jnp.zeros(part.shape, part.dtype))

    @pl.when(flags & FIRST != 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def attend(partial, near):
        side, descent = far_bias(settings.layout, far, head, flags, near)
        rows = pl.ds(pl.multiple_of(row * blocks.queries, LANES), blocks.queries)
        for start in range(0, blocks.keys, blocks.chunk):
            here = pl.ds(start, blocks.chunk)
            bias = side if settings.softcap is not None else None
            if near:
                bias = _bias(skewed, descent, settings, distance + start)
            logits, slope = base2_logits(
                dot(k[here], q[...], 1, 1), bias, scale=settings.scale, softcap=settings.softcap
            )
            if partial:
                logits = jnp.where(_visible(intervals, column * blocks.keys + start, logits.shape), logits, MASKED)
            constant_is_added = side is None or settings.softcap is not None
            weights = jnp.exp2(logits - (lse[...] if constant_is_added else lse[...] - side))
            dv_sum[here] += dot(weights.astype(d_out.dtype), d_out[...], 1, 0)
            ds = weights * (dot(v[here], d_out[...], 1, 1) - delta[...])
            ds = ds if slope is None else ds * slope
            if d_skewed is not None:
                _add_diagonals(d_skewed, ds, settings.layout, distance + start, near)
            ds = ds.astype(q.dtype)
            dk_sum[here] += dot(ds, q[...], 1, 0)
            dq_sum[rows] += dot(ds, k[here], 0, 0)

    for kind, partial, near in settings.kinds(intervals is not None):
        pl.when(flags & (ACTIVE | PARTIAL | NEAR) == kind)(functools.partial(attend, partial, near))

    @pl.when(flags & LAST != 0)
    def _():
        dk[...] = (dk_sum[...] * settings.scale).astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)

    # Not by pl.num_programs, which the interpreter takes from another axis under vmap.
    @pl.when(step == sizes[1] - 1)
    def _():
        def write(block, _):
            part = pl.ds(pl.multiple_of(block * LANES, LANES), LANES)
            dq[part] = (dq_sum[part] * settings.scale).astype(dq.dtype)

        jax.lax.fori_loop(0, dq.shape[0] // LANES, write, None)


def _each_block(ref, axis, value):
    """Fills an array of any size by a loop of small code."""

    def body(block, _):
        part = pl.ds(pl.multiple_of(block * LANES, LANES), LANES)
        index = (part, slice(None)) if axis == 0 else (slice(None), part)
        ref[index] = value(ref.at[index])

    jax.lax.fori_loop(0, ref.shape[axis] // LANES, body, None)


def _bias(skewed, descent, settings, distance):
    """[chunk, queries] of bias: strips of 128 keys, each an aligned slice."""
    strips = []
    for first in range(0, settings.blocks.chunk, LANES):
        here = -distance - first
        window = pl.ds(pl.multiple_of(settings.layout.offset(here), LANES), settings.blocks.queries)
        strip = skewed[:, window]
        strips.append(strip if descent is None else strip - descent * settings.layout.excess(here).astype(jnp.float32))
    return jnp.concatenate(strips, axis=0)


def _add_diagonals(d_skewed, ds, layout, distance, near):
    """Adds [chunk, queries] of gradients where `_bias` read. Tiles of one diagonal lie at the same place."""
    keys, queries = (size // LANES for size in ds.shape)
    diagonals = {}
    for i in range(keys):
        for j in range(queries):
            tile = ds[i * LANES : (i + 1) * LANES, j * LANES : (j + 1) * LANES]
            # Far tiles share one bucket, so one place will do for all.
            diagonals.setdefault((j - i) * LANES if near else 0, []).append(tile)
    for offset, tiles in diagonals.items():
        window = pl.ds(pl.multiple_of(layout.window(offset - distance), LANES), LANES)
        d_skewed[:, window] += functools.reduce(jnp.add, tiles)


def _visible(intervals, first_key, shape):
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    start, stop, *second = (border[...] - first_key for border in jax.tree.leaves(intervals))
    visible = (key >= start) & (key < stop)
    return visible | (key >= second[0]) & (key < second[1]) if second else visible
