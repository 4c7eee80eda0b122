"""What XLA's TPU compiler sends when parameters are spread over a whole slice, and over a part of it.

    python benchmarks/tpu_fsdp.py

Compiles an update of four feed-forward layers of T5 XXL's widths (4,096 and 10,240, bfloat16 products of float32
parameters, recomputed in the backward pass) for 64 chips of each kind. Needs libtpu (`pip install "jax[tpu]==0.11.2"`)
and no TPU. Prints a table in Markdown.
"""

import argparse
import json
import os
from pathlib import Path

from common import RESULTS, environment

from t5x_domain.planning.topologies import Topology

LAYERS, WIDTH, MLP = 4, 4096, 10_240
ROWS, LENGTH = 4, 512  # rows of a device
SLICES = ("v5e:8x8", "v6e:8x8", "v5p:4x4x4", "tpu7x:4x4x2")
KINDS = ("all-gather", "reduce-scatter", "all-reduce")


def sent(devices, data, fsdp):
    """Bytes that a device sends at least, by kind of collective."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from t5x_domain.parallel.mesh import MeshShape
    from t5x_domain.planning.collectives import collectives
    from t5x_domain.planning.hlo import Module

    mesh = MeshShape(data=data, fsdp=fsdp).build(devices)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    places = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "fsdp", None), (None, None, "fsdp"))]

    def layer(x, kernels):
        wi, wo = (kernel.astype(jnp.bfloat16) for kernel in kernels)
        return jax.lax.with_sharding_constraint(x + jax.nn.gelu(x @ wi) @ wo, rows), None

    def loss(kernels, x):
        return jnp.square(jax.lax.scan(jax.checkpoint(layer), x, kernels)[0].astype(jnp.float32)).mean()

    def update(kernels, x):
        return jax.tree.map(lambda kernel, gradient: kernel - 0.1 * gradient, kernels, jax.grad(loss)(kernels, x))

    shapes = (LAYERS, WIDTH, MLP), (LAYERS, MLP, WIDTH)
    kernels = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    x = jax.ShapeDtypeStruct((ROWS * len(devices), LENGTH, WIDTH), jnp.bfloat16)
    step = jax.jit(update, in_shardings=(places, rows), out_shardings=places, donate_argnums=0)
    found = dict.fromkeys(KINDS, 0.0)
    for one in collectives(Module.of(step.lower(kernels, x).compile().as_text()), len(devices)):
        found[one.kind] = found.get(one.kind, 0.0) + one.bytes
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "tpu_fsdp.json")
    flags = parser.parse_args()
    os.environ.update(Topology.of(SLICES[0]).environment)  # before libtpu is loaded
    found = {}
    print("slice | data | fsdp | " + " | ".join(f"{kind} (GiB)" for kind in KINDS) + "\n" + " | ".join(["---"] * 6))
    for name in SLICES:
        devices = Topology.of(name).devices
        for data in (1, 4):
            fsdp = len(devices) // data
            found[f"{name}, data {data}, fsdp {fsdp}"] = by_kind = sent(devices, data, fsdp)
            sizes = [f"{by_kind[kind] / 2**30:.2f}" for kind in KINDS]
            print(" | ".join([name, str(data), str(fsdp), *sizes]), flush=True)
    report = {"environment": environment("jax", "libtpu"), "bytes": found}
    flags.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
