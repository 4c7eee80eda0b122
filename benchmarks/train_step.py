"""Tokens per second of the full trainer, of the bare jitted step and of torch, on the same shapes in the same run.

    python benchmarks/train_step.py --torch_python=PATH

T5 1.1 small in float32, batch 8, 512 inputs and 114 targets. PATH is a Python with torch and transformers; without it
torch is left out. Rounds interleave everything, so that a change of the machine's load meets all alike; ratios are
taken within rounds. Also: model FLOPs against the rate of a plain float32 matrix product, and compile time of 24 + 24
layers against 4 + 4.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from common import RESULTS, environment

from t5x_domain import cli

BATCH_SIZE, LENGTHS = 8, {"inputs": 512, "targets": 114}
TOKENS = BATCH_SIZE * sum(LENGTHS.values())


def configure(folder, steps):
    """Loads the run that is measured: gin files as a user names them, checkpoint and evaluation at the end only."""
    bindings = {
        "RUN_DIR": repr(f"{folder}/run{steps}"),
        "CACHE_DIR": repr(f"{folder}/cache"),
        "VOCABULARY_FILE": repr(f"{folder}/cache/vocabulary.model"),
        "ModelConfig.dtype": "'float32'",
        "TRAIN_STEPS": steps,
        "BATCH_SIZE": BATCH_SIZE,
        "LENGTHS": LENGTHS,
        "Run.log_every": steps // 2,
        "Run.eval_batches": 1,
    }
    files = ["gin/models/t5_1_1_small.gin", "gin/mixtures/sample.gin", "gin/runs/pretrain.gin"]
    cli.load_gin(files, [f"{name} = {value}" for name, value in bindings.items()])


def seconds_each(step, count):
    """Mean seconds of `count` calls that follow one another on the device."""
    began = time.perf_counter()
    for _ in range(count):
        last = step()
    jax.block_until_ready(last)
    return (time.perf_counter() - began) / count


def matmul_rate():
    """FLOP/s of a jitted float32 product of 2048 x 2048 matrices."""
    a = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    return 2 * 2048**3 / seconds_each(lambda: product(a, a), 8)


class BareStep:
    """The jitted update on one batch that stays on the device."""

    def __init__(self, run):
        from t5x_domain.training.feed import Feed
        from t5x_domain.training.state import Blueprint
        from t5x_domain.training.step import make_train_step

        feed = Feed(run, run.mesh.build())
        plan = Blueprint(run.model, run.config, run.mesh.build())
        transform = run.updates.build(plan.axes)
        self.step = make_train_step(plan, feed.loss, transform, seed=0)
        self.state = plan.init_state(plan.init(0), transform)
        self.batch = feed.put(feed.batches[0])
        self()

    def __call__(self):
        self.state, metrics = self.step(self.state, self.batch)
        return metrics


def trainer_seconds(folder, steps):
    """Seconds a step of the whole trainer on the real cache, from what it logs itself after the first half."""
    from t5x_domain.training.loop import train
    from t5x_domain.training.run import Run

    configure(folder, steps)
    run = dataclasses.replace(cli.build(Run), run_dir=tempfile.mkdtemp(dir=folder))
    train(run)
    line = json.loads((Path(run.run_dir) / "metrics.jsonl").read_text().splitlines()[-1])
    return TOKENS / line["tokens_per_second"]


def torch_seconds(python, steps):
    """Seconds a step of transformers' T5."""
    command = [python, str(Path(__file__).parent / "torch_t5.py"), f"--steps={steps}", "--warmup=1"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return statistics.median(json.loads(answer.splitlines()[-1])["seconds_per_step"])


def compile_seconds(layers):
    """Seconds to trace and compile the update of a model of this depth, both stacks."""
    from t5x_domain.models.assemblies import EncoderDecoder
    from t5x_domain.models.config import ModelConfig
    from t5x_domain.objectives.losses import language_model_loss
    from t5x_domain.parallel.mesh import MeshShape
    from t5x_domain.training.optimizer import Adafactor, Updates
    from t5x_domain.training.schedule import constant
    from t5x_domain.training.state import Blueprint
    from t5x_domain.training.step import make_train_step

    depth = {"num_encoder_layers": layers, "num_decoder_layers": layers}
    config = ModelConfig(vocab_size=512, embed_dim=256, mlp_dim=512, dtype="float32", **depth)
    plan = Blueprint(EncoderDecoder, config, MeshShape().build())
    transform = Updates(Adafactor(), constant(0.1)).build(plan.axes)
    step = make_train_step(plan, functools.partial(language_model_loss, num_components=1), transform, seed=0)
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    names = [*EncoderDecoder.inputs, "decoder_target_tokens", "component_ids"]
    batch = {name: tokens for name in names} | {"decoder_loss_weights": jax.ShapeDtypeStruct((2, 64), jnp.float32)}
    began = time.perf_counter()
    step.lower(plan.abstract_state(transform), batch).compile()
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch_python", help="a Python with torch and transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="steps of each kind in a round, an even number")
    parser.add_argument("--output", type=Path, default=RESULTS / "train_step.json")
    flags = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        configure(folder, flags.steps)
        from t5x_domain.data.preparation import prepare
        from t5x_domain.models.flops import train_step_flops
        from t5x_domain.training.run import Run

        cli.build(prepare)
        run = cli.build(Run)
        bare = BareStep(run)
        flops = train_step_flops(run.model, run.config, BATCH_SIZE, LENGTHS)
        rounds = []
        for _ in range(flags.rounds):
            figures = {"matmul_flops_per_second": matmul_rate(), "bare_seconds": seconds_each(bare, flags.steps)}
            figures["trainer_seconds"] = trainer_seconds(folder, flags.steps)
            if flags.torch_python:
                figures["torch_seconds"] = torch_seconds(flags.torch_python, flags.steps)
                figures["times_torch"] = figures["torch_seconds"] / figures["trainer_seconds"]
            figures["trainer_over_bare"] = figures["trainer_seconds"] / figures["bare_seconds"]
            figures["share_of_matmul_rate"] = flops / figures["bare_seconds"] / figures["matmul_flops_per_second"]
            figures["compile_24_over_4"] = compile_seconds(24) / compile_seconds(4)
            rounds.append(figures)
            print({name: float(f"{value:.4g}") for name, value in figures.items()}, flush=True)
    for figures in rounds:
        figures["trainer_tokens_per_second"] = TOKENS / figures["trainer_seconds"]
    median = {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}
    report = {"environment": environment("jax", "flax", "optax"), "flops": flops, "median": median, "rounds": rounds}
    flags.output.write_text(json.dumps(report, indent=1) + "\n")
    print("\n" + ", ".join(f"{name} {value}" for name, value in report["environment"].items()))
    for name, value in median.items():
        spread = [figures[name] for figures in rounds]
        print(f"{name:28} {value:14.4g}   ({min(spread):.4g} … {max(spread):.4g})")


if __name__ == "__main__":
    main()
