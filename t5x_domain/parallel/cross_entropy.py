"""Cross-entropy over a mesh: each device takes its own positions, and its part of the vocabulary.

The output embedding is gathered once and its gradient summed once, however many chunks a device takes. Left to the
compiler, both happen in every chunk.
"""

import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec

from t5x_domain.kernels import cross_entropy as kernels
from t5x_domain.parallel.sharding import current_mesh, spec


def cross_entropy(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, **options: Any
) -> tuple[jax.Array, kernels.TokenScores]:
    """`kernels.cross_entropy.cross_entropy` of arrays on the current mesh; `chunk_tokens` are a device's own."""
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return kernels.cross_entropy(hidden, kernel, targets, weights, **options)
    rows = spec(mesh, targets.shape, ("batch", "length"))
    vocab, embed = spec(mesh, kernel.shape, ("vocab", "embed"))
    positions = tuple(axis for axes in rows if axes for axis in ((axes,) if isinstance(axes, str) else axes))
    if embed not in positions:  # its parts would all be gradients of the same rows
        embed = None
    compute = functools.partial(
        kernels.cross_entropy, axes=kernels.Axes(positions=positions, vocab=vocab, embed=embed), **options
    )
    in_specs = PartitionSpec(*rows, None), PartitionSpec(vocab, embed), rows, rows
    out_specs = PartitionSpec(), kernels.TokenScores(rows, rows)
    # Replication is checked: gradients rely on it, each device's being whole and not a part to be added up.
    return jax.shard_map(compute, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(hidden, kernel, targets, weights)
