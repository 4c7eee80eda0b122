"""Corpora and mixtures: what a run learns from, and the same as SeqIO tasks and mixtures.

A `Mixture` names its components, each a corpus learnt with an objective at a rate. `register` makes SeqIO tasks and a
SeqIO mixture of it for other SeqIO users; `SeqioTaskSource` takes a task that somebody registered as a source.
TensorFlow and SeqIO are imported by these two only: training from a prepared cache needs neither.
"""

import dataclasses
import functools
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gin
import numpy as np

from t5x_domain.data.sources import BadRecord, Source, python_fields
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError

if TYPE_CHECKING:
    import seqio
    import tensorflow as tf

    from t5x_domain.objectives.base import Objective
    from t5x_domain.objectives.prefix import Metadata, Mode


# The mode that a component was trained with.
AS_TRAINED = object()


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents under one name.

    Attributes:
      name: letters, digits and underscores; names the folder in the token cache.
      source: where the documents are.
      version: raise it when the documents change in a way that their files' names and sizes do not show.
    """

    name: str
    source: Source
    version: int = 1

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+", self.name):
            raise UserError(f"Corpus.name is '{self.name}'; it may have letters, digits and underscores only.")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Component:
    """A corpus learnt with an objective.

    Attributes:
      corpus: the documents.
      objective: makes examples of them.
      rate: share of the mixture, relative to the other rates: of its rows with 'concat_and_split', of its text with
        'first_fit'.
      mode: mode token before every example; None for none.
      metadata: the document's metadata before it; None for none.
    """

    corpus: Corpus
    objective: "Objective"
    rate: float = 1.0
    mode: "Mode | None" = None
    metadata: "Metadata | None" = None

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise UserError(f"Component.rate of corpus '{self.corpus.name}' is {self.rate}; it must be above 0.")

    @property
    def name(self) -> str:
        return f"{self.corpus.name}_{self.objective.name}"

    def conditioned(self, metadata: str | Mapping[str, Any] | None, mode: Any = AS_TRAINED) -> "Component":
        """The component as it is to be asked: with these metadata and in this mode.

        Args:
          metadata: None for none; "own" for every document's own; {field: value} for these before every document.
          mode: a `Mode` instead of the component's own, or None for none.

        Raises:
          UserError: it was declared without metadata, hence has no template for them.
        """
        if metadata is not None and self.metadata is None:
            raise UserError(
                f"metadata={metadata!r}: '{self.name}' was trained without metadata; leave it out, or train with "
                "mixture_of_denoisers.metadata = @Metadata()."
            )
        before = None
        if metadata is not None:
            fields = None if metadata == "own" else dict(metadata)
            before = dataclasses.replace(self.metadata, rate=1.0, fields=fields)
        return dataclasses.replace(self, metadata=before, mode=self.mode if mode is AS_TRAINED else mode)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Mixture:
    """Components mixed by rate."""

    name: str
    components: Sequence[Component]

    def __post_init__(self) -> None:
        names = [component.name for component in self.components]
        if not names:
            raise UserError(f"Mixture '{self.name}' has no components; set Mixture.components.")
        if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise UserError(f"Mixture '{self.name}' has '{repeated[0]}' twice; give each objective a name of its own.")
        for component in self.components:
            if component.corpus != self._corpora_by_name[component.corpus.name]:
                raise UserError(
                    f"Mixture '{self.name}' has two different corpora named '{component.corpus.name}'; rename one."
                )

    @property
    def _corpora_by_name(self) -> dict[str, Corpus]:
        return {component.corpus.name: component.corpus for component in self.components}

    @property
    def corpora(self) -> list[Corpus]:
        """Each corpus once, in the order of the components."""
        return list(self._corpora_by_name.values())

    @property
    def special_tokens(self) -> list[str]:
        """Mode tokens that need an id of their own in the vocabulary."""
        modes = [component.mode for component in self.components if component.mode]
        return list(dict.fromkeys(mode.token for mode in modes if not mode.as_text))


def register(mixture: Mixture, vocabulary: Vocabulary | ByteVocabulary) -> "seqio.Mixture":
    """Adds a SeqIO task for every component and the SeqIO mixture of them with its rates.

    `seqio.get_mixture_or_task(mixture.name).get_dataset(sequence_length=…, split=…)` then gives `inputs` and `targets`
    (int32 [n], closed by EOS), metadata and mode token at the front of `inputs`. Documents are joined and cut to the
    objective's raw length for `sequence_length`, as in the loader; with metadata each is cut by itself. With
    `sequence_length=None` each document is one example. What is registered already is used again. `get_dataset` refuses
    a `sequence_length` whose `targets` are too short for an objective.

    Raises:
      UserError: a task or mixture of this name is registered already and is another, or an objective predicts tokens
        where they stand in an encoder: which ones it chose, SeqIO's two features cannot say.
    """
    for component in mixture.components:
        if component.objective.target_side == "encoder":
            raise UserError(
                f"{component.name}: a SeqIO task has inputs and targets, but cannot say which of them "
                f"'{component.objective.name}' chose; register objectives that a decoder learns."
            )
    import seqio

    for component in mixture.components:
        _register_task(component, vocabulary)
    rates = [(component.name, component.rate) for component in mixture.components]
    if mixture.name in seqio.MixtureRegistry.names():
        known = seqio.MixtureRegistry.get(mixture.name)
        if {task.name: known.get_rate(task) for task in known.tasks} == dict(rates):
            return known
    return _register(seqio.MixtureRegistry, mixture.name, tasks=rates)


def _register_task(component: Component, vocabulary: Vocabulary | ByteVocabulary) -> None:
    import seqio
    import tensorflow as tf

    # A rate belongs to the mixture, not to the task.
    component = dataclasses.replace(component, rate=1.0)
    if component.name in seqio.TaskRegistry.names():
        ours = {"component": component, "vocabulary": vocabulary}
        last = seqio.TaskRegistry.get(component.name).preprocessors[-1:]
        if any(getattr(step, "keywords", {}) == ours for step in last):
            return
    source, metadata = component.corpus.source, component.metadata

    def texts(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # A stream has one order; SeqIO shuffles examples behind it.
        return tf.data.Dataset.from_generator(
            lambda: (
                {"text": document.text, "metadata": metadata.text(document.metadata) if metadata else ""}
                for document in source.documents(split)
            ),
            output_signature={"text": tf.TensorSpec([], tf.string), "metadata": tf.TensorSpec([], tf.string)},
        )

    feature = seqio.Feature(vocabulary.as_seqio(), add_eos=False)  # The objective closes both sequences itself.
    key_map = {"targets": "text", "metadata": "metadata"}
    _register(
        seqio.TaskRegistry,
        component.name,
        source=seqio.FunctionDataSource(texts, splits=source.splits),
        preprocessors=[
            functools.partial(seqio.preprocessors.rekey, key_map=key_map),
            functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
            seqio.CacheDatasetPlaceholder(),
            functools.partial(_examples, component=component, vocabulary=vocabulary),
        ],
        output_features={"inputs": feature, "targets": feature},
    )


def _register(registry: Any, name: str, **arguments: Any) -> Any:
    if name in registry.names():
        raise UserError(f"SeqIO has a task or mixture '{name}' already; rename the corpus, objective or mixture.")
    return registry.add(name, **arguments)


def _examples(
    dataset: "tf.data.Dataset",
    sequence_length: Mapping[str, int] | None,
    *,
    component: Component,
    vocabulary: Vocabulary | ByteVocabulary,
) -> "tf.data.Dataset":
    """Documents (`targets`: int32 [n], `metadata`: text) -> examples."""
    import seqio
    import tensorflow as tf

    objective, metadata = component.objective, component.metadata
    mode = component.mode.ids(vocabulary) if component.mode else np.empty(0, np.int32)
    longest = None
    if sequence_length is not None:
        reserved = len(mode) + (metadata.max_tokens if metadata else 0)
        room = {**sequence_length, "inputs": sequence_length["inputs"] - reserved}
        if room["inputs"] < 0:
            raise UserError(
                f"{component.name}: metadata and mode token take up to {reserved} tokens, more than the inputs length "
                f"{sequence_length['inputs']}; raise it or lower Metadata.max_tokens."
            )
        objective.check(room, vocabulary)  # SeqIO would cut what is too long without a word.
        longest = objective.raw_length(room)

    def prefix(text: bytes, seed: np.ndarray) -> np.ndarray:
        carries = metadata is not None and np.random.default_rng(seed.astype(np.uint32)).random() < metadata.rate
        ids = vocabulary.encode(text.decode()) if carries and text else mode[:0]
        return np.concatenate([ids[: metadata.max_tokens] if metadata else ids, mode])

    def example(tokens: np.ndarray, before: np.ndarray, seed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features = objective(tokens, np.random.default_rng(seed.astype(np.uint32)), vocabulary)
        return np.concatenate([before, features["inputs"]]), features["targets"]

    @seqio.map_over_dataset(num_seeds=1)
    def with_prefix(document: Mapping[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
        before = tf.ensure_shape(tf.numpy_function(prefix, [document["metadata"], seed], tf.int32), [None])
        return {"tokens": document["targets"], "prefix": before}

    def pieces(document: Mapping[str, tf.Tensor]) -> tf.data.Dataset:
        chunks = tf.data.Dataset.from_tensor_slices(document["tokens"]).batch(longest)
        return chunks.map(lambda tokens: {"tokens": tokens, "prefix": document["prefix"]})

    @seqio.map_over_dataset(num_seeds=1)
    def examples(piece: Mapping[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
        features = tf.numpy_function(example, [piece["tokens"], piece["prefix"], seed], [tf.int32, tf.int32])
        return {name: tf.ensure_shape(x, [None]) for name, x in zip(("inputs", "targets"), features, strict=True)}

    if longest is not None and metadata is None:
        joined = dataset.map(lambda document: document["targets"]).rebatch(longest)
        dataset = joined.map(lambda tokens: {"targets": tokens, "metadata": ""})
    dataset = with_prefix(dataset)
    return examples(dataset if longest is None or metadata is None else dataset.flat_map(pieces))


@gin.configurable
@dataclasses.dataclass(frozen=True)
class SeqioTaskSource(Source):
    """Documents of a registered SeqIO task, as SeqIO itself would cache them: before `CacheDatasetPlaceholder`.

    If the field `text_field` holds token ids, e.g. "targets", they are decoded with the task's own vocabulary.

    Attributes:
      task_name: name of the task in SeqIO's registry.
      module: module to import first, which registers the task.
    """

    task_name: str
    module: str | None = None

    @property
    def splits(self) -> list[str]:
        return list(self._task.splits)

    def sized_parts(self, split: str) -> list[tuple[str, int]]:
        """The split, and its number of examples if the task knows it, else 0."""
        if split not in self.splits:
            raise UserError(f"SeqIO task '{self.task_name}' has no split '{split}', only {', '.join(self.splits)}.")
        return [(split, self._task.source.num_input_examples(split) or 0)]

    @property
    def _task(self) -> "seqio.Task":
        return registered_task(self.task_name, self.module, "SeqioTaskSource.module")

    def _records(self, split: str, part: str) -> Iterator[tuple[int, str, Mapping | BadRecord]]:
        task = self._task
        dataset = task.preprocess_precache(task.source.get_dataset(split=split, shuffle=False), seed=0)
        for number, fields in enumerate(dataset.as_numpy_iterator(), 1):
            fields = python_fields(fields)
            if self.text_field in fields and isinstance(fields[self.text_field], list):
                ids = fields[self.text_field]
                fields[self.text_field] = task.output_features[self.text_field].vocabulary.decode(ids)
            yield number, f"SeqIO task {self.task_name}, split {split}, record {number}", fields


def registered_task(name: str, module: str | None, setting: str) -> "seqio.Task":
    """A task of SeqIO's registry.

    Args:
      name: of the task.
      module: imported first, if given, since it registers the task.
      setting: what the module was given as, for messages.

    Raises:
      UserError: the module cannot be imported, or there is no such task.
    """
    import seqio

    try:
        if module:
            importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{setting} '{module}' cannot be imported: {error}.") from error
    if name not in seqio.TaskRegistry.names():
        raise UserError(f"SeqIO has no task '{name}'; set {setting} to the module that registers it.")
    return seqio.TaskRegistry.get(name)
