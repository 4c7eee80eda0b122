"""How a labelled task is put to a model: as text to write, or to a head of the task's kind."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_domain.data import packing
from t5x_domain.errors import UserError
from t5x_domain.inference.answering import Answerer
from t5x_domain.inference.heads import answer, reader
from t5x_domain.inference.opened import Opened
from t5x_domain.models.assemblies import EncoderDecoder, EncoderOnly
from t5x_domain.models.heads import head
from t5x_domain.objectives.labels import LOSSES, OBJECTIVES
from t5x_domain.objectives.losses import language_model_loss
from t5x_domain.training.feed import LAYOUTS
from t5x_domain.training.finetune_config import TRAIN, FineTuning
from t5x_domain.training.state import Blueprint

Params = Any


class TaskForm(abc.ABC):
    """A task as a model learns it.

    Attributes:
      model_class: what is trained, before it is adapted by LoRA.
      loss: (model, batch, rng) -> (sum to differentiate, sums to report), see training/step.py.
    """

    model_class: Callable[..., Any]
    loss: Callable[..., Any]

    def __init__(self, tuning: FineTuning, model: Opened) -> None:
        """`model` is the one to start from."""
        self.tuning, self.model = tuning, model
        # A decoder that learns from inputs which see one another also answers to such.
        facts = {**model.facts, "prefix_lm": ["fine-tuning"]} if _is_decoder(model) else model.facts
        self.asked = dataclasses.replace(model, facts=facts)

    @abc.abstractmethod
    def batch(self, examples: Sequence[Any]) -> dict[str, np.ndarray]:
        """Features of one row for each example, [B, ...]."""

    @abc.abstractmethod
    def predict(self, params: Params, examples: Sequence[Any]) -> list[Any]:
        """What the model says to each example, in the form that the task's metrics take."""

    @abc.abstractmethod
    def num_cut(self, examples: Sequence[Any]) -> int:
        """Examples that are longer than a row, hence cut."""


class AsText(TaskForm):
    """The model writes the target; of a classification it takes the likeliest label (rank classification)."""

    def __init__(self, tuning: FineTuning, model: Opened) -> None:
        """Raises UserError for a task that cannot be written, or a model that cannot write."""
        super().__init__(tuning, model)
        self.model_class = model.blueprint.model_class
        if tuning.task.kind not in ("text_to_text", "classification", "spans"):
            raise UserError(f"FineTuning.head = 'text': {tuning.task.kind} cannot be written as text; set 'task'.")
        if self.model_class is EncoderOnly:
            raise UserError(f"{model.origin}: an encoder alone cannot write text; set FineTuning.head = 'task'.")
        self.loss = functools.partial(language_model_loss, num_components=1)
        self._layout = LAYOUTS[self.model_class]
        self._answerer = Answerer(self.asked, tuning.decoding, batch_size=tuning.batch_size)

    def batch(self, examples: Sequence[Any]) -> dict[str, np.ndarray]:
        rows = [[packing.Example(self._inputs(e), self._targets(e), component_id=0)] for e in examples]
        return self._layout.batch(rows, self.tuning.lengths)

    def predict(self, params: Params, examples: Sequence[Any]) -> list[str]:
        return self._answerer(self.tuning.task, [self._inputs(example) for example in examples], params=params)

    def num_cut(self, examples: Sequence[Any]) -> int:
        longest = self.tuning.lengths
        return sum(
            len(self.asked.inputs(e.inputs)) > longest["inputs"]
            or len(self.asked.targets(self._answer(e))) > longest["targets"]
            for e in examples
        )

    def _inputs(self, example: Any) -> np.ndarray:
        return _closed(self.asked.inputs(example.inputs), self.tuning.lengths["inputs"])

    def _targets(self, example: Any) -> np.ndarray:
        return _closed(self.asked.targets(self._answer(example)), self.tuning.lengths["targets"])

    def _answer(self, example: Any) -> str:
        return next(iter(example.target), "") if self.tuning.task.kind == "spans" else example.target


class ByHead(TaskForm):
    """A head of the task's kind on the model's encoder, see models/heads.py and objectives/labels.py."""

    def __init__(self, tuning: FineTuning, model: Opened) -> None:
        """Raises UserError for a task that has no head, or a model without encoder."""
        super().__init__(tuning, model)
        kind, labels = tuning.task.kind, tuning.task.labels
        if kind not in OBJECTIVES:
            raise UserError(f"FineTuning.head = 'task': there is no head for {kind}; set it to 'text'.")
        if _is_decoder(model):
            raise UserError(f"{model.origin}: heads stand on an encoder, which it lacks; set FineTuning.head = 'text'.")
        options: dict[str, Any] = {"labels": labels} if kind in ("classification", "tagging") else {}
        if kind == "spans":
            options["context_field"] = tuning.context_field
        self._objective = OBJECTIVES[kind](model.vocabulary, tuning.lengths["inputs"], **options)
        self.model_class = head(kind, num_labels=len(labels or ()) or None)
        self.loss = LOSSES[kind]
        self._read = reader(Blueprint(self.model_class, model.blueprint.config, model.blueprint.mesh))

    def batch(self, examples: Sequence[Any]) -> dict[str, np.ndarray]:
        return self._objective.encode(examples).features

    def predict(self, params: Params, examples: Sequence[Any]) -> list[Any]:
        read = functools.partial(self._read, params)
        return answer(self._objective, read, examples, batch_size=self.tuning.batch_size)

    def num_cut(self, examples: Sequence[Any]) -> int:
        return len(self._objective.encode(examples).cut)


def form_of(tuning: FineTuning, model: Opened, data: Mapping[str, Sequence[Any]]) -> TaskForm:
    """How `tuning` wants its task put; tells labels that training lacks, and how many examples are cut.

    Raises:
      UserError: the task, the model and the form do not go together; there is one label only.
    """
    if tuning.task.kind == "classification":
        _check_labels(tuning.task, data)
    form = (AsText if tuning.head == "text" else ByHead)(tuning, model)
    for split, examples in data.items():
        if count := form.num_cut(examples):
            print(f"{split}: {count} of {len(examples)} examples are longer than {dict(tuning.lengths)}, hence cut")
    return form


def _check_labels(task: Any, data: Mapping[str, Sequence[Any]]) -> None:
    trained = {example.target for example in data[TRAIN]}
    if len(trained) < 2:
        only = ", ".join(map(repr, trained))
        raise UserError(f"task '{task.name}': all training examples are labelled {only}; give examples of another.")
    for split, examples in data.items():
        unseen = sorted({example.target for example in examples} - trained)
        if unseen:
            count = sum(example.target in unseen for example in examples)
            print(f"{split}: {count} of {len(examples)} examples have labels that training lacks: {', '.join(unseen)}")


def _closed(ids: np.ndarray, length: int) -> np.ndarray:
    """The beginning of `ids`, with their end token."""
    return ids if len(ids) <= length else np.append(ids[: length - 1], ids[-1]).astype(np.int32)


def _is_decoder(model: Opened) -> bool:
    return model.blueprint.model_class not in (EncoderDecoder, EncoderOnly)
