"""Everything that defines a fine-tuning, as one gin-configured value, and the check that a folder belongs to it."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from t5x_domain import files
from t5x_domain.adaptation.lora import Lora
from t5x_domain.errors import UserError
from t5x_domain.files import changed_keys, write_atomically
from t5x_domain.inference.decoding import Decoding
from t5x_domain.inference.opened import Opened
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.training.optimizer import Updates

TRAIN, VALIDATION = "train", "validation"
IDENTITY_FILE = "finetune.json"
# What may change between two starts: other seeds can be added, and the machine may be another.
_FREE = ("out_dir", "seeds", "updates", "task", "mesh")
# What an identity says of the model that is started from.
OF_THE_MODEL = ("FineTuning.init_from", "model", "step of the model", "ModelConfig", "vocabulary fingerprint")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class FineTuning:
    """A model learns a labelled task, once for each seed.

    Attributes:
      task: a labelled task, see data/labelled.py.
      init_from: the model to start from, of any format.
      out_dir: where everything goes: `seed_<seed>/` with predictions, scores and the model, and `summary.json`.
      updates: optimizer, schedule, clipping, freezing.
      head: "text" if the model is to write the target, "task" for a head of the task's kind, see models/heads.py.
      context_field: for a head of kind "spans", the field that answers are quoted from.
      steps: updates; or give `epochs`.
      epochs: passes over the training examples.
      batch_size: examples in an update.
      accumulation_steps: parts of a batch that are computed one after the other, to save memory; pairs are told apart
        within a part.
      lengths: tokens of a row, {"inputs": 512, "targets": 64}; the number of texts cut to them is told.
      seeds: of the head, the data order and dropout.
      eval_every: steps between evaluations of the validation split; None for an epoch.
      patience: evaluations without a better score that end a seed early; None for never.
      metric: what "better" means, one of the task's metrics; None for the first.
      lower_is_better: of that metric, e.g. of an error rate that a SeqIO task brings along.
      lora: adapt by low-rank matrices and freeze all else but the head; None for no such thing.
      layer_decay, freeze_layers: see `layerwise.multipliers`.
      reinit_top_layers: so many top layers of each stack are drawn afresh.
      dropout_rate: while learning.
      decoding: how text is written in evaluation.
      mesh: devices along each axis.
    """

    task: Any
    init_from: str
    out_dir: str
    updates: Updates
    head: str = "text"
    context_field: str = "text"
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    accumulation_steps: int = 1
    lengths: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"inputs": 512, "targets": 64})
    seeds: Sequence[int] = (0,)
    eval_every: int | None = None
    patience: int | None = None
    metric: str | None = None
    lower_is_better: bool = False
    lora: Lora | None = None
    layer_decay: float = 1.0
    freeze_layers: int = 0
    reinit_top_layers: int = 0
    dropout_rate: float = 0.1
    decoding: Decoding = Decoding()
    mesh: MeshShape = MeshShape()

    def __post_init__(self) -> None:
        """Raises UserError for values that no fine-tuning can have."""
        if (self.steps is None) == (self.epochs is None):
            raise UserError("FineTuning: set one of steps and epochs.")
        for key in ("steps", "epochs", "eval_every", "patience"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise UserError(f"FineTuning.{key} = {value!r}: it must be above 0, or None.")
        if self.batch_size < 1:
            raise UserError(f"FineTuning.batch_size = {self.batch_size}: it must be at least 1.")
        if self.accumulation_steps < 1 or self.batch_size % self.accumulation_steps:
            raise UserError(
                f"FineTuning.accumulation_steps = {self.accumulation_steps}: batch_size = {self.batch_size} does not "
                "divide into so many parts."
            )
        if self.head not in ("text", "task"):
            raise UserError(f"FineTuning.head = {self.head!r}: choose 'text' or 'task'.")
        if missing := [key for key in ("inputs", "targets") if self.lengths.get(key, 0) < 2]:
            raise UserError(f"FineTuning.lengths: '{missing[0]}' must be at least 2 tokens; one is the end.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"FineTuning.seeds = {list(self.seeds)}: give different numbers, 0 or more.")
        if self.lora is not None and (self.freeze_layers or self.reinit_top_layers):
            raise UserError("FineTuning.lora freezes the whole model; leave freeze_layers and reinit_top_layers at 0.")

    def num_steps(self, num_examples: int) -> int:
        """Updates in all."""
        return self.steps or math.ceil(self.epochs * num_examples / self.batch_size)

    def steps_between_evaluations(self, num_examples: int) -> int:
        """An epoch's, if nothing else is said."""
        return self.eval_every or max(1, num_examples // self.batch_size)

    def identity(self, model: Opened, data: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """What must not change between two starts into the same folder, as plain JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _FREE}
        steps = self.num_steps(len(data[TRAIN]))
        described = {
            **{f"FineTuning.{key}": value for key, value in fields.items()},
            **{
                f"Updates.{f.name}": getattr(self.updates, f.name)
                for f in dataclasses.fields(self.updates)
                if f.name != "schedule"
            },
            # A schedule is a function, known by its values: a few to be shown, and the mean of all.
            "learning rates": [float(self.updates.schedule(step)) for step in (0, steps // 2, steps)],
            "mean learning rate": _mean_rate(self.updates.schedule, steps),
            "task": [self.task.name, self.task.kind, list(self.task.metrics)],
            "examples": hashlib.sha256(repr(data).encode()).hexdigest(),
            "model": model.blueprint.model_class.__name__,
            "step of the model": model.facts.get("step"),  # of a run that is still being trained it changes
            "ModelConfig": dataclasses.asdict(model.blueprint.config),
            "vocabulary fingerprint": model.vocabulary.fingerprint,
        }
        return json.loads(json.dumps(described, default=repr))

    def claim_folder(self, identity: Mapping[str, Any]) -> epath.Path:
        """Creates `out_dir`, or checks that it is this fine-tuning's.

        Raises:
          UserError: it holds something else, or cannot be written.
        """
        folder = files.path(self.out_dir)
        record = folder / IDENTITY_FILE
        if record.exists():
            before = json.loads(record.read_text(encoding="utf-8"))
            if changed := changed_keys(before, identity):
                said = "; ".join(f"{key} was {before.get(key)!r}, is {identity.get(key)!r}" for key in changed)
                raise UserError(f"{folder} belongs to a fine-tuning of another configuration: {said}. Set --out_dir.")
            return folder
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--out_dir={folder}: holds something else; name another folder or remove it.")
        try:
            write_atomically(record, json.dumps(identity, indent=1).encode())
        except OSError as error:
            raise UserError(f"--out_dir={folder}: {error.strerror}; name a folder that you may write.") from error
        return folder


def _mean_rate(schedule: Callable[[jax.Array], jax.Array], steps: int) -> float:
    """Over all updates; to six digits, so that another machine finds the same."""
    rates = jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32))(jnp.arange(steps))
    return float(f"{np.asarray(rates, np.float64).mean():.6g}")
