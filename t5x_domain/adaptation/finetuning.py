"""Fine-tuning on a labelled task: every seed to its best checkpoint, resumable to the bit."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from t5x_domain.adaptation.finetune_config import TRAIN, VALIDATION, FineTuning
from t5x_domain.adaptation.finetune_tasks import TaskForm, form_of
from t5x_domain.adaptation.layerwise import multipliers, with_fresh_top
from t5x_domain.adaptation.lora import LEARNING
from t5x_domain.conversion.checkpoint import Checkpoint
from t5x_domain.conversion.formats import write_checkpoint
from t5x_domain.conversion.layout import leaves
from t5x_domain.conversion.tensors import Tensor
from t5x_domain.errors import UserError
from t5x_domain.files import Growing, write_atomically
from t5x_domain.inference.heads import HEAD_FILE
from t5x_domain.inference.opened import Opened, open_model
from t5x_domain.models.names import path_name
from t5x_domain.parallel.sharding import put
from t5x_domain.training.checkpoint import Checkpoints, Retention
from t5x_domain.training.loop import EXIT_PREEMPTED
from t5x_domain.training.metrics import MetricsWriter
from t5x_domain.training.preemption import PreemptionNotice
from t5x_domain.training.state import Blueprint, TrainState
from t5x_domain.training.step import make_train_step

Tree = Any
_SCORES = "scores.json"  # written last: a seed that has it is finished
_LOG_EVERY = 10
_MAX_SKIPPED_IN_A_ROW = 10


def finetune(tuning: FineTuning) -> int:
    """Fine-tunes once for each seed that is not finished yet, then writes `summary.json`.

    Returns:
      0, or EXIT_PREEMPTED after a SIGTERM: everything is saved and the same command goes on from there.

    Raises:
      UserError: the task, the model, the configuration or the folder is not fit for use; updates were not finite; or
        there are several processes.
    """
    if jax.process_count() > 1:
        raise UserError(f"fine-tuning runs in one process, not in {jax.process_count()}; start it on one host.")
    data = _examples(tuning)
    model = open_model(tuning.init_from, flag="--init_from", mesh=tuning.mesh)
    form = form_of(tuning, model, data)
    folder = tuning.claim_folder(tuning.identity(model, data))
    write_atomically(folder / "config.gin", gin.operative_config_str().encode())
    with contextlib.closing(PreemptionNotice()) as notice:
        for seed in tuning.seeds:
            place = folder / f"seed_{seed}"
            if (place / _SCORES).exists():
                print(f"seed {seed}: finished before")
                continue
            params = SeedRun(tuning, model, form, data, seed, place).train(notice)
            if params is None:
                print(f"seed {seed}: told to stop; the same command goes on from there")
                return EXIT_PREEMPTED
            _finish(tuning, form, data, place, params)
    summary = _summary(tuning, folder)
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1).encode())
    print(json.dumps(summary["scores"], indent=1))
    return 0


def batch_positions(seed: int, step: int, *, batch_size: int, num_examples: int) -> np.ndarray:
    """Which examples update `step` (from 0) learns from, int [batch_size]: a function of (seed, step) alone.

    Epochs follow one another without a gap, each in an order of its own.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // num_examples
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(num_examples) for epoch in np.unique(epochs)}
    return np.array([orders[epoch][position % num_examples] for epoch, position in zip(epochs, positions, strict=True)])


@dataclasses.dataclass
class Record:
    """What early stopping has seen so far; saved with every checkpoint.

    Attributes:
      best_step, best_score: the best evaluation, the earliest of equals; more is better.
      stale: evaluations since then.
    """

    best_step: int | None = None
    best_score: float | None = None
    stale: int = 0

    def improved(self, step: int, value: float) -> bool:
        """Takes an evaluation; whether it is the best so far."""
        if self.best_score is None or value > self.best_score:
            self.best_step, self.best_score, self.stale = step, value, 0
            return True
        self.stale += 1
        return False


class SeedRun:
    """One seed, from the model's parameters to those of its best evaluation."""

    def __init__(
        self,
        tuning: FineTuning,
        model: Opened,
        form: TaskForm,
        data: Mapping[str, Sequence[Any]],
        seed: int,
        folder: epath.Path,
    ) -> None:
        """Compiles nothing yet."""
        self._tuning, self._model, self._form, self._data, self._seed = tuning, model, form, data, seed
        self._folder = folder
        config = dataclasses.replace(model.blueprint.config, dropout_rate=tuning.dropout_rate)
        adapted = form.model_class if tuning.lora is None else tuning.lora.model_class(form.model_class)
        self._blueprint = Blueprint(adapted, config, model.blueprint.mesh)
        updates, factors = tuning.updates, None
        if tuning.lora is not None:
            updates = dataclasses.replace(updates, freeze=(*updates.freeze, rf"^(?!head/|.*{LEARNING})"))
        if tuning.layer_decay != 1 or tuning.freeze_layers:
            factors = multipliers(self._blueprint, layer_decay=tuning.layer_decay, freeze_layers=tuning.freeze_layers)
        self._transform = updates.build(self._blueprint.axes, factors)
        loss = _without_frozen(self._blueprint, form.loss, updates.frozen(self._blueprint.axes, factors))
        self._step = make_train_step(
            self._blueprint, loss, self._transform, seed=seed, accumulation_steps=tuning.accumulation_steps
        )

    def train(self, notice: PreemptionNotice) -> Tree | None:
        """The parameters of the best evaluation, of the last step without a validation split; None if told to stop.

        They are those of the form's own model, LoRA merged.
        """
        tuning, num_examples = self._tuning, len(self._data[TRAIN])
        total, every = tuning.num_steps(num_examples), tuning.steps_between_evaluations(num_examples)
        with contextlib.ExitStack() as closing:
            latest, best = (
                closing.enter_context(contextlib.closing(Checkpoints(self._folder / name, Retention(last=last))))
                # Until the newest checkpoint names the new best one, the one before it may still be wanted.
                for name, last in (("checkpoints", 1), ("best", 2))
            )
            state, start, record = self._start(latest)
            writer = closing.enter_context(
                contextlib.closing(MetricsWriter(Growing(self._folder), start, begins=latest.latest_step is None))
            )
            step = start
            while step < total and not self._is_over(record):
                state, metrics = self._step(state, self._batch(step))
                step += 1
                stop = notice.poll() and step < total
                if step % _LOG_EVERY == 0 or step == total:
                    self._log(writer, step, metrics)
                evaluated = step % every == 0 or step == total
                is_best = evaluated and self._has_validation and record.improved(step, self._goodness(writer, state))
                if is_best and best.latest_step != step:  # or it was saved just before an interruption
                    best.save(state, step, {})
                    best.wait()  # a record must not name a checkpoint that is not there
                if evaluated or stop:
                    latest.save(state, step, dataclasses.asdict(record))
                if stop:
                    return None
            if record.best_step is not None:
                state, _ = best.restore(self._blueprint.abstract_state(self._transform), record.best_step)
        return self._merged(state)

    def _start(self, checkpoints: Checkpoints) -> tuple[TrainState, int, Record]:
        step = checkpoints.latest_step
        if step is not None:
            state, record = checkpoints.restore(self._blueprint.abstract_state(self._transform), step)
            return state, step, Record(**record)
        known, fresh = _named(self._model.params), self._blueprint.init(self._seed)
        # The step consumes its state, and the next seed starts from the same parameters.
        params = jax.tree_util.tree_map_with_path(lambda p, leaf: jnp.copy(known.get(path_name(p), leaf)), fresh)
        params = with_fresh_top(params, self._blueprint, self._tuning.reinit_top_layers, seed=self._seed)
        return self._blueprint.init_state(params, self._transform), 0, Record()

    def _batch(self, step: int) -> dict[str, jax.Array]:
        examples = self._data[TRAIN]
        chosen = batch_positions(self._seed, step, batch_size=self._tuning.batch_size, num_examples=len(examples))
        return put(self._blueprint.mesh, self._form.batch([examples[i] for i in chosen]))

    def _is_over(self, record: Record) -> bool:
        return self._tuning.patience is not None and record.stale >= self._tuning.patience

    @property
    def _has_validation(self) -> bool:
        return bool(self._data.get(VALIDATION))

    def _merged(self, state: TrainState) -> Tree:
        return state.params if self._tuning.lora is None else self._tuning.lora.merge(state.params)

    def _goodness(self, writer: MetricsWriter, state: TrainState) -> float:
        """Scores the validation split; more is better."""
        step, examples = int(state.step), self._data[VALIDATION]
        scores = self._tuning.task.score(examples, self._form.predict(self._merged(state), examples))
        writer.evaluated(step, {VALIDATION: scores})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        print(f"seed {self._seed}  step {step:,}  {VALIDATION}  {shown}", flush=True)
        metric = self._tuning.metric or next(iter(scores))
        if metric not in scores:
            raise UserError(f"FineTuning.metric = {metric!r}: the task has {', '.join(scores)}.")
        return -scores[metric] if self._tuning.lower_is_better else scores[metric]

    def _log(self, writer: MetricsWriter, step: int, metrics: Mapping[str, jax.Array]) -> None:
        values = {key: float(metrics[key]) for key in ("loss", "grad_norm", "skipped")}
        writer.log(step, values)
        print(f"seed {self._seed}  step {step:,}  loss {values['loss']:.4f}", flush=True)
        if metrics["skipped_in_a_row"] >= _MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"seed {self._seed}: the last {_MAX_SKIPPED_IN_A_ROW} updates up to step {step} were not finite and "
                "were skipped; lower the learning rate or set Updates.clip_global_norm."
            )


def _examples(tuning: FineTuning) -> dict[str, list[Any]]:
    """The examples of every split.

    Raises:
      UserError: there is nothing to learn from, or nothing to stop by.
    """
    data = {split: list(tuning.task.examples(split)) for split in tuning.task.splits}
    if not data.get(TRAIN):
        raise UserError(f"task '{tuning.task.name}': it has no examples in a split '{TRAIN}'; add them to its files.")
    if tuning.patience is not None and not data.get(VALIDATION):
        raise UserError(
            f"FineTuning.patience = {tuning.patience}: task '{tuning.task.name}' has no examples in a split "
            f"'{VALIDATION}' to stop by; add them to its files, or set patience to None."
        )
    return data


def _without_frozen(blueprint: Blueprint, loss: Callable[..., Any], frozen: Tree) -> Callable[..., Any]:
    """The loss of a model whose frozen parameters are constants, so that their gradients are not even computed."""

    def loss_of_the_rest(model: Any, batch: Any, rng: Any) -> Any:
        params = nnx.to_pure_dict(nnx.state(model))
        held = jax.tree.map(lambda leaf, is_frozen: jax.lax.stop_gradient(leaf) if is_frozen else leaf, params, frozen)
        return loss(blueprint.merge(held), batch, rng)

    return loss_of_the_rest


def _finish(
    tuning: FineTuning, form: TaskForm, data: Mapping[str, Sequence[Any]], folder: epath.Path, params: Tree
) -> None:
    """Predictions and scores of every split but that of training, the model, and no checkpoints any more."""
    scores = {}
    for split, examples in data.items():
        if split == TRAIN or not examples:
            continue
        predictions = form.predict(params, examples)
        scores[split] = tuning.task.score(examples, predictions)
        lines = [
            json.dumps({"id": e.id, "target": e.target, "prediction": p}, ensure_ascii=False)
            for e, p in zip(examples, predictions, strict=True)
        ]
        write_atomically(folder / f"predictions-{split}.jsonl", ("\n".join(lines) + "\n").encode())
    (folder / "model").rmtree(missing_ok=True)  # of an attempt that was interrupted here
    _write_model(form, params, folder / "model")
    write_atomically(folder / _SCORES, json.dumps(scores, indent=1).encode())
    for name in ("checkpoints", "best"):
        (folder / name).rmtree(missing_ok=True)


def _write_model(form: TaskForm, params: Tree, folder: epath.Path) -> None:
    """The model as a converted folder; of a task with a head also what `inference.heads` reads."""
    model, named = form.asked, _named(params)
    base, config = model.blueprint.model_class, dataclasses.replace(model.blueprint.config, scan_layers=True)
    # What a head has no use for, such as the decoder of an encoder-decoder, is as it was.
    flat = _named(model.params) | named
    unrolled = leaves(base, model.blueprint.config)
    tensors = {leaf.parts[0]: Tensor.of(np.asarray(flat[leaf.name])) for leaf in unrolled}
    facts = {**model.facts, "started_from": PurePath(model.origin).name}
    if template := getattr(form.tuning.task, "input_template", None):
        facts["input_template"] = template
    write_checkpoint(
        Checkpoint(str(folder), base, config, tensors, model.vocabulary, facts=facts), str(folder), "native"
    )
    head = {name.removeprefix("head/"): np.asarray(leaf) for name, leaf in named.items() if name.startswith("head/")}
    if head:
        task, length = form.tuning.task, form.tuning.lengths["inputs"]
        content = io.BytesIO()
        np.savez(content, kind=task.kind, length=length, labels=np.array(task.labels or [], str), **head)
        write_atomically(folder / HEAD_FILE, content.getvalue())


def _summary(tuning: FineTuning, folder: epath.Path) -> dict[str, Any]:
    """Mean and sample standard deviation (None for one seed) of every score over the seeds."""
    by_seed = [json.loads((folder / f"seed_{seed}" / _SCORES).read_text(encoding="utf-8")) for seed in tuning.seeds]
    scores: dict[str, Any] = {}
    for split, metrics in by_seed[0].items():
        for name in metrics:
            values = [seed[split][name] for seed in by_seed]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            scores.setdefault(split, {})[name] = {"mean": float(np.mean(values)), "std": spread, "values": values}
    return {"task": tuning.task.name, "init_from": tuning.init_from, "seeds": list(tuning.seeds), "scores": scores}


def _named(tree: Tree) -> dict[str, jax.Array]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
