import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Component, Corpus, Mixture, SeqioTaskSource, register
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.objectives.span_corruption import SpanCorruption

VOCABULARY = ByteVocabulary(extra_ids=30)
LENGTHS = {"inputs": 64, "targets": 14}  # T5's helper: 70 raw tokens


@dataclasses.dataclass(frozen=True)
class Copy:
    """Inputs and targets are the raw tokens, so that they can be followed through SeqIO."""

    name: str = "copy"

    def raw_length(self, lengths):
        return lengths["inputs"] - 1

    def __call__(self, tokens, rng, vocabulary):
        closed = np.append(tokens, vocabulary.eos_id).astype(np.int32)
        return {"inputs": closed, "targets": closed[-2:]}


def corpus(tmp_path, name, letter, count=50):
    path = tmp_path / f"{name}.jsonl"
    texts = [letter * (20 + i) for i in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Corpus(name, JsonlSource({"train": str(path)}))


@pytest.fixture
def empty_registry():
    import seqio

    seqio.TaskRegistry.reset()
    seqio.MixtureRegistry.reset()
    return seqio


def test_mixture_reads_through_seqio(tmp_path, empty_registry):
    seqio = empty_registry
    a, b = corpus(tmp_path, "aaa", "a"), corpus(tmp_path, "bbb", "b")
    register(Mixture("mix", [Component(a, Copy(), 3.0), Component(b, Copy(), 1.0)]), VOCABULARY)
    assert set(seqio.TaskRegistry.names()) == {"aaa_copy", "bbb_copy"}
    mixture = seqio.get_mixture_or_task("mix")
    assert [mixture.get_rate(task) for task in mixture.tasks] == [3.0, 1.0]
    dataset = mixture.get_dataset(LENGTHS, split="train", shuffle=False, seed=1).take(400)
    counts = {"a": 0, "b": 0}
    for example in dataset.as_numpy_iterator():
        assert example["inputs"].dtype == example["targets"].dtype == np.int32
        counts[VOCABULARY.decode(example["inputs"])[0]] += 1
    # binomial(400, 3/4): 300, standard deviation 8.7; six of them are 52
    assert abs(counts["a"] - 300) < 52


def test_documents_are_joined_and_cut(tmp_path, empty_registry):
    register(Mixture("mix", [Component(corpus(tmp_path, "aaa", "a"), Copy())]), VOCABULARY)
    task = empty_registry.get_mixture_or_task("aaa_copy")
    examples = list(task.get_dataset(LENGTHS, split="train", shuffle=False).as_numpy_iterator())
    raw_tokens = sum(20 + i for i in range(50))
    assert [len(example["inputs"]) for example in examples] == [64] * (raw_tokens // 63) + [raw_tokens % 63 + 1]
    whole = list(task.get_dataset(None, split="train", shuffle=False).as_numpy_iterator())
    assert [len(example["inputs"]) - 1 for example in whole] == [20 + i for i in range(50)]


def test_objective_is_seeded(tmp_path, empty_registry):
    register(Mixture("mix", [Component(corpus(tmp_path, "aaa", "a"), SpanCorruption())]), VOCABULARY)
    task = empty_registry.get_mixture_or_task("aaa_span_corruption")

    def inputs(seed):
        dataset = task.get_dataset(LENGTHS, split="train", shuffle=False, seed=seed).take(3)
        return [example["inputs"].tolist() for example in dataset.as_numpy_iterator()]

    first = inputs(0)
    assert [len(ids) for ids in first] == [64] * 3
    assert first[0] != first[1]  # the same text (all "a"), another mask
    assert first == inputs(0)
    assert first != inputs(1)


def test_names_that_are_taken(tmp_path, empty_registry):
    mixture = Mixture("mix", [Component(corpus(tmp_path, "aaa", "a"), Copy())])
    register(mixture, VOCABULARY)
    with pytest.raises(UserError, match="SeqIO has a task or mixture 'aaa_copy' already"):
        register(mixture, VOCABULARY)


def test_source_of_a_registered_task(tmp_path, monkeypatch, empty_registry):
    seqio = empty_registry
    (tmp_path / "their_tasks.py").write_text(
        "import functools, seqio, tensorflow as tf\n"
        "def texts(split, shuffle_files):\n"
        "    return tf.data.Dataset.from_tensor_slices({'text': ['one', 'two'], 'year': [1, 2]})\n"
        "feature = seqio.Feature(seqio.ByteVocabulary(0))\n"
        "seqio.TaskRegistry.add('theirs', seqio.FunctionDataSource(texts, ['train'], {'train': 2}),\n"
        "    output_features={'targets': feature}, preprocessors=[\n"
        "    functools.partial(seqio.preprocessors.rekey, key_map={'targets': 'text', 'year': 'year'}),\n"
        "    seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(), seqio.preprocessors.append_eos])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = SeqioTaskSource("theirs", "their_tasks", text_field="targets_pretokenized", metadata_fields=["year"])
    assert source.splits == ["train"]
    documents = list(source.documents("train"))
    assert [(document.text, document.metadata) for document in documents] == [
        ("one", {"year": 1}),
        ("two", {"year": 2}),
    ]
    decoded = SeqioTaskSource("theirs", text_field="targets")
    assert [document.text for document in decoded.documents("train")] == ["one", "two"]
    assert source.describe()["parts"] == {"train": [["train", 2]]}
    with pytest.raises(UserError, match="no split 'test', only train"):
        source.parts("test")
    with pytest.raises(UserError, match="SeqIO has no task 'nobody'; set SeqioTaskSource.module"):
        list(SeqioTaskSource("nobody").documents("train"))
    with pytest.raises(UserError, match="module 'no_such_module' cannot be imported"):
        list(SeqioTaskSource("theirs", "no_such_module").documents("train"))
    assert seqio.TaskRegistry.names()


def test_mistakes_in_mixtures(tmp_path):
    aaa = corpus(tmp_path, "aaa", "a")
    with pytest.raises(UserError, match="Mixture 'mix' has no components"):
        Mixture("mix", [])
    with pytest.raises(UserError, match="Mixture 'mix' has 'aaa_copy' twice"):
        Mixture("mix", [Component(aaa, Copy()), Component(aaa, Copy())])
    with pytest.raises(UserError, match="two different corpora named 'aaa'"):
        Mixture("mix", [Component(aaa, Copy()), Component(dataclasses.replace(aaa, version=2), Copy("other"))])
    with pytest.raises(UserError, match="Component.rate of corpus 'aaa' is 0; it must be above 0"):
        Component(aaa, Copy(), 0)
    with pytest.raises(UserError, match="Corpus.name is '../x'"):
        Corpus("../x", aaa.source)
    mixture = Mixture("mix", [Component(aaa, Copy()), Component(aaa, Copy("other"))])
    assert mixture.corpora == [aaa]


def test_training_modules_import_neither_tensorflow_nor_seqio():
    program = (
        "import sys, t5x_domain.data.preparation, t5x_domain.data.tasks\n"
        "print([name for name in ('tensorflow', 'seqio', 'jax', 'apache_beam') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
