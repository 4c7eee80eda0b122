"""A finished model on labelled tasks, as it is: what it writes, or which label it finds likeliest, and the scores."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gin

from t5x_domain.data.labelled import Labelled, SeqioTask, Task
from t5x_domain.errors import UserError
from t5x_domain.inference.decoding import Decoding
from t5x_domain.inference.generator import Generator
from t5x_domain.inference.opened import Opened
from t5x_domain.inference.scoring import choose, score_targets

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
            if task.kind not in ("classification", "text_to_text", "spans", "tagging"):
                raise UserError(f"task '{task.name}': {task.kind} cannot be answered in text; leave it out.")
            if task.kind in ("classification", "tagging") and not task.labels:
                raise UserError(f"task '{task.name}' has no training split to find labels in; set LabelledTask.labels.")

    def scores(self, model: Opened) -> dict[str, dict[str, float]]:
        """{task: {metric: value, "examples": number}}.

        A SeqIO task is scored by `seqio.Evaluator` with its own metric functions, of predictions and of scores.

        Raises:
          UserError: a split is missing or bad, or the model has no decoder.
        """
        result = {}
        for task in self.tasks:
            examples = task.examples(self.split)
            if isinstance(task, SeqioTask):
                values = self._scored_by_seqio(model, task, examples)
            else:
                values = task.score(examples, self.predictions(model, task, examples))
            result[task.name] = {**values, "examples": len(examples)}
        return result

    def predictions(self, model: Opened, task: Task, examples: Sequence[Labelled]) -> list[Any]:
        """What the model says to each example, in the form that the task's metrics take.

        Classification is by rank: the label with the largest log-probability by token. Everything else is written. Of
        written tags, those that the task does not have, and those that are missing, are O.
        """
        inputs = [model.inputs(example.inputs) for example in examples]
        if task.kind == "classification":
            likeliest = choose(model, inputs, task.labels, batch_size=self.batch_size).argmax(axis=1)
            return [task.labels[best] for best in likeliest]
        written = [best.text for best, *_ in Generator(model, self.decoding, batch_size=self.batch_size)(inputs)]
        if task.kind != "tagging":
            return written
        return [_tags(text, task.labels, len(e.target)) for text, e in zip(written, examples, strict=True)]

    def _scored_by_seqio(self, model: Opened, task: SeqioTask, examples: Sequence[Labelled]) -> dict[str, float]:
        """The model reads and writes text, so its vocabulary need not be the task's."""
        import seqio

        vocabulary = seqio.TaskRegistry.get(task.name).output_features["targets"].vocabulary

        # Both are asked for the same examples in the same order as `dataset` has them.
        def predict(dataset: "tf.data.Dataset") -> list[tuple[int, list[int]]]:
            del dataset
            return list(enumerate(vocabulary.encode(text) for text in self.predictions(model, task, examples)))

        def likelihood(dataset: "tf.data.Dataset") -> list[tuple[int, float]]:
            del dataset
            inputs, targets = [model.inputs(e.inputs) for e in examples], [model.targets(e.target) for e in examples]
            return list(enumerate(score_targets(model, inputs, targets, batch_size=self.batch_size)[:, 0].tolist()))

        try:
            evaluator = seqio.Evaluator(
                task.name,
                seqio.EncDecFeatureConverter(pack=False),  # of what the model does not read
                eval_split=self.split,
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
