"""Where the parts of an attention call lie on a mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from t5x_domain.kernels.attention import Backend
from t5x_domain.kernels.mask import KeyIntervals
from t5x_domain.parallel.sharding import current_mesh, spec

SEQUENCE = "sequence"  # the axis of the mesh
_ALIGNMENT = 128  # positions; parts of other lengths would not meet the TPU's registers


@dataclasses.dataclass(frozen=True)
class Layout:
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
    def of(cls, q: Any, k: Any, backend: Backend, sequence: str) -> "Layout":
        """For queries [B, Sq, H, D] and keys [B, Sk, Hk, D] on the current mesh."""
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
        """Devices that share the heads."""
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


def sharded(mesh: Mesh, function: Any, in_specs: Any, out_specs: Any) -> Any:
    """The function of one device's parts, over all."""
    # Replication is by construction; the check knows no Pallas kernels.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
