"""Chooses the block sizes of the TPU attention kernels by the instruction bundles of what they compile to.

    python benchmarks/tune_blocks.py                      # all chips: writes t5x_domain/kernels/tpu/block_table.py
    python benchmarks/tune_blocks.py --chips v5e v6e      # the rows of other chips stay as they are
    python benchmarks/tune_blocks.py --time               # by the clock, on the TPU of this machine

Needs libtpu (`pip install "jax[tpu]==0.11.2"`); but for --time no TPU. What counts is a bidirectional and a causal pass
over 4096 tokens with T5's bias: how many pairs of blocks lie near the diagonal and how many far from it, times the
bundles of these branches. So larger blocks, which cost less a logit, pay for what a causal mask makes them compute in
vain. Taken are the cheapest with which also the largest kernel, float32 with masks of all kinds and so with all
branches, finds room in the chip's vector memory. Shorter sequences cut the blocks down (`Blocks.fit`), hence no rows by
length.
"""

import argparse
import json
import runpy
import sys
import time
from pathlib import Path

from common import RESULTS, environment
from tpu_common import SMALLEST, compile_all

from t5x_domain.parallel.chips import CHIPS

LENGTH, HEADS = 4096, 2
# Head sizes that are measured, and those that get their blocks: 64 fills as many registers as 128, and takes as many
# bundles within 1 %.
HEAD_DIMS = {128: (64, 128), 256: (256,)}
# (queries, keys, keys computed at once), tried for both passes.
CANDIDATES = (
    (256, 512, 512),
    (512, 512, 512),
    (512, 1024, 512),
    (1024, 1024, 512),
    (1024, 1024, 1024),
)
DIRECTIONS = ("forward", "backward")
TIMED_RUNS = 20
TABLE = Path(__file__).parent.parent / "t5x_domain/kernels/tpu/block_table.py"


def one_pass(kind, head_dim, blocks, direction, largest):
    """The kernel of a direction with these blocks, and the shapes of its arguments.

    `largest` is the kernel that takes most memory: float32, and with a bias also a window, global tokens and segments.
    Otherwise it is bfloat16 and without a mask.
    """
    import dataclasses

    import jax
    import jax.numpy as jnp

    from t5x_domain.kernels.attention_kernel import Place
    from t5x_domain.kernels.attention_tpu import TpuAttention
    from t5x_domain.kernels.mask import Mask, SegmentIds, key_intervals
    from t5x_domain.kernels.relative_bias import RelativeBias
    from t5x_domain.kernels.tpu.blocks import Blocks, chip

    sizes = {head_dim: Blocks(*blocks)}
    target = dataclasses.replace(chip(kind), forward=sizes, backward=sizes)

    def run(table, ids, q, k, v, *of_output):
        bias = RelativeBias(table, bidirectional=True)
        mask, segments = Mask(window=(512, 512), global_tokens=64), SegmentIds(ids, ids)
        intervals = key_intervals(mask, LENGTH, LENGTH, segment_ids=segments) if largest else None
        kernel = TpuAttention.of(LENGTH, LENGTH, head_dim, bias, target=target)
        place = Place(intervals, kernel.maps(intervals, jnp.int32(0)), jnp.int32(0))
        return getattr(kernel, direction)(q, k, v, bias, place, *of_output)

    table, ids = jax.ShapeDtypeStruct((32, HEADS), "float32"), jax.ShapeDtypeStruct((1, LENGTH), "int32")
    heads = jax.ShapeDtypeStruct((1, LENGTH, HEADS, head_dim), "float32" if largest else "bfloat16")
    lse = jax.ShapeDtypeStruct((1, HEADS, LENGTH), "float32")
    return run, [table, ids, heads, heads, heads, *([heads, lse, heads] if direction == "backward" else [])]


def compiled_pass(devices, **arguments):
    """`one_pass` as `tpu_common.compile_all` wants it."""
    import jax

    place = jax.sharding.SingleDeviceSharding(devices[0])
    function, shapes = one_pass(devices[0].device_kind, **arguments)
    return function, [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in shapes]


def case(chip, head_dim, direction, blocks, *, largest):
    """For `tpu_common.compile_all`."""
    arguments = {"head_dim": head_dim, "blocks": blocks, "direction": direction, "largest": largest}
    return {"chip": chip, "builder": "tune_blocks:compiled_pass", "arguments": arguments}


def pairs_visited(queries, keys):
    """Pairs of blocks far from the diagonal and near it, in the mean of the two passes."""
    import jax
    import numpy as np

    jax.config.update("jax_platforms", "cpu")
    from t5x_domain.kernels.mask import BIDIRECTIONAL, CAUSAL, key_intervals
    from t5x_domain.kernels.relative_bias import RelativeBias, saturation
    from t5x_domain.kernels.tpu.block_map import NEAR, Far, block_map
    from t5x_domain.kernels.tpu.blocks import Blocks

    far = Far(*saturation(RelativeBias(np.zeros((32, HEADS)), bidirectional=True)))
    counts = np.zeros(2)
    for mask in (BIDIRECTIONAL, CAUSAL):
        intervals = key_intervals(mask, LENGTH, LENGTH)
        pairs = block_map(intervals, LENGTH // queries, LENGTH // keys, Blocks(queries, keys, keys), far=far)
        entries = np.asarray(pairs.entries)[: int(pairs.steps)]
        counts += np.bincount(entries & NEAR != 0, minlength=2)
    return counts / 2


def count_bundles(keys, candidates):
    """{(chip, head_dim, direction): {blocks: bundles of a pass}} of the candidates that compile."""
    asked = [(key, blocks) for key in keys for blocks in candidates]
    found = {key: {} for key in keys}
    reports = compile_all([case(*key, blocks, largest=False) for key, blocks in asked], bundles=True)
    for (key, blocks), report in zip(asked, reports, strict=True):
        if "error" not in report:
            (cost,) = report["kernels"].values()
            steps = zip(cost["steps"], pairs_visited(*blocks[:2]), strict=True)
            found[key][blocks] = round(sum(step["bundles"] * pairs for step, pairs in steps))
        print(*key, blocks, found[key].get(blocks, report.get("error", "")[-300:]), flush=True)
    return found


def take_times(head_dims, candidates):
    """As `count_bundles`, of the TPU at hand: seconds of a bidirectional pass."""
    import jax

    kind = jax.devices()[0].device_kind
    chip = next(name for name in SMALLEST if kind in CHIPS[name].kinds)
    found = {(chip, head_dim, direction): {} for head_dim in head_dims for direction in DIRECTIONS}
    for key, costs in found.items():
        for blocks in candidates:
            try:
                costs[blocks] = _seconds(*one_pass(kind, key[1], blocks, key[2], largest=False))
            except jax.errors.JaxRuntimeError as error:
                print(*key, blocks, "left out:", str(error)[-300:], flush=True)
    return found


def _seconds(function, shapes):
    """Of a call, the first left out."""
    import jax
    import jax.numpy as jnp

    arrays = [jnp.ones(a.shape, a.dtype) for a in shapes]
    run = jax.jit(function)
    jax.block_until_ready(run(*arrays))
    began = time.perf_counter()
    for _ in range(TIMED_RUNS):
        result = run(*arrays)
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / TIMED_RUNS


def cheapest_that_fit(found):
    """{(chip, head_dim, direction): blocks}, the cheapest with which the largest kernel compiles."""
    rankings = {key: sorted(costs, key=costs.get) for key, costs in found.items()}
    chosen = {}
    while open_keys := [key for key in rankings if key not in chosen]:
        if not all(rankings[key] for key in open_keys):
            raise SystemExit(f"no candidate fits for one of {open_keys}")
        reports = compile_all([case(*key, rankings[key][0], largest=True) for key in open_keys])
        for key, report in zip(open_keys, reports, strict=True):
            blocks = rankings[key].pop(0)
            if "error" not in report:
                chosen[key] = blocks
            print(*key, blocks, report.get("error", "fits")[-300:], flush=True)
    return chosen


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
    parser.add_argument("--chips", nargs="+", choices=SMALLEST, default=list(SMALLEST))
    parser.add_argument("--head_dims", nargs="+", type=int, choices=HEAD_DIMS, default=list(HEAD_DIMS))
    parser.add_argument("--candidates", type=json.loads, default=CANDIDATES, help="JSON list of [queries, keys, chunk]")
    parser.add_argument("--time", action="store_true", help="on the TPU of this machine (not tried on one yet)")
    parser.add_argument("--output", type=Path, default=RESULTS / "tune_blocks.json")
    flags = parser.parse_args()
    candidates = [tuple(blocks) for blocks in flags.candidates]
    if flags.time:
        unit, found = "seconds", take_times(flags.head_dims, candidates)
    else:
        keys = [(c, head_dim, d) for c in flags.chips for head_dim in flags.head_dims for d in DIRECTIONS]
        unit, found = "bundles", count_bundles(keys, candidates)
    chosen = cheapest_that_fit(found)
    rows, written = known_rows(), json.loads(flags.output.read_text()) if flags.output.exists() else {}
    for (chip, head_dim, direction), costs in found.items():
        for alike in HEAD_DIMS[head_dim]:
            rows[direction][CHIPS[chip].kinds[0], alike] = chosen[chip, head_dim, direction]
        here = written.setdefault(unit, {}).setdefault(chip, {}).setdefault(str(head_dim), {})
        here[direction] = {"x".join(map(str, blocks)): cost for blocks, cost in costs.items()}
    write_table(rows)
    written["environment"] = environment("jax", "libtpu")
    flags.output.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
