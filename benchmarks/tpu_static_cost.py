"""What a step of the attention kernels costs on a TPU by its instruction bundles, against tokamax's splash attention.

    python benchmarks/tpu_static_cost.py --peer     # measures tokamax (needs tokamax==0.0.17) and ours
    python benchmarks/tpu_static_cost.py            # ours only, against the figures of tokamax in the result

Exits with 1 if a limit is passed, or a ratio has risen by more than 5 % over that in the result.

Needs libtpu (`pip install "jax[tpu]==0.11.2"`), no TPU. Counted are the bundles of one pair of blocks, without what
only the first and the last pair of a row do, brought to a pair of 512 x 512; tpu_common.py has what they say and not.
"""

import argparse
import json
import sys
from pathlib import Path

from common import RESULTS, environment
from tpu_common import compile_all

from t5x_domain.parallel.chips import CHIPS

MEASURED, HEAD_DIMS, LENGTH, HEADS = ("v5e", "v6e"), (64, 128), 4096, 2
PEER_BLOCKS = (512, 1024)
TILE = 512 * 512
# The branches of a kernel, in the order of the program (see `Settings.kinds`): pairs far from the diagonal, where the
# bias is constant, and near it; then those that need mask arithmetic.
KINDS = ("far", "near", "masked far", "masked near")
DIRECTIONS = ("forward", "backward")
# Of a pair without mask and bias to tokamax's, at the head size that splash is made for; of a near pair to a plain one.
PEER_LIMIT, PEER_LIMIT_DIM = 1.10, 128
BIAS_LIMITS = {"forward": 1.10, "backward": 1.15}
# Of 8 x 8 blocks of 1024, those that a mask leaves something of: the grid has no more steps. {name: (mask, steps)}.
STEP_BLOCKS, STEP_BLOCK = 8, 1024
STEPS = {
    "bidirectional": ({}, 8 * 8),
    "causal": ({"causal": True}, 8 * 9 // 2),
    "window 512 each side": ({"window": (512, 512)}, 3 * 8 - 2),
    "causal window 1024": ({"causal": True, "window": (1024, 0)}, 2 * 8 - 1),
}
REGRESSION_LIMIT = 1.05  # of a ratio to the same in the committed result
OUTPUT = RESULTS / "tpu_static_cost.json"


# Builders, called in the compiling process.


def arrays(devices, dtype, *shapes):
    """Abstract arrays on the first device."""
    import jax

    place = jax.sharding.SingleDeviceSharding(devices[0])
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes]


def tokamax_splash(devices, head_dim, block):
    """Forward and fused backward kernel of one head."""
    import jax
    import jax.numpy as jnp
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as splash
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")
    config = splash.SplashConfig(**{f"block_{name}": block for name in names})
    kernel = splash.make_splash_mha(masks.FullMask((4 * block, 4 * block)), config=config, q_seq_shards=1)
    gradients = jax.grad(lambda q, k, v: kernel(q, k, v).astype(jnp.float32).sum(), (0, 1, 2))
    return gradients, arrays(devices, jnp.bfloat16, *[(1, 4 * block, head_dim)] * 3)


def ours(devices, head_dim, bias, packed, length=LENGTH, heads=HEADS, blocks=None):
    """Forward and backward kernel through the entry that models call, or with the given blocks."""
    import jax
    import jax.numpy as jnp

    from t5x_domain.kernels.attention import attention
    from t5x_domain.kernels.mask import Mask, SegmentIds
    from t5x_domain.kernels.relative_bias import RelativeBias

    def loss(q, k, v, table, ids):
        out = attention(
            q,
            k,
            v,
            mask=Mask(),
            relative_bias=RelativeBias(table, bidirectional=True) if bias else None,
            segment_ids=SegmentIds(ids, ids) if packed else None,
            backend="tpu",
        )
        return out.astype(jnp.float32).sum()

    (table,) = arrays(devices, jnp.float32, (32, heads))
    (ids,) = arrays(devices, jnp.int32, (1, length))
    gradients = jax.grad(loss, (0, 1, 2, 3) if bias else (0, 1, 2))
    return gradients, [*arrays(devices, jnp.bfloat16, *[(1, length, heads, head_dim)] * 3), table, ids]


# Measuring.


def of_tile(step, size):
    """Bundles and uses of units of a step over a pair of blocks with `size` logits, brought to a tile."""
    units = {unit: round(count * TILE / size) for unit, count in step.items()}
    return {"bundles": units.pop("bundles"), "units": units}


def cases(builder, **lists):
    """Cases of all chips and head sizes, and what distinguishes them."""
    return [
        {"chip": chip, "builder": f"tpu_static_cost:{builder}", "arguments": {"head_dim": dim, **more}}
        for chip in MEASURED
        for dim in HEAD_DIMS
        for more in lists["each"]
    ]


def compiled(cases):
    """Each case with its report.

    Raises:
      SystemExit: a case does not compile.
    """
    for case, report in zip(cases, compile_all(cases, bundles=True), strict=True):
        if "error" in report:
            raise SystemExit(f"{case}: {report['error']}")
        yield case, report


def measure_peer():
    """{chip: {head_dim: {direction: cost of a tile}}} of tokamax, each at its better block."""
    peer = {}
    for case, report in compiled(cases("tokamax_splash", each=[{"block": block} for block in PEER_BLOCKS])):
        dim, block = case["arguments"]["head_dim"], case["arguments"]["block"]
        here = peer.setdefault(case["chip"], {}).setdefault(str(dim), {})
        for kernel, cost in report["kernels"].items():
            direction = "forward" if "fwd" in kernel else "backward"
            found = {"block": block, **of_tile(cost["steps"][0], block**2)}
            print(case["chip"], dim, direction, block, found["bundles"], flush=True)
            here[direction] = min(here.get(direction, found), found, key=lambda f: f["bundles"])
    return peer


def blocks_of(chip, head_dim, length):
    """{direction: our blocks}."""
    from t5x_domain.kernels.tpu.blocks import chip as known

    chip = known(CHIPS[chip].kinds[0])
    return {direction: getattr(chip, direction)[head_dim].fit(length, length) for direction in DIRECTIONS}


def measure_ours():
    """{chip: {head_dim: {direction: {kind of a pair: cost of a tile}}}}; the kind "plain" has no bias and no mask."""
    result = {}
    variants = [{"bias": False, "packed": False}, {"bias": True, "packed": True}]
    for case, report in compiled(cases("ours", each=variants)):
        dim, bias = case["arguments"]["head_dim"], case["arguments"]["bias"]
        here = result.setdefault(case["chip"], {}).setdefault(str(dim), {})
        for direction, blocks in blocks_of(case["chip"], dim, LENGTH).items():
            (steps,) = (c["steps"] for name, c in report["kernels"].items() if f"attention_{direction}" in name)
            costs = [of_tile(step, blocks.queries * blocks.keys) for step in steps]
            names = KINDS if bias else ("plain",)
            here.setdefault(direction, {}).update(zip(names, costs, strict=True))
            here[direction]["blocks"] = [blocks.queries, blocks.keys, blocks.chunk]
            print(
                case["chip"],
                dim,
                direction,
                *(f"{n} {c['bundles']}" for n, c in zip(names, costs, strict=True)),
                flush=True,
            )
    return result


def steps_taken():
    """{mask: [pairs of blocks visited, pairs in all, of the visited with mask arithmetic]} of `STEPS`."""
    import jax
    import numpy as np

    jax.config.update("jax_platforms", "cpu")
    from t5x_domain.kernels.mask import Mask, key_intervals
    from t5x_domain.kernels.tpu.block_map import PARTIAL, block_map
    from t5x_domain.kernels.tpu.blocks import Blocks

    counts = {}
    for name, (mask, _) in STEPS.items():
        intervals = key_intervals(Mask(**mask), STEP_BLOCKS * STEP_BLOCK, STEP_BLOCKS * STEP_BLOCK)
        blocks = Blocks(STEP_BLOCK, STEP_BLOCK, STEP_BLOCK)
        pairs = block_map(intervals, STEP_BLOCKS, STEP_BLOCKS, blocks, far=None)
        entries = np.asarray(pairs.entries)[: int(pairs.steps)]
        counts[name] = [int(pairs.steps), STEP_BLOCKS**2, int((entries & PARTIAL != 0).sum())]
    return counts


def ratios(peer, mine):
    """{name: ratio}: to tokamax without a bias, and of a near pair to one without a bias."""
    found = {}
    for chip, dims in mine.items():
        for dim, directions in dims.items():
            for direction, kinds in directions.items():
                plain = kinds["plain"]["bundles"]
                where = f"{chip} D={dim} {direction}"
                found[f"{where} / tokamax"] = round(plain / peer[chip][dim][direction]["bundles"], 4)
                found[f"{where} bias"] = round(kinds["near"]["bundles"] / plain, 4)
    return found


def passed_limits(ratios):
    """What is over a limit of the specification, in words."""
    for name, ratio in ratios.items():
        direction = name.split()[2]
        if name.endswith("bias"):
            limit = BIAS_LIMITS[direction]
        elif f"D={PEER_LIMIT_DIM}" in name:
            limit = PEER_LIMIT
        else:
            continue
        if ratio > limit:
            yield f"{name}: {ratio:.3f}, the limit is {limit:.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="measure tokamax as well")
    parser.add_argument("--accept", action="store_true", help="write the result even if a ratio has risen")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    flags = parser.parse_args()
    result = json.loads(flags.output.read_text()) if flags.output.exists() else {}
    if flags.peer:
        result["peer"] = {"environment": environment("jax", "libtpu", "tokamax"), "tile": measure_peer()}
    before = result.get("ratios", {})
    mine = measure_ours()
    now = ratios(result["peer"]["tile"], mine)
    for chip, dims in mine.items():
        for dim, directions in dims.items():
            for direction, kinds in directions.items():
                costs = ", ".join(f"{kind} {kinds[kind]['bundles']}" for kind in ("plain", *KINDS))
                peer = result["peer"]["tile"][chip][dim][direction]["bundles"]
                print(f"{chip:4} D={dim:3} {direction:8} {costs}; tokamax {peer}; blocks {kinds['blocks']}")
    for name, ratio in now.items():
        print(f"{name:32} {ratio:.3f}" + (f"  (was {before[name]:.3f})" if name in before else ""))
    risen = [f"{n}: {r:.3f}, was {before[n]:.3f}" for n, r in now.items() if r > REGRESSION_LIMIT * before.get(n, r)]
    steps = steps_taken()
    visited = [
        f"{n}: {steps[n][0]} pairs of blocks, not {count}" for n, (_, count) in STEPS.items() if steps[n][0] != count
    ]
    failures = [*passed_limits(now), *risen, *visited]
    if not risen or flags.accept:
        measured = {"environment": environment("jax", "libtpu"), "ratios": now, "steps": steps, "tile": mine}
        flags.output.write_text(json.dumps({"peer": result["peer"], **measured}, indent=1) + "\n")
    for failure in failures:
        print("LIMIT PASSED", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
