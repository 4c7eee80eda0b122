"""Rules that map the named axes of parameters and activations to the mesh. One device and a pod run the same code."""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_domain.errors import UserError

# Parameters shard their `embed` axis over fsdp; activations keep theirs whole, hence the two names.
RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("slice", "data", "fsdp"),
    "length": "sequence",
    "embed_activation": None,
    "vocab": "tensor",
    "positions": None,
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "relative_bias_buckets": None,
    "norm": None,
    "layers": None,
}
_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """While active, `constrain` places activations on `mesh`, and attention runs over it."""
    token = _MESH.set(mesh)
    try:
        yield
    finally:
        _MESH.reset(token)


def current_mesh() -> Mesh | None:
    """The mesh of `use_mesh`; None outside."""
    return _MESH.get()


def spec(mesh: Mesh, shape: tuple[int, ...], names: tuple[str | None, ...]) -> PartitionSpec:
    """Mesh axes for an array whose axes have these names.

    An axis that the mesh axes do not divide stays whole: 6 heads on tensor=4, say, or a batch of 1.
    """
    axes = []
    for size, name in zip(shape, names, strict=True):
        rule = None if name is None else RULES[name]
        parts = 1
        for axis in (rule,) if isinstance(rule, str) else rule or ():
            parts *= mesh.shape[axis]
        axes.append(rule if parts > 1 and size % parts == 0 else None)
    return PartitionSpec(*axes)


def batch_shares(mesh: Mesh) -> int:
    """Parts into which the mesh cuts a batch."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def process_share(mesh: Mesh) -> tuple[int, int]:
    """(i, n): this process's devices hold the i-th of n parts of every batch.

    Processes among which only the sequence or matrix products are divided hold the same part. Where a process's rows
    do not lie side by side, its part stands there all the same: a batch has the same rows, in another order.

    Raises:
      UserError: processes hold rows in common and others not.
    """
    shape = (batch_shares(mesh),)
    rows: dict[int, set[int]] = {}
    for device, (index,) in sharding(mesh, shape, ("batch",)).devices_indices_map(shape).items():
        rows.setdefault(device.process_index, set()).add(index.indices(shape[0])[0])
    parts = sorted({tuple(sorted(held)) for held in rows.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != shape[0]:
        raise UserError(
            f"mesh {dict(mesh.shape)}: the {len(rows)} processes hold overlapping parts of a batch; choose "
            "MeshShape.sequence and .tensor so that their product divides a process's devices or is a multiple."
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks the compiler to keep activation `x` where the rules put it; does nothing outside `use_mesh`."""
    mesh = _MESH.get()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(mesh, x.shape, names)))


def sharding(mesh: Mesh, shape: tuple[int, ...], names: tuple[str | None, ...]) -> NamedSharding:
    """The sharding of a parameter whose axes have these names."""
    return NamedSharding(mesh, spec(mesh, shape, names))


def put(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Features of a whole batch, [B] or [B, T] each, on the mesh."""
    places = {name: sharding(mesh, value.shape, ("batch", "length")[: value.ndim]) for name, value in batch.items()}
    return jax.device_put(dict(batch), places)
