"""Attention over a mesh: each device takes its rows of the batch, its heads and its part of the queries.

The keys of a sequence that lies on several devices come to the queries in one of two ways. "gather" brings all keys to
every device at once. "ring" (Liu et al. 2023, "Ring Attention", section 3) sends each device's keys round, so that none
holds more than two parts, and what the parts give is merged by their log-sum-exp.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from t5x_domain.kernels import decode
from t5x_domain.kernels.attention import Backend, check_shapes, kernel_for, visible_keys
from t5x_domain.kernels.attention_kernel import EMPTY, AttentionKernel, Part, Place, attend, attend_parts
from t5x_domain.kernels.global_blocks import EveryNth, Transient, put, take
from t5x_domain.kernels.mask import KeyIntervals, Mask, SegmentIds
from t5x_domain.kernels.precision import accumulator
from t5x_domain.kernels.relative_bias import Bias
from t5x_domain.kernels.side_attention import SideAttention, SidePlace
from t5x_domain.parallel.layout import SEQUENCE, Layout, sharded
from t5x_domain.parallel.sharding import current_mesh, spec


class Plan(NamedTuple):
    """What layers with the same mask share.

    Attributes:
      intervals: keys that each query sees, [B or 1, Sq]; None if each sees all.
      maps: of the kernel, for every device: leaves [rows of devices, parts of the queries, parts of the keys, ...].
      side: global tokens beside a window; None for none.
    """

    intervals: KeyIntervals | None
    maps: Any
    side: EveryNth | Transient | None = None


def attention_plan(
    q: jax.ShapeDtypeStruct,
    k: jax.ShapeDtypeStruct,
    *,
    mask: Mask,
    relative_bias: Bias | None = None,
    segment_ids: SegmentIds | None = None,
    prefix: jax.Array | None = None,
    backend: Backend = "auto",
    sequence: str = "gather",
) -> Plan:
    """Finds out once what `attention` needs to know of a mask; see `kernels.attention` for the other arguments.

    Args:
      q: shape and dtype of the queries, [B, Sq, H, D].
      k: of the keys, [B, Sk, Hk, D].
      relative_bias: of which only the kind matters.
      backend: see `attention`.
      sequence: likewise.
    """
    intervals = visible_keys(mask, q, k, segment_ids=segment_ids, prefix=prefix)
    layout = Layout.of(q, k, backend, sequence)

    def find(intervals: KeyIntervals | None) -> Any:
        kernel = kernel_for(backend, layout.kernel_queries, layout.kernel_keys, relative_bias)
        steps = jnp.arange(layout.ring, dtype=jnp.int32)
        maps = jax.vmap(lambda step: kernel.maps(*layout.part(intervals, step)))(steps)
        return jax.tree.map(lambda a: a[None, None], maps)

    if layout.mesh is None:
        return Plan(intervals, find(intervals))
    return Plan(intervals, sharded(layout.mesh, find, (layout.by_row(intervals),), layout.found(intervals))(intervals))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: Plan,
    *,
    relative_bias: Bias | None = None,
    side: Part | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    backend: Backend = "auto",
    sequence: str = "gather",
) -> jax.Array:
    """`kernels.attention.attention` of arrays on the current mesh, with a plan in the place of a mask.

    Heads and rows of the batch that the mesh does not divide are computed on all its devices, and so are the queries of
    a sequence whose parts on a TPU would not be multiples of 128.

    Args:
      plan: of `attention_plan` for these shapes, this backend and this `sequence`.
      side: with `Transient` blocks in the plan, their keys and values; not in a ring.
      backend: see `kernels.attention.backend_for`.
      sequence: how keys on other devices are reached: "gather" or "ring".

    Raises:
      ValueError: shapes or dtypes do not fit together, or the plan is for other queries or blocks.
      UserError: the backend cannot do what is asked for.
    """
    check_shapes(q, k, v, relative_bias)
    rows = q.shape[:2] if plan.intervals is None else plan.intervals.start.shape
    if rows[0] not in (1, q.shape[0]) or rows[1] != q.shape[1]:
        raise ValueError(f"attention: a plan for rows {rows} is not for queries {q.shape}")
    if isinstance(plan.side, Transient) != (side is not None):
        raise ValueError("attention: a plan with Transient blocks, and no other, needs their keys and values")
    logits = {"scale": scale, "softcap": softcap}
    how = {**logits, "backend": backend, "sequence": sequence}
    if not isinstance(plan.side, EveryNth):
        return _over_mesh(q, k, v, plan, relative_bias, side, **how)
    index, place, own = plan.side
    side = Part(take(k, index), take(v, index), relative_bias, place)
    out = _over_mesh(q, k, v, plan, relative_bias, side, **how)
    # What the global tokens' own queries see in their window is computed for nothing: they are few.
    return put(out, index, _side_attention(take(q, index), Part(k, v, relative_bias, own), **logits))


def _over_mesh(q, k, v, plan, relative_bias, side, *, scale, softcap, backend, sequence):
    """Attention to the keys of the plan's intervals and those at the side."""
    if side is not None:
        check_shapes(q, side.k, side.v, side.bias)
        if sequence == "ring":
            raise ValueError("attention: global tokens of blocks are for sequence='gather', not 'ring'")
    layout = Layout.of(q, k, backend, sequence)
    k, v = _for_all_heads(layout, k, v)
    side = None if side is None else Part(*_for_all_heads(layout, *side[:2]), *side[2:])

    def compute(q, k, v, bias, plan, side):
        options = {"scale": scale, "softcap": softcap}
        exact = layout.ring > 1 or side is not None
        kernel = kernel_for(backend, layout.kernel_queries, layout.kernel_keys, bias, **options, exact=exact)
        maps = jax.tree.map(lambda a: a[0, 0], plan.maps)
        if layout.ring > 1:
            return _ring(kernel, layout, q, k, v, bias, plan.intervals, maps).astype(q.dtype)
        if layout.key is not None:
            k, v = (jax.lax.all_gather(a, SEQUENCE, axis=1, tiled=True) for a in (k, v))
        intervals, shift = layout.part(plan.intervals, 0)
        place = Place(intervals, jax.tree.map(lambda a: a[0], maps), shift)
        if side is None:
            return attend(kernel, q, k, v, bias, place)
        return attend_parts((kernel, SideAttention(**options)), q, (Part(k, v, bias, place), side))

    arrays = q, k, v, relative_bias, plan._replace(side=None), side
    if layout.mesh is None:
        return compute(*arrays)
    queries = PartitionSpec(layout.batch, layout.query, layout.heads, None)
    keys = PartitionSpec(layout.batch, layout.key, layout.heads, None)
    plans = Plan(layout.by_row(plan.intervals), jax.tree.map(lambda _: layout.found(plan.intervals), plan.maps))
    in_specs = queries, keys, keys, _bias_specs(layout, relative_bias), plans, _side_specs(layout, side)
    return sharded(layout.mesh, compute, in_specs, queries)(*arrays)


def _side_attention(q: jax.Array, side: Part, *, scale: float, softcap: float | None) -> jax.Array:
    """Attention to keys that every device holds all of, and no others."""
    layout = Layout.of(q, side.k, "xla", "gather")
    side = Part(*_for_all_heads(layout, *side[:2]), *side[2:])
    compute = lambda q, side: attend_parts((SideAttention(scale, softcap),), q, (side,))  # noqa: E731
    if layout.mesh is None:
        return compute(q, side)
    queries = PartitionSpec(layout.batch, layout.query, layout.heads, None)
    return sharded(layout.mesh, compute, (queries, _side_specs(layout, side)), queries)(q, side)


def _for_all_heads(layout: Layout, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values with heads enough for the devices that share them: where they are fewer, some hold the same."""
    heads = k.shape[2]
    copies = math.lcm(heads, layout.num_head_parts) // heads
    return (k, v) if copies == 1 else tuple(jnp.repeat(a, copies, axis=2) for a in (k, v))


def _bias_specs(layout: Layout, bias: Bias | None) -> Any:
    return jax.tree.map(lambda a: PartitionSpec(*[None] * (a.ndim - 1), layout.heads), bias)


def _side_specs(layout: Layout, side: Part | None) -> Part | None:
    if side is None:
        return None
    keys = PartitionSpec(layout.batch, None, layout.heads, None)
    query, key = PartitionSpec(layout.batch, layout.query), PartitionSpec(layout.batch, None)
    return Part(keys, keys, _bias_specs(layout, side.bias), SidePlace(query, query, key, key, PartitionSpec()))


def decode_attention(
    q: jax.Array,
    past: decode.KeysValues,
    new: decode.KeysValues | None,
    *,
    start: jax.Array,
    stop: jax.Array,
    bias: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """`kernels.decode.decode_attention` of arrays on the current mesh.

    Rows of the batch and key heads lie on their devices; what the mesh does not divide is computed on all of them. So
    is a cache on several parts of the axis "sequence": its length is not cut.
    """

    def compute(q, past, new, start, stop, bias):
        return decode.decode_attention(q, past, new, start=start, stop=stop, bias=bias, **options)

    mesh, arrays = current_mesh(), (q, past, new, start, stop, bias)
    if mesh is None:
        return compute(*arrays)
    batch, heads = spec(mesh, past.keys.shape[:2], ("batch", "kv_heads"))
    queries, cache, row = PartitionSpec(batch, None, heads), PartitionSpec(batch, heads), PartitionSpec(batch)
    in_specs = queries, cache, cache, row, row if stop.ndim else PartitionSpec(), PartitionSpec(heads)
    return sharded(mesh, compute, in_specs, queries)(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(kernel: AttentionKernel, layout: Layout, q, k, v, bias, intervals, maps):
    """Attention of a device's queries to all keys of the ring; `maps` has a leading axis of steps."""
    return _ring_fwd(kernel, layout, q, k, v, bias, intervals, maps)[0]


def _ring_fwd(kernel, layout, q, k, v, bias, intervals, maps):
    def visit(carry, xs):
        (k, v), out, lse = carry
        step, maps = xs
        rows, shift = layout.part(intervals, step)
        here, lse_here = kernel.forward(q, k, v, bias, Place(rows, maps, shift))
        total = jnp.logaddexp(lse, lse_here)
        share = lambda part: jnp.swapaxes(jnp.exp(part - total), 1, 2)[..., None]  # noqa: E731
        return (_pass_on(layout, (k, v)), out * share(lse) + here * share(lse_here), total), None

    exact = accumulator(q.dtype)
    nothing = jnp.zeros(q.shape, exact), jnp.full((q.shape[0], q.shape[2], q.shape[1]), EMPTY, exact)
    (_, out, lse), _ = jax.lax.scan(visit, ((k, v), *nothing), (jnp.arange(layout.ring), maps))
    return out, (q, k, v, bias, intervals, maps, out, lse)


def _ring_bwd(kernel, layout, residuals, d_out):
    """Gradients of keys and values travel with them and are home after the last step."""
    q, k, v, bias, intervals, maps, out, lse = residuals

    def visit(carry, xs):
        (k, v, dk, dv), dq, d_bias = carry
        step, maps = xs
        rows, shift = layout.part(intervals, step)
        new = kernel.backward(q, k, v, bias, Place(rows, maps, shift), out, lse, d_out)
        dq, dk, dv, d_bias = jax.tree.map(jnp.add, (dq, dk, dv, d_bias), new)
        return (_pass_on(layout, (k, v, dk, dv)), dq, d_bias), None

    zeros = lambda tree: jax.tree.map(lambda a: jnp.zeros(a.shape, accumulator(a.dtype)), tree)  # noqa: E731
    start = ((k, v, *zeros((k, v))), zeros(q), zeros(bias))
    ((_, _, dk, dv), dq, d_bias), _ = jax.lax.scan(visit, start, (jnp.arange(layout.ring), maps))
    cast = lambda new, old: jax.tree.map(lambda a, b: a.astype(b.dtype), new, old)  # noqa: E731
    return *cast((dq, dk, dv, d_bias), (q, k, v, bias)), None, None


_ring.defvjp(_ring_fwd, _ring_bwd)


def _pass_on(layout, tree):
    """To the device before, which gets what the one behind it has."""
    ring = [(i, (i - 1) % layout.ring) for i in range(layout.ring)]
    return jax.tree.map(lambda a: jax.lax.ppermute(a, SEQUENCE, ring), tree)
