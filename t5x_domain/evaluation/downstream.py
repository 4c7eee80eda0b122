"""A finished model on labelled tasks, as it is: what it writes, finds likeliest or finds nearest, and the scores."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import gin
import numpy as np

from t5x_domain.data.labelled import Labelled, SeqioTask, Task
from t5x_domain.errors import UserError
from t5x_domain.evaluation.retrieval import retrieval_scores
from t5x_domain.inference.answering import Answerer
from t5x_domain.inference.decoding import Decoding
from t5x_domain.inference.embedding import Embedder
from t5x_domain.inference.opened import Opened

if TYPE_CHECKING:
    import tensorflow as tf


@gin.configurable
@dataclasses.dataclass(frozen=True)
class TaskEvaluation:
    """Tasks to ask a model.

    Attributes:
      tasks: `LabelledTask` or `SeqioTask`, each with a name of its own.
      split: of every task.
      decoding: how text is written.
      batch_size: examples at once.
    """

    tasks: Sequence[Task]
    split: str = "validation"
    decoding: Decoding = Decoding()
    batch_size: int = 8

    def __post_init__(self) -> None:
        """Raises UserError if two tasks have one name, one cannot be asked as text, or has no labels to choose from."""
        names = [task.name for task in self.tasks]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise UserError(f"TaskEvaluation.tasks has '{min(repeated)}' twice; give each task a name of its own.")
        for task in self.tasks:
            if task.kind in ("classification", "tagging") and not task.labels:
                raise UserError(f"task '{task.name}' has no training split to find labels in; set LabelledTask.labels.")

    def scores(self, model: Opened) -> dict[str, dict[str, float]]:
        """{task: {metric: value, "examples": number}}.

        A SeqIO task is scored by `seqio.Evaluator` with its own metric functions, of predictions and of scores; pairs
        by how well embeddings find what belongs to a text, see `found_pairs`.

        Raises:
          UserError: a split is missing or bad, or the model has no decoder (for pairs: no encoder).
        """
        result, answerer = {}, Answerer(model, self.decoding, batch_size=self.batch_size)
        for task in self.tasks:
            examples = task.examples(self.split)
            if isinstance(task, SeqioTask):
                values = _scored_by_seqio(answerer, task, examples, self.split)
            elif task.kind == "pairs":
                values = found_pairs(Embedder(model, batch_size=self.batch_size), examples)
            else:
                values = task.score(examples, _predictions(answerer, task, examples))
            result[task.name] = {**values, "examples": len(examples)}
        return result


def found_pairs(embedder: Callable[[Sequence[str]], np.ndarray], examples: Sequence[Labelled]) -> dict[str, float]:
    """Retrieval scores (`evaluation.retrieval`) of the pairs of a split.

    Every different text asks for all that belong to it, among every different text that belongs to any.

    Args:
      embedder: vectors [n, d] of n texts, e.g. an `Embedder`.
      examples: texts and what belongs to them.
    """
    documents = list(dict.fromkeys(example.target for example in examples))
    number = {text: i for i, text in enumerate(documents)}
    relevant: dict[str, set[int]] = {}
    for example in examples:
        relevant.setdefault(example.inputs, set()).add(number[example.target])
    return retrieval_scores(embedder(list(relevant)), embedder(documents), list(relevant.values()))


def _predictions(answerer: Answerer, task: Task, examples: Sequence[Labelled]) -> list[Any]:
    """What the model says to each example, in the form that the task's metrics take.

    Of written tags, those that the task does not have, and those that are missing, are O.
    """
    said = answerer(task, [answerer.model.inputs(example.inputs) for example in examples])
    if task.kind != "tagging":
        return said
    return [_tags(text, task.labels, len(e.target)) for text, e in zip(said, examples, strict=True)]


def _scored_by_seqio(answerer: Answerer, task: SeqioTask, examples: Sequence[Labelled], split: str) -> dict[str, float]:
    """The model reads and writes text, so its vocabulary need not be the task's."""
    import seqio

    vocabulary, model = seqio.TaskRegistry.get(task.name).output_features["targets"].vocabulary, answerer.model

    # Both are asked for the same examples in the same order as `dataset` has them.
    def predict(dataset: "tf.data.Dataset") -> list[tuple[int, list[int]]]:
        del dataset
        return list(enumerate(vocabulary.encode(text) for text in _predictions(answerer, task, examples)))

    def likelihood(dataset: "tf.data.Dataset") -> list[tuple[int, float]]:
        del dataset
        inputs, targets = [model.inputs(e.inputs) for e in examples], [model.targets(e.target) for e in examples]
        return list(enumerate(answerer.scorer(inputs, targets)[:, 0].tolist()))

    try:
        evaluator = seqio.Evaluator(
            task.name,
            seqio.EncDecFeatureConverter(pack=False),  # of what the model does not read
            eval_split=split,
            async_compute_metrics=False,
        )
        metrics, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict, score_fn=likelihood)
    except ValueError as error:
        raise UserError(f"SeqIO task '{task.name}' cannot be evaluated: {error}") from error
    found = metrics.result().get(task.name)
    if not found:
        raise UserError(f"SeqIO task '{task.name}' has no metric functions; register it with metric_fns.")
    return {name: float(getattr(value, "value", value)) for name, value in found.items()}


def _tags(text: str, known: Sequence[str], words: int) -> list[str]:
    tags = [tag if tag in known else "O" for tag in text.split()]
    return (tags + ["O"] * words)[:words]
