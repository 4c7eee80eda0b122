"""Attention over a mesh: each device takes its rows of the batch, its heads and its part of the queries.

The keys of a sequence that lies on several devices come to the queries in one of two ways. "gather" brings all keys to
every device at once. "ring" (Liu et al. 2023, "Ring Attention", section 3) sends each device's keys round, so that none
holds more than two parts, and what the parts give is merged by their log-sum-exp.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from t5x_domain.kernels import decode
from t5x_domain.kernels.attention import Backend, check_shapes, kernel_for, visible_keys
from t5x_domain.kernels.attention_kernel import EMPTY, AttentionKernel, Place, attend
from t5x_domain.kernels.mask import KeyIntervals, Mask, SegmentIds
from t5x_domain.kernels.precision import accumulator
from t5x_domain.kernels.relative_bias import Bias
from t5x_domain.parallel.sharding import current_mesh, spec

SEQUENCE = "sequence"  # the axis of the mesh
_ALIGNMENT = 128  # positions; parts of other lengths would not meet the TPU's registers


class Plan(NamedTuple):
    """What layers with the same mask share.

    Attributes:
      intervals: keys that each query sees, [B or 1, Sq]; None if each sees all.
      maps: of the kernel, for every device: leaves [rows of devices, parts of the queries, parts of the keys, ...].
    """

    intervals: KeyIntervals | None
    maps: Any


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
    layout = _Layout.of(q, k, backend, sequence)

    def find(intervals: KeyIntervals | None) -> Any:
        kernel = kernel_for(backend, layout.kernel_queries, layout.kernel_keys, relative_bias)
        steps = jnp.arange(layout.ring, dtype=jnp.int32)
        maps = jax.vmap(lambda step: kernel.maps(*layout.part(intervals, step)))(steps)
        return jax.tree.map(lambda a: a[None, None], maps)

    if layout.mesh is None:
        return Plan(intervals, find(intervals))
    return Plan(intervals, _sharded(layout.mesh, find, (layout.by_row(intervals),), layout.found(intervals))(intervals))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: Plan,
    *,
    relative_bias: Bias | None = None,
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
      backend: see `kernels.attention.backend_for`.
      sequence: how keys on other devices are reached: "gather" or "ring".

    Raises:
      ValueError: shapes or dtypes do not fit together, or the plan is for other queries.
      UserError: the backend cannot do what is asked for.
    """
    check_shapes(q, k, v, relative_bias)
    rows = q.shape[:2] if plan.intervals is None else plan.intervals.start.shape
    if rows[0] not in (1, q.shape[0]) or rows[1] != q.shape[1]:
        raise ValueError(f"attention: a plan for rows {rows} is not for queries {q.shape}")
    layout = _Layout.of(q, k, backend, sequence)
    if k.shape[2] % layout.num_head_parts:
        # Fewer key heads than devices: some devices hold the same.
        copies = math.lcm(k.shape[2], layout.num_head_parts) // k.shape[2]
        k, v = (jnp.repeat(a, copies, axis=2) for a in (k, v))

    def compute(q, k, v, bias, plan):
        options = {"scale": scale, "softcap": softcap, "exact": layout.ring > 1}
        kernel = kernel_for(backend, layout.kernel_queries, layout.kernel_keys, bias, **options)
        maps = jax.tree.map(lambda a: a[0, 0], plan.maps)
        if layout.ring > 1:
            return _ring(kernel, layout, q, k, v, bias, plan.intervals, maps).astype(q.dtype)
        if layout.key is not None:
            k, v = (jax.lax.all_gather(a, SEQUENCE, axis=1, tiled=True) for a in (k, v))
        intervals, shift = layout.part(plan.intervals, 0)
        return attend(kernel, q, k, v, bias, Place(intervals, jax.tree.map(lambda a: a[0], maps), shift))

    if layout.mesh is None:
        return compute(q, k, v, relative_bias, plan)
    queries = PartitionSpec(layout.batch, layout.query, layout.heads, None)
    keys = PartitionSpec(layout.batch, layout.key, layout.heads, None)
    bias = jax.tree.map(lambda a: PartitionSpec(*[None] * (a.ndim - 1), layout.heads), relative_bias)
    plans = Plan(layout.by_row(plan.intervals), jax.tree.map(lambda _: layout.found(plan.intervals), plan.maps))
    return _sharded(layout.mesh, compute, (queries, keys, keys, bias, plans), queries)(q, k, v, relative_bias, plan)


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
    return _sharded(mesh, compute, in_specs, queries)(*arrays)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where the parts of a call lie: axes of the mesh, None for what is whole on every device.

    Attributes:
      mesh: None outside `use_mesh`.
      batch: of the rows.
      heads: of query heads, and of key heads too.
      query: of the queries' positions.
      key: of the keys' positions.
      ring: parts of the keys that a device sees one after the other.
      kernel_queries: like the queries, but as long as those that the kernel sees.
      kernel_keys: like the keys, likewise.
    """

    mesh: Mesh | None
    batch: Any
    heads: str | None
    query: str | None
    key: str | None
    ring: int
    kernel_queries: jax.ShapeDtypeStruct
    kernel_keys: jax.ShapeDtypeStruct

    @classmethod
    def of(cls, q: Any, k: Any, backend: Backend, sequence: str) -> "_Layout":
        mesh = current_mesh()
        whole = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, k)]
        if mesh is None:
            return cls(None, None, None, None, None, 1, *whole)
        batch, query, heads, _ = spec(mesh, q.shape, ("batch", "length", "heads", None))
        parts = mesh.shape[SEQUENCE]
        on_tpu = backend.startswith("tpu") or (backend == "auto" and mesh.devices.flat[0].platform == "tpu")
        unit = parts * (_ALIGNMENT if on_tpu else 1)
        query = query if q.shape[1] % unit == 0 else None
        key = query if k.shape[1] % unit == 0 else None
        ring = parts if sequence == "ring" and key is not None else 1
        part = lambda a, n: jax.ShapeDtypeStruct((a.shape[0], a.shape[1] // n, *a.shape[2:]), a.dtype)  # noqa: E731
        return cls(mesh, batch, heads, query, key, ring, part(q, parts if query else 1), part(k, ring))

    @property
    def num_head_parts(self) -> int:
        return 1 if self.heads is None else self.mesh.shape[self.heads]

    def part(self, intervals: KeyIntervals | None, step: jax.Array | int) -> tuple[KeyIntervals | None, jax.Array]:
        """On a device, in a step of the ring: the queries' intervals among the keys at hand, and `Place.shift`."""
        here = 0 if self.query is None else jax.lax.axis_index(SEQUENCE)
        first_key, num_keys = jnp.int32(0), self.kernel_keys.shape[1]
        if self.ring > 1:
            first_key = (here + step) % self.ring * num_keys
            intervals = jax.tree.map(lambda a: jnp.clip(a - first_key, 0, num_keys), intervals)
        return intervals, first_key - here * self.kernel_queries.shape[1]

    def by_row(self, intervals: KeyIntervals | None) -> Any:
        """Where intervals lie."""
        return jax.tree.map(lambda a: PartitionSpec(None if len(a) == 1 else self.batch, self.query), intervals)

    def found(self, intervals: KeyIntervals | None) -> PartitionSpec:
        """Where the maps lie that are made of them."""
        same = intervals is None or len(intervals.start) == 1
        return PartitionSpec(None if same else self.batch, self.query)


def _sharded(mesh: Mesh, function: Any, in_specs: Any, out_specs: Any) -> Any:
    """The function of one device's parts, over all."""
    # Replication is by construction; the check knows no Pallas kernels.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(kernel: AttentionKernel, layout: _Layout, q, k, v, bias, intervals, maps):
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
