"""Compiles attention, forward and backward, for every TPU at every length, and whole train steps, without a TPU.

    python benchmarks/tpu_aot.py                          # all chips, lengths and head sizes: 40 programs
    python benchmarks/tpu_aot.py --chips v5e --lengths 512 8192
    python benchmarks/tpu_aot.py --models                 # train steps instead

Needs libtpu (`pip install "jax[tpu]==0.11.2"`). Exits with 1 if something does not compile with the compiler's own
limits, keeps an array that grows with the square of the length, or takes memory that grows faster than the length.
"""

import argparse
import json
import sys
from pathlib import Path

from common import RESULTS, environment
from tpu_common import CHIPS, compile_all, quadratic

LENGTHS, HEAD_DIMS, HEADS = (512, 2048, 8192, 32768), (64, 128), 2
# From the length at which padding and tables no longer count; memory of a token may grow by so much.
LINEAR_FROM, LINEAR_LIMIT = 8192, 1.05
MODELS = {
    "T5 XL, 512 / 512 tokens": {
        "chip": "v5p",
        "topology": "v5p:2x2x1",
        "arguments": {
            "gin_file": "gin/models/t5_1_1_xl.gin",
            "model": "EncoderDecoder",
            "changes": {"dtype": "bfloat16", "remat": "minimal"},
            "mesh": {"fsdp": 4},
            "batch_size": 32,
            "lengths": {"encoder": 512, "decoder": 512},
        },
    },
    "T5 base encoder, 16384 tokens": {
        "chip": "v5e",
        "topology": "v5e:2x2",
        "arguments": {
            "gin_file": "gin/models/t5_1_1_base.gin",
            "model": "EncoderOnly",
            "changes": {"dtype": "bfloat16", "remat": "full", "num_decoder_layers": 0},
            "mesh": {"data": 4},
            "batch_size": 4,
            "lengths": {"encoder": 16384},
        },
    },
}


def train_step(devices, gin_file, model, changes, mesh, batch_size, lengths):
    """The trainer's own update, with Adafactor, as `tpu_common.compile_all` wants it."""
    import dataclasses
    import functools

    import gin
    import jax
    import jax.numpy as jnp
    import numpy as np

    from t5x_domain.models import assemblies
    from t5x_domain.models.config import ModelConfig
    from t5x_domain.objectives.losses import language_model_loss
    from t5x_domain.parallel.mesh import AXES
    from t5x_domain.parallel.sharding import batch_sharding
    from t5x_domain.training.optimizer import Adafactor, Updates
    from t5x_domain.training.schedule import constant
    from t5x_domain.training.state import Blueprint
    from t5x_domain.training.step import make_train_step

    gin.parse_config_file(str(Path(__file__).parent.parent / gin_file))
    config = dataclasses.replace(ModelConfig(), **changes)
    sizes = [mesh.get(axis, 1) for axis in AXES]
    mesh = jax.sharding.Mesh(np.asarray(devices).reshape(sizes), AXES)
    plan = Blueprint(getattr(assemblies, model), config, mesh)
    transform = Updates(Adafactor(), constant(0.01)).build(plan.axes)
    step = make_train_step(plan, functools.partial(language_model_loss, num_components=1), transform, seed=0)
    side = plan.model_class.target_side
    names = {name: name.partition("_")[0] for name in plan.model_class.inputs}
    names |= dict.fromkeys((f"{side}_target_tokens", f"{side}_loss_weights", "component_ids"), side)
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, lengths[side]), jnp.float32 if "weights" in name else jnp.int32)
        for name, side in names.items()
    }
    places = batch_sharding(mesh, batch)
    batch = {key: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=places[key]) for key, a in batch.items()}
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
    return found | {
        "seconds": report["seconds"],
        "temporary_bytes": report["memory"]["temp"],
        "largest_buffers": report["buffers"][:3],
        "quadratic_buffers": quadratic(report["buffers"], arguments["length"]),
        "scoped_vmem": report["vmem"],
    }


def model_report(case, report):
    """As `kernel_report`, of a train step."""
    found = {key: case[key] for key in ("chip", "topology", "arguments")}
    if "error" in report:
        return found | {"error": report["error"]}
    return found | {key: report[key] for key in ("seconds", "memory")} | {"largest_buffers": report["buffers"][:5]}


def kernel_failures(results):
    """What must not be, in words; `results` by name."""
    for name, r in results.items():
        if "error" in r:
            yield f"{name}: {r['error'][-600:]}"
            continue
        if r["quadratic_buffers"]:
            yield f"{name}: arrays of queries times keys {r['quadratic_buffers']}"
        if over := {k: n for k, n in r["scoped_vmem"].items() if n > CHIPS[r["chip"]].vmem}:
            yield f"{name}: kernels ask for more VMEM than there is {over}"
        for other, s in results.items():
            same = (s["chip"], s["head_dim"]) == (r["chip"], r["head_dim"])
            if same and "error" not in s and LINEAR_FROM <= s["length"] < r["length"]:
                growth = r["temporary_bytes"] / r["length"] / (s["temporary_bytes"] / s["length"])
                if growth > LINEAR_LIMIT:
                    yield f"{name}: {growth:.2f} times the memory of a token of {other}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
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
    failed = [f"{name}: {r['error'][-600:]}" for name, r in results.items() if "error" in r]
    failures = failed if flags.models else list(kernel_failures(results))
    for failure in failures:
        print("FAILED", failure)
    print(f"{len(results)} programs, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
