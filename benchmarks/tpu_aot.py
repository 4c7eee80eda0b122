"""Compiles attention, forward and backward, for every TPU at every length, and whole train steps, without a TPU.

    python benchmarks/tpu_aot.py                          # all chips, lengths and head sizes: 40 programs
    python benchmarks/tpu_aot.py --chips v5e --lengths 512 8192
    python benchmarks/tpu_aot.py --models                 # train steps instead

Needs libtpu (`pip install "jax[tpu]==0.11.2"`). Exits with 1 if something does not compile with the compiler's own
limits, keeps an array of queries times keys, or takes more memory than so many arrays of the inputs' size; if a train
step does not fit into the chip's memory or runs attention by anything but the TPU's kernels.
"""

import argparse
import json
import sys
from pathlib import Path

from common import RESULTS, environment
from tpu_common import SMALLEST, VMEM, compile_all, quadratic

from t5x_domain.parallel.chips import CHIPS

LENGTHS, HEAD_DIMS, HEADS = (512, 2048, 8192, 32768), (64, 128), 2
# Temporary arrays of [B, H, S, D] (D padded to 128) that may be alive at once, in bfloat16: q, k, v, the output and its
# gradient with heads first, the output as the model has it, q and the gradient again as parts of the backward pass, dq
# as parts and whole: 10; float32 sums of dk and dv, before and after a part, count twice: 8. Statistics of [B, H, S] in
# float32, with padded rows up to an eighth of an array, make 1 or 2 more. The rest is room for the compiler's copies.
# Arrays of S x S would pass it from 8192 on.
ARRAYS = 24
TABLES = 16 << 20  # the bias skewed for both passes, its gradient and copies of them, whatever the length
KERNELS = ("attention_forward", "attention_backward")
_ENCODER = {
    "gin_file": "gin/models/t5_1_1_base.gin",
    "model": "EncoderOnly",
    "changes": {"dtype": "bfloat16", "remat": "full", "num_decoder_layers": 0},
    "lengths": {"encoder": 16384},
}
MODELS = {
    "T5 XL, 512 / 512 tokens": {
        "chip": "v5e",
        "topology": "v5e:4x4",
        "arguments": {
            "gin_file": "gin/models/t5_1_1_xl.gin",
            "model": "EncoderDecoder",
            "changes": {"dtype": "bfloat16", "remat": "minimal"},
            "mesh": {"fsdp": 16},
            "batch_size": 64,
            "lengths": {"encoder": 512, "decoder": 512},
        },
    },
    "T5 base encoder, 16384 tokens": {
        "chip": "v5e",
        "topology": "v5e:2x2",
        "arguments": _ENCODER | {"mesh": {"data": 4}, "batch_size": 4},
    },
} | {
    f"T5 base encoder, 16384 tokens on 4 devices, {way}": {
        "chip": "v5e",
        "topology": "v5e:2x2",
        "arguments": _ENCODER
        | {"changes": _ENCODER["changes"] | {"sequence_attention": way}, "mesh": {"sequence": 4}, "batch_size": 1},
    }
    for way in ("gather", "ring")
}
_LONG = {
    "gin_file": "gin/models/budget_longformer_base-like.gin",
    "model": "ReplacedTokenDetection",
    "changes": {"dtype": "bfloat16", "remat": "full"},
    "mesh": {"data": 4},
    "batch_size": 4,
    "lengths": {"encoder": 4096},
}
MODELS |= {
    name: {"chip": "v5e", "topology": "v5e:2x2", "arguments": _LONG | arguments}
    for name, arguments in {
        "BudgetLongformer base, replaced tokens, 4096 tokens": {},
        "BudgetLongformer base, 32768 tokens": {
            "model": "EncoderOnly",
            "changes": _LONG["changes"] | {"position": "relative_bias"},
            "lengths": {"encoder": 32768},
        },
        "T5 base encoder in windows with transient blocks, 32768 tokens": _ENCODER
        | {
            "changes": _ENCODER["changes"]
            | {"layer_pattern": ("local",), "local_window": 128, "global_blocks": "transient"},
            "lengths": {"encoder": 32768},
        },
    }.items()
}


def train_step(devices, gin_file, model, changes, mesh, batch_size, lengths):
    """The trainer's own update, with Adafactor, as `tpu_common.compile_all` wants it."""
    import dataclasses
    import functools

    import gin
    import jax
    import jax.numpy as jnp
    import numpy as np

    from t5x_domain.models import assemblies, rtd
    from t5x_domain.models.config import ModelConfig
    from t5x_domain.objectives.losses import language_model_loss
    from t5x_domain.objectives.rtd import replaced_token_detection_loss
    from t5x_domain.parallel.mesh import AXES
    from t5x_domain.parallel.sharding import sharding
    from t5x_domain.training.optimizer import Adafactor, Updates
    from t5x_domain.training.schedule import constant
    from t5x_domain.training.state import Blueprint
    from t5x_domain.training.step import make_train_step

    gin.parse_config_file(str(Path(__file__).parent.parent / gin_file))
    config = dataclasses.replace(ModelConfig(), **changes)
    mesh = jax.sharding.Mesh(np.asarray(devices).reshape([mesh.get(axis, 1) for axis in AXES]), AXES)
    detects = model == "ReplacedTokenDetection"
    plan = Blueprint(getattr(rtd if detects else assemblies, model), config, mesh)
    loss = replaced_token_detection_loss if detects else language_model_loss
    transform = Updates(Adafactor(), constant(0.01)).build(plan.axes)
    step = make_train_step(plan, functools.partial(loss, num_components=1), transform, seed=0)
    side = plan.model_class.target_side
    sides = {name: name.partition("_")[0] for name in plan.model_class.inputs}
    sides |= dict.fromkeys((f"{side}_target_tokens", f"{side}_loss_weights", "component_ids"), side)
    sides |= {f"{side}_token_weights": side} if detects else {}

    def feature(name, side):
        shape, dtype = (batch_size, lengths[side]), jnp.float32 if "weights" in name else jnp.int32
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, shape, ("batch", "length")))

    batch = {name: feature(name, side) for name, side in sides.items()}
    return step, (plan.abstract_state(transform), batch), mesh


def kernel_cases(chips, lengths, head_dims):
    """The shortest and the longest first: what fails, fails there."""
    lengths = sorted(lengths, key=lambda n: (n not in (min(lengths), max(lengths)), n))
    return [
        {
            "chip": chip,
            "builder": "tpu_static_cost:ours",
            "arguments": {"head_dim": dim, "bias": True, "packed": True, "length": length, "heads": HEADS},
        }
        for length in lengths
        for dim in head_dims
        for chip in chips
    ]


def kernel_report(case, report):
    """One line of the result."""
    arguments = case["arguments"]
    found = {"chip": case["chip"], "length": arguments["length"], "head_dim": arguments["head_dim"]}
    if "error" in report:
        return found | {"error": report["error"]}
    array = 2 * HEADS * arguments["length"] * max(arguments["head_dim"], 128)
    return found | {
        "seconds": report["seconds"],
        "temporary_bytes": report["memory"]["temp"],
        "temporary_bytes_limit": ARRAYS * array + TABLES,
        "largest_buffers": report["buffers"][:3],
        "quadratic_buffers": quadratic(report["buffers"], arguments["length"]),
        "scoped_vmem": report["vmem"],
    }


def model_report(case, report):
    """As `kernel_report`, of a train step."""
    found = {key: case[key] for key in ("chip", "topology", "arguments")}
    if "error" in report:
        return found | {"error": report["error"]}
    memory = report["memory"]
    # No size of these models is that of a sequence or of a device's part of it.
    parts = case["arguments"]["mesh"].get("sequence", 1)
    lengths = {length // n for length in case["arguments"]["lengths"].values() for n in (1, parts)}
    return found | {
        "seconds": report["seconds"],
        "memory": memory,
        "device_bytes": sum(memory.values()) - 2 * memory["alias"],
        "largest_buffers": report["buffers"][:5],
        "quadratic_buffers": [b for b in report["buffers"] if sum(n in lengths for n in b[2]) > 1],
        "scoped_vmem": report["vmem"],
    }


def failures(results):
    """What must not be, in words; `results` by name."""
    for name, r in results.items():
        if "error" in r:
            yield f"{name}: {r['error'][-600:]}"
            continue
        vmem, hbm = VMEM[r["chip"]], CHIPS[r["chip"]].hbm_bytes
        if r["quadratic_buffers"]:
            yield f"{name}: arrays of queries times keys {r['quadratic_buffers']}"
        if over := {kernel: n for kernel, n in r["scoped_vmem"].items() if n > vmem}:
            yield f"{name}: kernels ask for more VMEM than there is {over}"
        if missing := [kernel for kernel in KERNELS if not any(kernel in found for found in r["scoped_vmem"])]:
            yield f"{name}: without the kernels {', '.join(missing)}"
        if r.get("temporary_bytes", 0) > r.get("temporary_bytes_limit", 0):
            yield f"{name}: {r['temporary_bytes']} temporary bytes, not linear in the length"
        if r.get("device_bytes", 0) > hbm:
            yield f"{name}: {r['device_bytes']} bytes on a device of {hbm}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=SMALLEST, default=list(SMALLEST))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--head_dims", nargs="+", type=int, default=HEAD_DIMS)
    parser.add_argument("--models", action="store_true", help="whole train steps instead of attention alone")
    parser.add_argument("--output", type=Path, default=RESULTS / "tpu_aot.json")
    flags = parser.parse_args()
    written = json.loads(flags.output.read_text()) if flags.output.exists() else {}
    # What is not compiled now stays in the result as it was.
    results = written.setdefault("models" if flags.models else "attention", {})
    if flags.models:
        cases = [{"builder": "tpu_aot:train_step", **case} for case in MODELS.values()]
        names, to_result = list(MODELS), model_report
    else:
        cases = kernel_cases(flags.chips, flags.lengths, flags.head_dims)
        names = ["{chip} S={arguments[length]} D={arguments[head_dim]}".format(**case) for case in cases]
        to_result = kernel_report
    for name, case, report in zip(names, cases, compile_all(cases), strict=True):
        results[name] = to_result(case, report)
        print(name, json.dumps(results[name]), flush=True)
        written["environment"] = environment("jax", "libtpu")
        flags.output.write_text(json.dumps(written, indent=1) + "\n")
    failed = list(failures(results))
    for failure in failed:
        print("FAILED", failure)
    print(f"{len(results)} programs, {len(failed)} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
