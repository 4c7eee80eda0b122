"""What the benchmarks of training share: the machine, the run, the step by itself, and the arithmetic a step needs."""

import contextlib
import datetime
import functools
import importlib.metadata
import io
import json
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from t5x_domain import cli
from t5x_domain.training.loop import train
from t5x_domain.training.metrics import read_json_lines
from t5x_domain.training.run import Run
from t5x_domain.training.state import Blueprint
from t5x_domain.training.step import make_train_step

ROOT = Path(__file__).parent.parent
VOCAB_SIZE_OF_DATA = 32_000  # random ids stay below T5's sentinels


def environment(*packages):
    """Hardware, the date and versions."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": cpu.partition(":")[2].strip() or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def write_report(path, report):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=1) + "\n")


def training_flops(config, rows, inputs, targets):
    """Floating-point operations of forward and backward of an encoder-decoder, by formula.

    A multiplication and an addition count as two; matrix products alone count, attention's own among them as if nothing
    was masked, and the backward pass twice the forward one (Chowdhery et al. 2022, appendix B).
    """
    heads, kv_heads = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    project = lambda queries, keys: 2 * config.embed_dim * (2 * heads * queries + 2 * kv_heads * keys)  # noqa: E731
    attend = lambda queries, keys: 4 * heads * queries * keys  # noqa: E731
    mlp = 2 * (len(config.mlp_activations) + 1) * config.embed_dim * config.mlp_dim
    encoder_layer = project(inputs, inputs) + attend(inputs, inputs) + mlp * inputs
    decoder_layer = project(targets, targets) + attend(targets, targets) + mlp * targets
    decoder_layer += project(targets, inputs) + attend(targets, inputs)
    logits = 2 * targets * config.embed_dim * config.vocab_size
    layers = config.num_encoder_layers * encoder_layer + config.num_decoder_layers * decoder_layer
    return 3 * rows * (layers + logits)


def load_run(gin_files, bindings):
    """The run that gin describes; reads nothing yet."""
    cli.load_gin(gin_files, bindings)
    return cli.build(Run)


def full_batch(run):
    """A batch of random tokens without padding, on the device."""
    rng, batch = np.random.default_rng(0), {}
    for side, length in (("encoder", run.lengths["inputs"]), ("decoder", run.lengths["targets"])):
        shape = (run.batch_size, length)
        batch[f"{side}_input_tokens"] = rng.integers(1, VOCAB_SIZE_OF_DATA, shape, np.int32) % run.config.vocab_size
        batch[f"{side}_segment_ids"] = np.ones(shape, np.int32)
        batch[f"{side}_positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    batch["decoder_target_tokens"] = np.roll(batch["decoder_input_tokens"], -1, axis=1)
    batch["decoder_loss_weights"] = np.ones(shape, np.float32)
    batch["corpus_ids"] = np.zeros(shape, np.int32)
    return jax.device_put(batch)


class BareStep:
    """The trainer's update on a batch that stays on the device: no data, no metrics, no checkpoints."""

    def __init__(self, run):
        """Compiles."""
        mesh = run.mesh.build()
        self.blueprint = Blueprint(run.model, run.config, mesh)
        self.transform = run.updates.build(self.blueprint.axes)
        self.loss = functools.partial(run.loss, num_corpora=len(run.mixture.components))
        self.batch = full_batch(run)
        self.state = self.blueprint.init_state(self.blueprint.init(run.seed), self.transform)
        step = make_train_step(self.blueprint, self.loss, self.transform, seed=run.seed)
        start = time.perf_counter()
        self._step = step.lower(self.state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - start

    def seconds(self, steps, warm_up=1):
        """Seconds per step, each step waited for after the next one is given to the device, as in the trainer."""
        for _ in range(warm_up):
            self.state, metrics = self._step(self.state, self.batch)
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        for _ in range(steps):
            before = metrics
            self.state, metrics = self._step(self.state, self.batch)
            before["loss"].block_until_ready()
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / steps


def matmul_flops_per_second(size, dtype, repeats=10):
    """Rate of a plain jitted matrix product: the fastest of `repeats`, which is what the machine can do undisturbed."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)
    product(x, x).block_until_ready()
    return 2 * size**3 / min(seconds_of(product, x, x) for _ in range(repeats))


def seconds_of(function, *arguments):
    """Wall time of one call until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


class LogTimes(io.TextIOBase):
    """Standard output that notes when the trainer printed each logged step."""

    def __init__(self):
        self.at = {}

    def write(self, text):
        if text.startswith("step ") and "tokens/s" in text:
            self.at[int(text.split()[1].partition("/")[0].replace(",", ""))] = time.perf_counter()
        return len(text)


def trainer_seconds(run):
    """Seconds per step of the whole trainer between logged steps, without the first, which compiles; and its rates."""
    with contextlib.redirect_stdout(LogTimes()) as log:
        train(run)
    steps = sorted(log.at)
    seconds = [(log.at[b] - log.at[a]) / (b - a) for a, b in zip(steps, steps[1:], strict=False)]
    lines = read_json_lines(Path(run.run_dir) / "metrics.jsonl")
    return seconds, [line["tokens_per_second"] for line in lines[1:]]
