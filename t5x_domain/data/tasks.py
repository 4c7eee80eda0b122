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
    """A corpus learnt with an objective; `rate` is its share of a mixture's examples, relative to the other rates."""

    corpus: Corpus
    objective: "Objective"
    rate: float = 1.0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise UserError(f"Component.rate of corpus '{self.corpus.name}' is {self.rate}; it must be above 0.")

    @property
    def name(self) -> str:
        return f"{self.corpus.name}_{self.objective.name}"


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


def register(mixture: Mixture, vocabulary: Vocabulary | ByteVocabulary) -> "seqio.Mixture":
    """Adds a SeqIO task for every component and the SeqIO mixture of them with its rates.

    `seqio.get_mixture_or_task(mixture.name).get_dataset(sequence_length=…, split=…)` then gives `inputs` and `targets`
    (int32 [n], closed by EOS). Documents are joined and cut to the objective's raw length for `sequence_length`, as in
    the loader; with `sequence_length=None` each document is one example.

    Raises:
      UserError: a task or mixture of this name is registered already.
    """
    import seqio

    for component in mixture.components:
        _register_task(component, vocabulary.as_seqio(), vocabulary)
    rates = [(component.name, component.rate) for component in mixture.components]
    return _register(seqio.MixtureRegistry, mixture.name, tasks=rates)


def _register_task(
    component: Component, seqio_vocabulary: "seqio.Vocabulary", vocabulary: Vocabulary | ByteVocabulary
) -> None:
    import seqio
    import tensorflow as tf

    source = component.corpus.source

    def texts(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # A stream has one order; SeqIO shuffles examples behind it.
        return tf.data.Dataset.from_generator(
            lambda: ({"text": document.text} for document in source.documents(split)),
            output_signature={"text": tf.TensorSpec([], tf.string)},
        )

    feature = seqio.Feature(seqio_vocabulary, add_eos=False)  # The objective closes both sequences itself.
    _register(
        seqio.TaskRegistry,
        component.name,
        source=seqio.FunctionDataSource(texts, splits=source.splits),
        preprocessors=[
            functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
            functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
            seqio.CacheDatasetPlaceholder(),
            functools.partial(_join_and_cut, objective=component.objective),
            functools.partial(_apply_objective, objective=component.objective, vocabulary=vocabulary),
        ],
        output_features={"inputs": feature, "targets": feature},
    )


def _register(registry: Any, name: str, **arguments: Any) -> Any:
    if name in registry.names():
        raise UserError(f"SeqIO has a task or mixture '{name}' already; rename the corpus, objective or mixture.")
    return registry.add(name, **arguments)


def _join_and_cut(
    dataset: "tf.data.Dataset", sequence_length: Mapping[str, int] | None, *, objective: "Objective"
) -> "tf.data.Dataset":
    tokens = dataset.map(lambda features: features["targets"])
    return tokens if sequence_length is None else tokens.rebatch(objective.raw_length(sequence_length))


def _apply_objective(
    dataset: "tf.data.Dataset", *, objective: "Objective", vocabulary: Vocabulary | ByteVocabulary
) -> "tf.data.Dataset":
    import seqio
    import tensorflow as tf

    def example(tokens: np.ndarray, seed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features = objective(tokens, np.random.default_rng(seed.astype(np.uint32)), vocabulary)
        return features["inputs"], features["targets"]

    @seqio.map_over_dataset(num_seeds=1)
    def examples(tokens: tf.Tensor, seed: tf.Tensor) -> dict[str, tf.Tensor]:
        features = tf.numpy_function(example, [tokens, seed], [tf.int32, tf.int32])
        return {name: tf.ensure_shape(x, [None]) for name, x in zip(("inputs", "targets"), features, strict=True)}

    return examples(dataset)


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

    def parts(self, split: str) -> list[str]:
        if split not in self.splits:
            raise UserError(f"SeqIO task '{self.task_name}' has no split '{split}', only {', '.join(self.splits)}.")
        return [split]

    def part_size(self, part: str) -> int:
        """Number of examples if the task knows it, else 0."""
        return self._task.source.num_input_examples(part) or 0

    @property
    def _task(self) -> "seqio.Task":
        import seqio

        try:
            if self.module:
                importlib.import_module(self.module)
        except ImportError as error:
            raise UserError(f"SeqioTaskSource.module '{self.module}' cannot be imported: {error}.") from error
        if self.task_name not in seqio.TaskRegistry.names():
            raise UserError(
                f"SeqIO has no task '{self.task_name}'; set SeqioTaskSource.module to the module that registers it."
            )
        return seqio.TaskRegistry.get(self.task_name)

    def _records(self, split: str, part: str) -> Iterator[tuple[int, str, Mapping | BadRecord]]:
        task = self._task
        dataset = task.preprocess_precache(task.source.get_dataset(split=split, shuffle=False), seed=0)
        for number, fields in enumerate(dataset.as_numpy_iterator(), 1):
            fields = python_fields(fields)
            if self.text_field in fields and isinstance(fields[self.text_field], list):
                ids = fields[self.text_field]
                fields[self.text_field] = task.output_features[self.text_field].vocabulary.decode(ids)
            yield number, f"SeqIO task {self.task_name}, split {split}, record {number}", fields
