"""The main job: from a prepared token cache to a trained model, resumable to the bit."""

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gin
import jax
import numpy as np
import optax

from t5x_domain.conversion.native import open_native
from t5x_domain.data.curriculum import learning_rate
from t5x_domain.data.tasks import Component
from t5x_domain.errors import UserError
from t5x_domain.evaluation.perplexity import headline
from t5x_domain.files import write_atomically
from t5x_domain.models.names import path_name
from t5x_domain.objectives.losses import ratios
from t5x_domain.training.checkpoint import Checkpoints
from t5x_domain.training.export import export, require_free_export
from t5x_domain.training.feed import Feed
from t5x_domain.training.initial import restore_params, starting_state
from t5x_domain.training.metrics import MetricsWriter, Progress, read_json_lines
from t5x_domain.training.run import Run
from t5x_domain.training.state import Blueprint
from t5x_domain.training.step import make_eval_step, make_train_step

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: start the same command again


def train(run: Run) -> int:
    """Trains, or goes on training, until `run.total_steps`.

    Returns:
      0, or EXIT_PREEMPTED after a SIGTERM: everything is saved and the same command goes on from there.

    Raises:
      UserError: the configuration, the cache or the run directory is not fit for use; a checkpoint could not be
        written; or too many updates in a row were not finite.
    """
    require_free_export(run)
    mesh = run.mesh.build()
    feed = Feed(run, mesh)
    blueprint = Blueprint(run.model, run.config, mesh)
    schedule = learning_rate(run.phases, feed.batches.starts, run.updates.schedule)
    updates = dataclasses.replace(run.updates, schedule=schedule)
    transform = updates.build(blueprint.axes)
    train_step = make_train_step(
        blueprint, feed.loss, transform, seed=run.seed, accumulation_steps=run.accumulation_steps
    )
    eval_step = make_eval_step(blueprint, feed.loss)

    run_dir = run.claim_directory(feed.batches.starts)
    (run_dir / "config.gin").write_text(gin.operative_config_str(), encoding="utf-8")
    with contextlib.ExitStack() as closing:
        checkpoints = closing.enter_context(contextlib.closing(Checkpoints(run_dir / "checkpoints", run.retention)))
        begins = checkpoints.latest_step is None
        state, start = starting_state(run, blueprint, transform, checkpoints)
        writer = closing.enter_context(contextlib.closing(MetricsWriter(run_dir, start, begins=begins)))
        progress = closing.enter_context(contextlib.closing(Progress(start, run.total_steps)))
        preemption = closing.enter_context(contextlib.closing(PreemptionNotice()))
        guard, meter = Guard(run, feed), Meter(run, feed, schedule, writer.last_logged, start)
        progress.say(f"{blueprint.num_parameters:,} parameters, mesh {dict(mesh.shape)}, from step {start:,}")
        for phase in feed.batches.describe() if len(run.phases) > 1 else ():
            progress.say(phase)

        def evaluate(step: int) -> dict[str, float]:
            scores = feed.held_out(eval_step, state.params)
            writer.evaluated(step, scores)
            headlines = {corpus: headline(score) for corpus, score in scores.items()}
            measure = next(name for name, _ in headlines.values())
            shown = "  ".join(f"{corpus} {value}" for corpus, (_, value) in headlines.items())
            progress.say(f"step {step:,}/{run.total_steps:,}  held-out {measure}  {shown}")
            meter.restart()
            return {"loss": float(np.mean([score["loss"] for score in scores.values()]))}

        if begins:
            evaluate(start)
        meter.restart()
        for step, batch, raw_tokens in feed.train_batches(start):
            if len(run.phases) > 1 and (step - 1 in feed.batches.starts or step == start + 1):
                progress.say(f"step {step:,}: {feed.batches.names[feed.batches.phase_of(step - 1)]}")
            state, metrics = train_step(state, feed.put(batch))
            last, stop = step == run.total_steps, preemption.given
            guard.watch(step, metrics)
            meter.count(step, batch, raw_tokens)
            progress.step()
            if last or step % run.log_every == 0:
                line = meter.read(step, metrics)
                writer.log(step, line)
                progress.logged(step, line, meter.seconds_per_step)
            held_out = evaluate(step) if last or step % run.eval_every == 0 else None
            if last or stop or step % run.checkpoint_every == 0:
                guard.settle()
                checkpoints.save(state, step, feed.position(step), held_out)
            if stop and not last:
                progress.say(f"told to stop; saving step {step:,}: the same command goes on from there")
                return EXIT_PREEMPTED
    summarise(run_dir, feed)
    export(run)
    return 0


def open_trained(run: Run) -> tuple[Feed, Blueprint, Any]:
    """What a finished or interrupted run reads, its model, and the parameters of its newest checkpoint.

    Raises:
      UserError: there is no checkpoint, it is of another model, or the cache is not fit for use.
    """
    mesh = run.mesh.build()
    blueprint = Blueprint(run.model, run.config, mesh)
    found = restore_params(open_native(run.run_dir), blueprint, include=[".*"], strict=True).params
    params = jax.tree_util.tree_map_with_path(lambda path, _: found[path_name(path)], blueprint.shapes)
    return Feed(run, mesh), blueprint, params


class PreemptionNotice:
    """Whether the process was told to stop (SIGTERM), so that it can save first."""

    def __init__(self) -> None:
        """Listens from now on; signals can only be caught in the main thread."""
        self.given = False
        self._before = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_: Any) -> None:
        self.given = True

    def close(self) -> None:
        """Stops listening."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


class Guard:
    """Ends a run whose updates are not finite any more, and keeps the batch for inspection."""

    def __init__(self, run: Run, feed: Feed) -> None:
        """`run.max_skipped_in_a_row` such updates end the run."""
        self._run, self._feed = run, feed
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None

    def watch(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Looks at the update before this one, so that the device always has one to work on."""
        self.settle()
        self._pending = (step, metrics)

    def settle(self) -> None:
        """Looks at the last update.

        Raises:
          UserError: it was one too many that was not finite.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        skipped = int(metrics["skipped_in_a_row"])
        if skipped >= self._run.max_skipped_in_a_row:
            path = Path(self._run.run_dir) / f"nonfinite_batch_{step}.npz"
            np.savez(path, **self._feed.batches[step - 1])
            raise UserError(
                f"the last {skipped} updates up to step {step} were not finite and were skipped; the batch of the last "
                f"is in {path}. Lower the learning rate or set Updates.clip_global_norm, "
                "and go on from the last checkpoint."
            )


class Meter:
    """Tokens per second, and the numbers of a logged step."""

    def __init__(self, run: Run, feed: Feed, schedule: optax.Schedule, last_logged: int, start: int) -> None:
        """Counts time from `restart`, and text from the last logged step before `start` on, as if never interrupted."""
        self._run, self._feed, self._schedule = run, feed, schedule
        self._raw_tokens: dict[str, dict[str, int]] = {}
        for step in range(last_logged, start):
            self._add(step + 1, feed.batches.raw_tokens(step))
        self.seconds_per_step = 0.0
        self.restart()

    def restart(self) -> None:
        """Starts the clock anew, after something that is no training."""
        self._clock, self._tokens, self._steps = time.perf_counter(), 0, 0

    def _add(self, step: int, raw_tokens: Mapping[str, int]) -> None:
        phase = self._raw_tokens.setdefault(self._feed.batches.names[self._feed.batches.phase_of(step - 1)], {})
        for component, tokens in raw_tokens.items():
            phase[component] = phase.get(component, 0) + tokens

    def count(self, step: int, batch: Mapping[str, np.ndarray], raw_tokens: Mapping[str, int]) -> None:
        """Adds a batch's tokens, padding left out, and the raw tokens of its components."""
        self._add(step, raw_tokens)
        self._tokens += sum(np.count_nonzero(ids) for name, ids in batch.items() if name.endswith("segment_ids"))
        self._steps += 1

    def read(self, step: int, metrics: Mapping[str, jax.Array]) -> dict[str, Any]:
        """The line of metrics.jsonl for this step; waits until the device has done it."""
        values = jax.device_get(metrics)
        seconds = time.perf_counter() - self._clock
        self.seconds_per_step = seconds / max(self._steps, 1)
        rate = self._tokens * jax.process_count() / seconds
        self.restart()
        weight = max(float(values["weight"]), 1.0)
        raw_tokens, self._raw_tokens = _over_hosts(self._raw_tokens), {}
        return {
            "loss": float(values["loss"]),
            "accuracy": float(values["correct"]) / weight,
            "learning_rate": float(self._schedule(step - 1)),
            "grad_norm": float(values["grad_norm"]),
            "tokens_per_second": rate,
            "skipped": int(values["skipped"]),
            "corpus_loss": self._losses(values, lambda component: component.corpus.name),
            "denoiser_loss": self._losses(values, lambda component: component.objective.name),
            "raw_tokens": raw_tokens,
            **ratios(values),
        }

    def _losses(self, values: Mapping[str, np.ndarray], of: Callable[[Component], str]) -> dict[str, float | None]:
        """Loss by target of the components that `of` gives the same name; None for those without targets."""
        sums: dict[str, np.ndarray] = {}
        for component, *pair in zip(
            self._feed.components, values["component_nll"], values["component_weight"], strict=True
        ):
            sums[of(component)] = sums.get(of(component), 0) + np.array(pair, np.float64)
        return {name: float(nll / weight) if weight else None for name, (nll, weight) in sums.items()}


def _over_hosts(counts: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Sums over all processes; all have the same names in the same order."""
    if jax.process_count() == 1:
        return counts
    from jax.experimental.multihost_utils import process_allgather

    leaves, tree = jax.tree.flatten(counts)
    return jax.tree.unflatten(tree, process_allgather(np.array(leaves)).sum(axis=0).tolist())


def summarise(run_dir: Path, feed: Feed) -> None:
    """Writes eval.json, held-out scores before and after, and phases.json, what each phase has seen."""
    evaluations = read_json_lines(run_dir / "evaluations.jsonl")
    before, after = evaluations[0], evaluations[-1]
    summary = {
        "before": {"step": before["step"], **before["corpora"]},
        "after": {"step": after["step"], **after["corpora"]},
    }
    write_atomically(run_dir / "eval.json", json.dumps(summary, indent=1).encode())
    lines = read_json_lines(run_dir / "metrics.jsonl")
    phases = []
    for name, (start, stop) in zip(feed.batches.names, feed.batches.spans, strict=True):
        raw_tokens: dict[str, int] = {}
        for line in lines:
            for component, count in line["raw_tokens"].get(name, {}).items():
                raw_tokens[component] = raw_tokens.get(component, 0) + count
        total = sum(raw_tokens.values())
        phases.append({"name": name, "start": start, "stop": stop, "raw_tokens": total, **feed.shares(raw_tokens)})
    write_atomically(run_dir / "phases.json", json.dumps(phases, indent=1).encode())
