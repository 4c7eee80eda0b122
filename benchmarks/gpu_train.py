"""T5 base in bfloat16 on one accelerator: what it learns and writes a second, and its share of the peak.

    python benchmarks/gpu_train.py --output=DIR [--dry]

Measured are the bare step, the trainer, and greedy decoding of what was trained last. Run by gpu_all.sh. `--dry` uses
tiny shapes, to see on a CPU that the script works.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from common import environment
from decode import MAX_TOKENS, ours

from t5x_domain import cli
from t5x_domain.models.flops import train_step_flops
from t5x_domain.parallel.chips import chip_of

LENGTHS = {"inputs": 512, "targets": 114}
DRY = {"ModelConfig.num_encoder_layers": 1, "ModelConfig.num_decoder_layers": 1, "ModelConfig.embed_dim": 32}


def configure(folder, batch_size, steps, dry):
    """The run of this batch size."""
    bindings = {
        "RUN_DIR": repr(f"{folder}/run{batch_size}"),
        "CACHE_DIR": repr(f"{folder}/cache"),
        "VOCABULARY_FILE": repr(f"{folder}/cache/vocabulary.model"),
        "TRAIN_STEPS": steps,
        "BATCH_SIZE": batch_size,
        "LENGTHS": LENGTHS,
        "Run.log_every": steps // 2,
        "Run.eval_batches": 1,
        **(DRY if dry else {}),
    }
    files = ["gin/models/t5_1_1_base.gin", "gin/mixtures/sample.gin", "gin/runs/pretrain.gin"]
    cli.load_gin(files, [f"{name} = {value}" for name, value in bindings.items()])


def measure(folder, batch_size, steps, dry):
    """Figures of the bare step and of the trainer at one batch size."""
    from t5x_domain.data.preparation import prepare
    from t5x_domain.training.feed import Feed
    from t5x_domain.training.loop import train
    from t5x_domain.training.run import Run
    from t5x_domain.training.state import Blueprint
    from t5x_domain.training.step import make_train_step

    configure(folder, batch_size, steps, dry)
    cli.build(prepare)
    run = cli.build(Run)
    mesh = run.mesh.build()
    feed, plan = Feed(run, mesh), Blueprint(run.model, run.config, mesh)
    transform = run.updates.build(plan.axes)
    step = make_train_step(plan, feed.loss, transform, seed=0)
    state, batch = plan.init_state(plan.init(0), transform), feed.put(feed.batches[0])
    began = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    compile_seconds = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    seconds = (time.perf_counter() - began) / steps
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    del state
    train(run)
    line = json.loads((Path(run.run_dir) / "metrics.jsonl").read_text().splitlines()[-1])
    flops, chip = train_step_flops(run.model, run.config, batch_size, LENGTHS), chip_of(jax.devices()[0])
    return {
        "batch_size": batch_size,
        "parameters": plan.num_parameters,
        "compile_seconds": compile_seconds,
        "seconds_per_step": seconds,
        "tokens_per_second": batch_size * sum(LENGTHS.values()) / seconds,
        "trainer_tokens_per_second": line["tokens_per_second"],
        "model_flops_per_second": flops / seconds,
        "model_flop_utilisation": chip and flops / seconds / chip.flops,
        "peak_memory_bytes": memory,
        "loss": line["loss"],
    }


def written(run_dir, batch_sizes):
    """Tokens a second that a run writes, greedily, after inputs of 128 random tokens; by batch size."""
    from t5x_domain.inference.opened import open_model

    model, random, rates = open_model(run_dir), np.random.default_rng(0), {}
    for size in batch_sizes:
        inputs = list(random.integers(3, model.vocabulary.vocab_size, (size, 128)).astype(np.int32))
        seconds, _ = ours(model, inputs, {"batch_size": size, "num_beams": 1}, repeats=3)
        rates[size] = MAX_TOKENS * size / statistics.median(seconds)
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for gpu_train.json")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dry", action="store_true")
    flags = parser.parse_args()
    sizes, steps = ([2], 2) if flags.dry else (flags.batch_sizes, flags.steps)
    report = {"environment": {**environment("jax", "flax"), "device": jax.devices()[0].device_kind}, "runs": []}
    flags.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for batch_size in sizes:
            try:
                report["runs"].append(measure(folder, batch_size, steps, flags.dry))
            except jax.errors.JaxRuntimeError as error:  # out of memory: what was measured before is kept
                report["runs"].append({"batch_size": batch_size, "error": str(error)[:300]})
            print(json.dumps(report["runs"][-1], indent=1), flush=True)
            (flags.output / "gpu_train.json").write_text(json.dumps(report, indent=1) + "\n")
        trained = [run["batch_size"] for run in report["runs"] if "error" not in run]
        if trained:
            report["decoding_tokens_per_second"] = written(
                f"{folder}/run{trained[-1]}", [8] if flags.dry else [8, 32, 128]
            )
            print(report["decoding_tokens_per_second"])
            (flags.output / "gpu_train.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
