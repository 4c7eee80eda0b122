"""Chooses the block sizes of the TPU attention kernels by the instruction bundles of what they compile to.

    python benchmarks/tune_blocks.py                      # all chips: writes t5x_domain/kernels/tpu/block_table.py
    python benchmarks/tune_blocks.py --chips v5e v6e      # the rows of other chips stay as they are

Needs libtpu (`pip install "jax[tpu]==0.11.2"`), no TPU. Larger blocks cost fewer bundles a logit, but more of them are
visited by a causal mask in vain; so what counts is the mean of a bidirectional and a causal pass over 4096 tokens.
Shorter sequences cut these blocks down (`Blocks.fit`), so the table has no rows by length. Blocks that do not fit into
the chip's vector memory are left out by the compiler.
"""

import argparse
import json
import math
import runpy
import sys
from pathlib import Path

from common import RESULTS, environment
from tpu_common import CHIPS, compile_all

LENGTH, HEADS = 4096, 2
HEAD_DIMS = (64, 128, 256)
# (queries, keys, keys computed at once), tried for both passes.
CANDIDATES = (
    (256, 512, 512),
    (512, 512, 512),
    (512, 1024, 512),
    (512, 1024, 1024),
    (1024, 512, 512),
    (1024, 1024, 512),
    (1024, 1024, 1024),
    (1024, 2048, 1024),
)
DIRECTIONS = ("forward", "backward")
TABLE = Path(__file__).parent.parent / "t5x_domain/kernels/tpu/block_table.py"


def with_blocks(devices, head_dim, blocks):
    """Both kernels with these blocks, compiled for pairs that need neither mask nor bias."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    from tpu_static_cost import arrays

    from t5x_domain.kernels.attention_tpu import Options, attention_tpu
    from t5x_domain.kernels.tpu.blocks import Blocks, chip

    sizes = {head_dim: Blocks(*blocks)}
    target = dataclasses.replace(chip(devices[0].device_kind), forward=sizes, backward=sizes)

    def loss(q, k, v):
        out = attention_tpu(
            q, k, v, relative_bias=None, intervals=None, shift=0, options=Options(1.0, None), target=target
        )
        return out.astype(jnp.float32).sum()

    shape = (1, LENGTH, HEADS, head_dim)
    return jax.grad(loss, (0, 1, 2)), arrays(devices, jnp.bfloat16, shape, shape, shape)


def pairs_visited(queries, keys):
    """Pairs of blocks of a bidirectional pass and of a causal one, on average."""
    rows, columns = math.ceil(LENGTH / queries), math.ceil(LENGTH / keys)
    causal = sum(min(math.ceil((row + 1) * queries / keys), columns) for row in range(rows))
    return (rows * columns + causal) / 2


def measure(chips, head_dims, candidates):
    """{chip: {head_dim: {direction: {blocks: bundles of a pass}}}} of the candidates that compile."""
    cases = [
        {
            "chip": chip,
            "builder": "tune_blocks:with_blocks",
            "arguments": {"head_dim": head_dim, "blocks": blocks},
        }
        for chip in chips
        for head_dim in head_dims
        for blocks in candidates
    ]
    found = {}
    for case, report in zip(cases, compile_all(cases, bundles=True), strict=True):
        head_dim, blocks = case["arguments"]["head_dim"], case["arguments"]["blocks"]
        here = found.setdefault(case["chip"], {}).setdefault(head_dim, {direction: {} for direction in DIRECTIONS})
        if "error" in report:
            print(case["chip"], head_dim, blocks, "left out:", report["error"][-200:], flush=True)
            continue
        for kernel, cost in report["kernels"].items():
            direction = next(d for d in DIRECTIONS if d in kernel)
            (step,) = cost["steps"]
            here[direction][tuple(blocks)] = round(step["bundles"] * pairs_visited(*blocks[:2]))
        print(case["chip"], head_dim, blocks, *[here[d][tuple(blocks)] for d in DIRECTIONS], flush=True)
    return found


def write_table(rows):
    """`rows`: {direction: {(device kind, head_dim): blocks}}."""
    text = '"""Written by benchmarks/tune_blocks.py: (queries, keys, keys at once) by (device kind, head_dim)."""\n'
    for direction in DIRECTIONS:
        lines = [f'    ("{kind}", {head_dim}): {blocks},\n' for (kind, head_dim), blocks in rows[direction].items()]
        text += f"\n{direction.upper()} = {{\n{''.join(lines)}}}\n"
    TABLE.write_text(text)


def known_rows():
    """What the table holds now."""
    names = runpy.run_path(str(TABLE)) if TABLE.exists() else {}
    return {direction: names.get(direction.upper(), {}) for direction in DIRECTIONS}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--head_dims", nargs="+", type=int, default=HEAD_DIMS)
    parser.add_argument("--candidates", type=json.loads, default=CANDIDATES, help="JSON list of [queries, keys, chunk]")
    parser.add_argument("--output", type=Path, default=RESULTS / "tune_blocks.json")
    flags = parser.parse_args()
    found, rows = measure(flags.chips, flags.head_dims, flags.candidates), known_rows()
    written = json.loads(flags.output.read_text()) if flags.output.exists() else {"bundles": {}}
    for chip, head_dims in found.items():
        for head_dim, directions in head_dims.items():
            here = written["bundles"].setdefault(chip, {}).setdefault(str(head_dim), {})
            for direction, costs in directions.items():
                rows[direction][CHIPS[chip].kind, head_dim] = min(costs, key=costs.get)
                here[direction] = {"x".join(map(str, blocks)): bundles for blocks, bundles in costs.items()}
    write_table(rows)
    written["environment"] = environment("jax", "libtpu")
    flags.output.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
