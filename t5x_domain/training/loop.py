"""The main job: from a prepared token cache to a trained model, resumable to the bit."""

import contextlib
import dataclasses
import json
import secrets
from typing import Any

import gin
import jax
from etils import epath

from t5x_domain import files
from t5x_domain.conversion.native import open_native
from t5x_domain.data.curriculum import learning_rate
from t5x_domain.errors import UserError
from t5x_domain.files import Growing, write_atomically
from t5x_domain.models.names import path_name
from t5x_domain.parallel.peers import EXIT_PREEMPTED
from t5x_domain.parallel.processes import first_does, is_first, peers, require_joined, wait_for_all
from t5x_domain.training.checkpoint import Checkpoints
from t5x_domain.training.export import export, require_free_export
from t5x_domain.training.feed import Feed
from t5x_domain.training.goodput import Ledger
from t5x_domain.training.guard import Guard
from t5x_domain.training.initial import restore_params, starting_state
from t5x_domain.training.metrics import read_json_lines
from t5x_domain.training.preemption import PreemptionNotice
from t5x_domain.training.profiling import TraceRequest
from t5x_domain.training.run import Run
from t5x_domain.training.state import Blueprint
from t5x_domain.training.step import make_eval_step, make_train_step
from t5x_domain.training.watch import Watch


def train(run: Run, began: float | None = None) -> int:
    """Trains, or goes on training, until `run.total_steps`; every process of the run calls it.

    Args:
      run: what.
      began: when the program was started, seconds since 1970, for the account of the run's time; now by default.

    Returns:
      0, or EXIT_PREEMPTED after a SIGTERM to any process: everything is saved and the same command goes on from there.

    Raises:
      UserError: the configuration, the cache or the run directory is not fit for use; a checkpoint could not be
        written; or too many updates in a row were not finite.
    """
    with Ledger(began) as ledger:
        return _train(run, ledger)


def _train(run: Run, ledger: Ledger) -> int:
    require_joined()
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

    run_dir = files.path(run.run_dir)
    first_does(lambda: _claim_directory(run, feed))
    _require_shared(run_dir)
    records = Growing(run_dir)
    with contextlib.ExitStack() as closing:
        # A signal that nobody listens to ends the process: so these are closed after the last checkpoint is whole.
        preemption = closing.enter_context(contextlib.closing(PreemptionNotice()))
        trace_request = closing.enter_context(contextlib.closing(TraceRequest()))
        closing.callback(records.publish)  # after all that is written
        checkpoints = closing.enter_context(contextlib.closing(Checkpoints(run_dir / "checkpoints", run.retention)))
        begins = checkpoints.latest_step is None
        state, start = starting_state(run, blueprint, transform, checkpoints)
        watch = Watch(run, feed, schedule, records, ledger, trace_request, start, begins=begins)
        closing.enter_context(contextlib.closing(watch))
        guard = Guard(run, feed)
        watch.say(f"{blueprint.num_parameters:,} parameters, mesh {dict(mesh.shape)}, from step {start:,}")
        for phase in feed.batches.describe() if len(run.phases) > 1 else ():
            watch.say(phase)

        def evaluate(step: int) -> dict[str, float]:
            return watch.evaluated(step, lambda: feed.held_out(eval_step, state.params))

        if begins:
            evaluate(start)
        for step, batch, raw_tokens in watch.batches(feed.train_batches(start)):
            state, metrics = watch.update(step, train_step, state, feed.put(batch))
            last, stop = step == run.total_steps, preemption.poll()
            with watch.waiting_for_device():
                guard.watch(step, metrics)
            watch.updated(step, batch, raw_tokens)
            if last or step % run.log_every == 0:
                watch.log(step, metrics)
            held_out = evaluate(step) if last or step % run.eval_every == 0 else None
            if last or stop or step % run.checkpoint_every == 0:
                guard.settle()
                with watch.saving(step):
                    checkpoints.save(state, step, feed.position(step), held_out)
            if stop and not last:
                watch.say(f"told to stop; saving step {step:,}: the same command goes on from there")
                return EXIT_PREEMPTED
    ledger.enter("export")
    if is_first():
        summarise(run_dir, feed)
        export(run)
    return 0


def _claim_directory(run: Run, feed: Feed) -> None:
    run_dir = run.claim_directory(feed.batches.starts)
    write_atomically(run_dir / "config.gin", gin.operative_config_str().encode())


def _require_shared(run_dir: epath.Path) -> None:
    """Processes write a checkpoint together, and would wait for ever for what one wrote to a disk of its own."""
    if (others := peers()) is None:
        return

    def leave_mark() -> str:
        name = f".seen-by-all-{secrets.token_hex(8)}"  # a name that no disk has from an earlier start
        write_atomically(run_dir / name, b"")
        return name

    mark = run_dir / first_does(leave_mark)
    if not mark.exists():
        raise UserError(
            f"--run_dir={run_dir}: process {others.index} does not see what process 0 writes there; give a folder that "
            "all processes share, or gs:// or s3://."
        )
    wait_for_all("run_dir")
    if is_first():
        mark.unlink()


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


def summarise(run_dir: epath.Path, feed: Feed) -> None:
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
