"""Labelled tasks: files of examples with a target each, declared by one gin call, and the same as SeqIO tasks.

`register_labelled` makes a SeqIO task of one for other SeqIO users; `SeqioTask` takes a task that somebody registered.
TensorFlow and SeqIO are imported by these two only.
"""

import abc
import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gin

from t5x_domain.data.labelled_files import Record, read_records
from t5x_domain.data.sources import python_fields, resolve_files
from t5x_domain.data.tasks import registered_task
from t5x_domain.data.templates import field_of, fields_of, filled, text_of
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.evaluation import metrics

if TYPE_CHECKING:
    import seqio
    import tensorflow as tf

_METRICS = {
    "classification": ("accuracy", "macro_f1"),
    "text_to_text": ("exact_match", "token_f1"),
    "tagging": ("entity_f1",),
    "spans": ("span_exact_match", "span_f1"),
    "pairs": ("accuracy",),
}
KINDS = tuple(_METRICS)
_LABELLED = ("classification", "tagging")  # kinds with a closed set of labels
TRAIN = "train"


class Labelled(NamedTuple):
    """An example.

    Attributes:
      id: its name, once in its split.
      inputs: the text that is read.
      target: what is asked for: a text (the label, the text to write, of pairs the text that belongs to `inputs`); of
        tagging a list with a tag for each whitespace token of `inputs`; of spans the list of admissible answers, []
        for none.
      fields: the record's fields.
    """

    id: str
    inputs: str
    target: Any
    fields: Mapping[str, Any]


class Task(abc.ABC):
    """What labelled tasks share. Subclasses are frozen dataclasses with these attributes.

    Attributes:
      name: letters, digits and underscores.
      kind: one of `KINDS`.
      metrics: names of what predictions are scored with, the main one first.
      labels: classes or tags; empty for other kinds.
    """

    name: str
    kind: str
    metrics: Sequence[str]
    labels: Sequence[str] | None

    @property
    @abc.abstractmethod
    def splits(self) -> list[str]:
        """Names of the splits."""

    @abc.abstractmethod
    def examples(self, split: str) -> list[Labelled]:
        """All examples of a split, in the files' order. Raises UserError if it has none or one is bad."""

    @abc.abstractmethod
    def score(self, examples: Sequence[Labelled], predictions: Sequence[Any]) -> dict[str, float]:
        """The task's metrics; predictions are texts (of tagging, a list of tags for each word)."""


@gin.configurable
@dataclasses.dataclass(frozen=True)
class LabelledTask(Task):
    """A task in CSV, TSV or JSONL files, each also with .gz or .zst after it; see `labelled_files.read_records`.

    Attributes:
      name: letters, digits and underscores; the name in SeqIO's registry as well.
      files: for each split a file or glob pattern, or a list of them.
      kind: "classification", "text_to_text", "tagging", "spans" (extractive answers) or "pairs" (texts that belong
        together).
      input_template: makes the inputs of the fields, e.g. "question: {question} context: {text}". A list of words is
        joined by blanks.
      target_field: holds the target: a text or number; of tagging a list of tags or a text of them with blanks
        between; of spans a list of answers, or one ("" for none).
      labels: classes or tags in their order; None for those of the training split, sorted.
      metrics: names of `evaluation.metrics.METRICS`; None for the usual ones of the kind.
      split_field: if set, only records whose field of this name equals the split are read, so that one file can serve
        several splits.
      id_field: names an example. None, or "id" where there is no such field, for its file and line.
    """

    name: str
    files: Mapping[str, str | Sequence[str]]
    kind: str = "classification"
    input_template: str = "{text}"
    target_field: str = "label"
    labels: Sequence[str] | None = None
    metrics: Sequence[str] | None = None
    split_field: str | None = None
    id_field: str | None = "id"

    def __post_init__(self) -> None:
        """Finds the labels; reads the training split if they are not declared. Raises UserError for a bad setting."""
        if not re.fullmatch(r"\w+", self.name):
            raise UserError(f"LabelledTask.name is '{self.name}'; it may have letters, digits and underscores only.")
        if self.kind not in KINDS:
            raise UserError(f"LabelledTask.kind = {self.kind!r}: choose one of {', '.join(KINDS)}.")
        if not isinstance(self.files, Mapping) or not self.files:
            raise UserError(f"LabelledTask.files = {self.files!r}: name the files of each split, {{'train': 'a.csv'}}.")
        names = _METRICS[self.kind] if self.metrics is None else tuple(self.metrics)
        if unknown := [name for name in names if name not in metrics.METRICS]:
            raise UserError(f"LabelledTask.metrics has '{unknown[0]}'; choose of {', '.join(metrics.METRICS)}.")
        object.__setattr__(self, "metrics", names)
        fields_of(self.input_template, "LabelledTask.input_template")
        labels = self.labels
        if labels is None:
            labels = sorted(self._labels_of(TRAIN)) if self.kind in _LABELLED and TRAIN in self.files else ()
        if len(set(labels)) < len(labels):
            raise UserError(f"LabelledTask.labels = {list(labels)}: each label once, please.")
        object.__setattr__(self, "labels", tuple(labels))

    @property
    def splits(self) -> list[str]:
        return list(self.files)

    def examples(self, split: str) -> list[Labelled]:
        if split not in self.files:
            raise UserError(f"LabelledTask.files has no split '{split}', only {', '.join(self.files)}.")
        patterns = [self.files[split]] if isinstance(self.files[split], str) else self.files[split]
        paths = [path for pattern in patterns for path in resolve_files(pattern)]
        examples: dict[str, Labelled] = {}
        places: dict[str, str] = {}
        for path in paths:
            for record in read_records(path):
                place = f"{path}, line {record.line}"
                if self.split_field and field_of(record.fields, self.split_field, place) != split:
                    continue
                example = self._example(record, path, place)
                if example.id in examples:
                    raise UserError(
                        f"{place}: its id '{example.id}' is that of {places[example.id]}; give each record of the "
                        "split an id of its own, or set LabelledTask.id_field = None."
                    )
                if split == TRAIN:
                    self._check_declared(example, place)
                examples[example.id], places[example.id] = example, place
        if not examples:
            raise UserError(f"{', '.join(paths)}: no record of split '{split}'; look at files and split_field.")
        return list(examples.values())

    def score(self, examples: Sequence[Labelled], predictions: Sequence[Any]) -> dict[str, float]:
        return metrics.score(self.metrics, [example.target for example in examples], predictions)

    def unseen_labels(self, split: str) -> list[str]:
        """Labels of a split that no training example has, sorted; empty for kinds without labels."""
        return sorted(self._labels_of(split) - self._labels_of(TRAIN))

    def absent_labels(self, split: str) -> list[str]:
        """The task's labels that no example of a split has: nothing will be known of them."""
        found = self._labels_of(split)
        return [label for label in self.labels if label not in found]

    def _labels_of(self, split: str) -> set[str]:
        if self.kind not in _LABELLED:
            return set()
        return {label for example in self.examples(split) for label in _labels(example.target)}

    def _check_declared(self, example: Labelled, place: str) -> None:
        if self.kind in _LABELLED and self.labels:
            for label in _labels(example.target):
                if label not in self.labels:
                    raise UserError(f"{place}: label '{label}' is not declared; add it to LabelledTask.labels.")

    def _example(self, record: Record, path: str, place: str) -> Labelled:
        fields, name = record.fields, f"{Path(path).name}:{record.line}"
        if self.id_field is not None and (self.id_field in fields or self.id_field != "id"):
            name = text_of(fields, self.id_field, place)
        inputs = filled(self.input_template, fields, place)
        return Labelled(name, inputs, self._target(fields, inputs, place), fields)

    def _target(self, fields: Mapping[str, Any], inputs: str, place: str) -> Any:
        if self.kind == "spans":
            answers = field_of(fields, self.target_field, place)
            answers = [answers] if isinstance(answers, str) else answers
            if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
                raise UserError(f"{place}: field '{self.target_field}' is no answer or list of answers; mend it.")
            return [answer for answer in answers if answer.strip()]
        text = text_of(fields, self.target_field, place)
        if not text.strip():
            raise UserError(f"{place}: the target, field '{self.target_field}', is empty; fill it or drop the record.")
        if self.kind != "tagging":
            return text
        tags, words = text.split(), inputs.split()
        if len(tags) != len(words):
            raise UserError(f"{place}: {len(tags)} tags for {len(words)} words; give each whitespace token one tag.")
        return tags


def _labels(target: str | Sequence[str]) -> Sequence[str]:
    return [target] if isinstance(target, str) else target


# --- SeqIO ---


def register_labelled(task: LabelledTask, vocabulary: Vocabulary | ByteVocabulary) -> "seqio.Task":
    """Adds the task to SeqIO: `inputs` and `targets` (int32 [n], cut to `sequence_length` and closed by EOS).

    Targets are text: tags with blanks between, the first answer of spans ("" for none). Its metric functions are the
    task's metrics over postprocessed texts. A task that is registered already is used again.

    Raises:
      UserError: SeqIO has another task or mixture of this name.
    """
    import seqio

    feature = seqio.Feature(vocabulary.as_seqio(), add_eos=True)
    if task.name in seqio.TaskRegistry.names():
        known = seqio.TaskRegistry.get(task.name)
        ours = any(getattr(function, "keywords", {}) == {"task": task} for function in known.metric_fns)
        if ours and known.output_features["targets"].vocabulary == feature.vocabulary:
            return known
    if task.name in (*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()):
        raise UserError(f"SeqIO has a task or mixture '{task.name}' already; change LabelledTask.name.")
    return seqio.TaskRegistry.add(
        task.name,
        source=seqio.FunctionDataSource(functools.partial(_dataset, task=task), splits=task.splits),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        output_features={"inputs": feature, "targets": feature},
        postprocess_fn=functools.partial(_postprocess, task=task),
        metric_fns=[functools.partial(_scores, task=task)],
    )


def _dataset(
    split: str, shuffle_files: bool = False, seed: int | None = None, *, task: LabelledTask
) -> "tf.data.Dataset":
    import tensorflow as tf

    del shuffle_files, seed  # Files are read in one order; SeqIO shuffles examples behind it.
    columns: dict[str, list[str]] = {"id": [], "inputs": [], "targets": [], "answer": []}
    for example in task.examples(split):
        text = example.target
        if task.kind == "spans":
            text = next(iter(example.target), "")
        elif task.kind == "tagging":
            text = " ".join(example.target)
        values = (example.id, example.inputs, text, json.dumps(example.target))
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return tf.data.Dataset.from_tensor_slices(columns)


def _postprocess(text: str, example: Mapping[str, Any], is_target: bool = False, *, task: LabelledTask) -> Any:
    """The target as the task has it, or a prediction in the form that the metrics take."""
    answer = json.loads(example["answer"])
    if is_target:
        return answer
    if task.kind != "tagging":
        return text
    tags = [tag if tag in task.labels else "O" for tag in text.split()]
    return (tags + ["O"] * len(answer))[: len(answer)]


def _scores(targets: Sequence[Any], predictions: Sequence[Any], *, task: LabelledTask) -> dict[str, float]:
    return metrics.score(task.metrics, targets, predictions)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class SeqioTask(Task):
    """A registered SeqIO task whose `inputs` and `targets` are written as text, with its own metrics.

    Attributes:
      task_name: name of the task in SeqIO's registry.
      module: module to import first, which registers the task.
    """

    task_name: str
    module: str | None = None

    kind = "text_to_text"
    labels = ()

    @property
    def name(self) -> str:
        return self.task_name

    @property
    def metrics(self) -> list[str]:
        """Names of the functions of the task that take texts."""
        return [getattr(function, "__name__", str(function)) for function in self._task.predict_metric_fns]

    @property
    def splits(self) -> list[str]:
        return list(self._task.splits)

    @property
    def _task(self) -> "seqio.Task":
        return registered_task(self.task_name, self.module, "SeqioTask.module")

    def examples(self, split: str) -> list[Labelled]:
        """Texts before tokenisation where the task keeps them (`inputs_pretokenized`), else decoded."""
        if split not in self.splits:
            raise UserError(f"SeqIO task '{self.task_name}' has no split '{split}', only {', '.join(self.splits)}.")
        dataset = self._task.get_dataset(sequence_length=None, split=split, shuffle=False)
        examples = []
        for number, example in enumerate(dataset.as_numpy_iterator(), 1):
            fields = python_fields(example)
            examples.append(
                Labelled(f"{split}:{number}", self._said(fields, "inputs"), self._said(fields, "targets"), fields)
            )
        if not examples:
            raise UserError(f"SeqIO task '{self.task_name}': split '{split}' has no examples.")
        return examples

    def score(self, examples: Sequence[Labelled], predictions: Sequence[str]) -> dict[str, float]:
        """What the task's own metric functions say of its own postprocessed targets and predictions."""
        targets = [self._task.postprocess_fn(e.target, example=e.fields, is_target=True) for e in examples]
        found = [
            self._task.postprocess_fn(text, example=e.fields, is_target=False)
            for e, text in zip(examples, predictions, strict=True)
        ]
        values: dict[str, float] = {}
        for function in self._task.predict_metric_fns:
            values.update(function(targets, found))
        return {name: float(getattr(value, "value", value)) for name, value in values.items()}

    def _said(self, fields: Mapping[str, Any], feature: str) -> str:
        if f"{feature}_pretokenized" in fields:
            return fields[f"{feature}_pretokenized"]
        return self._task.output_features[feature].vocabulary.decode(fields[feature])
