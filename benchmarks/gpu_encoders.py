"""Train steps of encoders on one accelerator: replaced-token detection, and rows of up to 16,384 tokens.

    python benchmarks/gpu_encoders.py --output=DIR [--dry]

Measured is the bare step on random tokens: seconds, tokens a second, share of the peak, memory. Run by gpu_all.sh.
`--dry` uses tiny shapes, to see on a CPU that the script works.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np
from common import environment

from t5x_domain.parallel.chips import chip_of
from t5x_domain.planning.program import load, train_step
from t5x_domain.training.state import Blueprint

DRY = {"ModelConfig.num_encoder_layers": 1, "ModelConfig.embed_dim": 32, "ModelConfig.vocab_size": 512}
_RTD = ["gin/runs/rtd.gin"]
_MLM = ["gin/runs/pretrain.gin", "gin/mixtures/mlm.gin"]
_BASE = {"MODEL": "@EncoderOnly", "ModelConfig.num_decoder_layers": 0, "BATCH_SIZE": 4}
_WINDOW = _BASE | {"ModelConfig.layer_pattern": ("local",), "ModelConfig.local_window": 128}
CASES = {
    "ELECTRA base, replaced tokens, 512": (["electra_base-like"], _RTD, 512, {"BATCH_SIZE": 128}),
    "BudgetLongformer base, replaced tokens, 4096": (["budget_longformer_base-like"], _RTD, 4096, {"BATCH_SIZE": 16}),
    "T5 base encoder, window, 16384": (["t5_1_1_base"], _MLM, 16384, _WINDOW),
    "T5 base encoder, window and transient blocks, 16384": (
        *(["t5_1_1_base"], _MLM, 16384),
        _WINDOW | {"ModelConfig.global_blocks": "transient"},
    ),
    "T5 base encoder, full attention, 16384": (["t5_1_1_base"], _MLM, 16384, _BASE),
}


def full_rows(shapes, vocab_size):
    """A batch of rows without padding, one text each, of whose tokens 15 % are chosen."""
    random = np.random.default_rng(0)
    fill = {
        "tokens": lambda shape: random.integers(3, vocab_size, shape),
        "segment_ids": np.ones,
        "positions": lambda shape: np.broadcast_to(np.arange(shape[1]), shape),
        "loss_weights": lambda shape: random.random(shape) < 0.15,
        "token_weights": np.ones,
        "component_ids": np.zeros,
    }
    kind = {name: next(end for end in fill if name.endswith(end)) for name in shapes}
    return {name: np.asarray(fill[kind[name]](leaf.shape), leaf.dtype) for name, leaf in shapes.items()}


def measure(models, runs, length, bindings, steps, dry):
    """Figures of one case."""
    settings = bindings | {"LENGTHS": {"inputs": length, "targets": 8}, "TRAIN_STEPS": 1000}
    settings |= {"ModelConfig.dtype": "bfloat16", "ModelConfig.remat": "minimal"}
    if dry:
        settings |= DRY | {"BATCH_SIZE": 2, "LENGTHS": {"inputs": 256, "targets": 8}}
    files = [f"gin/models/{name}.gin" for name in models] + ["gin/mixtures/sample.gin", *runs]
    written = [f"{name} = {value if str(value).startswith('@') else repr(value)}" for name, value in settings.items()]
    run = load(files, written)
    mesh = run.mesh.build()
    program, blueprint = train_step(run, mesh), Blueprint(run.model, run.config, mesh)
    state = blueprint.init_state(blueprint.init(0), run.updates.build(blueprint.axes))
    batch = jax.device_put(
        full_rows(program.batch, run.config.vocab_size), jax.tree.map(lambda a: a.sharding, program.batch)
    )
    began = time.perf_counter()
    state, metrics = jax.block_until_ready(program.function(state, batch))
    compile_seconds = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(steps):
        state, metrics = program.function(state, batch)
    jax.block_until_ready(metrics)
    seconds = (time.perf_counter() - began) / steps
    chip, stats = chip_of(jax.devices()[0]), jax.devices()[0].memory_stats() or {}
    return {
        "parameters": program.num_parameters,
        "rows": run.batch_size,
        "compile_seconds": compile_seconds,
        "seconds_per_step": seconds,
        "tokens_per_second": run.batch_size * run.lengths["inputs"] / seconds,
        "model_flop_utilisation": chip and program.flops / seconds / chip.flops,
        "peak_memory_bytes_so_far": stats.get("peak_bytes_in_use"),
        "loss": float(metrics["loss"]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for gpu_encoders.json")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dry", action="store_true")
    flags = parser.parse_args()
    report = {"environment": {**environment("jax", "flax"), "device": jax.devices()[0].device_kind}, "steps": {}}
    flags.output.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        try:
            report["steps"][name] = measure(*case, steps=2 if flags.dry else flags.steps, dry=flags.dry)
        except jax.errors.JaxRuntimeError as error:  # out of memory: what was measured before is kept
            report["steps"][name] = {"error": str(error)[:300]}
        print(name, json.dumps(report["steps"][name], indent=1), flush=True)
        (flags.output / "gpu_encoders.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
