import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from t5x_domain.data.mixtures import mixture_of_denoisers
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Component, Corpus, Mixture, SeqioTaskSource, register
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary, train_sentencepiece
from t5x_domain.errors import UserError
from t5x_domain.objectives.base import Objective
from t5x_domain.objectives.language_modeling import CausalLM
from t5x_domain.objectives.prefix import Metadata, Mode, prefix_ids
from t5x_domain.objectives.span_corruption import SpanCorruption

VOCABULARY = ByteVocabulary(extra_ids=30)
LENGTHS = {"inputs": 64, "targets": 14}  # T5's helper: 70 raw tokens


@dataclasses.dataclass(frozen=True)
class Copy(Objective):
    """Inputs and targets are the raw tokens, so that they can be followed through SeqIO."""

    name: str = "copy"

    def lengths(self, num_raw):
        return num_raw + 1, 2

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


def test_what_is_registered_is_used_again(tmp_path, empty_registry):
    a, b = corpus(tmp_path, "aaa", "a"), corpus(tmp_path, "bbb", "b")
    first = Mixture("first", [Component(a, Copy(), 3.0), Component(b, Copy(), 1.0)])
    registered = register(first, VOCABULARY)
    assert register(first, VOCABULARY) is registered
    # Two mixtures share a component; its rate is the mixture's, not the task's.
    second = register(Mixture("second", [Component(a, Copy(), 0.5), Component(a, Copy("other"))]), VOCABULARY)
    assert set(empty_registry.TaskRegistry.names()) == {"aaa_copy", "bbb_copy", "aaa_other"}
    task = empty_registry.TaskRegistry.get("aaa_copy")
    assert (registered.get_rate(task), second.get_rate(task)) == (3.0, 0.5)


def test_names_that_are_taken(tmp_path, empty_registry):
    aaa = corpus(tmp_path, "aaa", "a")
    register(Mixture("mix", [Component(aaa, Copy())]), VOCABULARY)
    with pytest.raises(UserError, match="SeqIO has a task or mixture 'mix' already; rename the corpus, objective or"):
        register(Mixture("mix", [Component(aaa, Copy(), 2.0)]), VOCABULARY)
    others = [
        (Component(aaa, SpanCorruption(name="copy")), VOCABULARY),
        (Component(dataclasses.replace(aaa, version=2), Copy()), VOCABULARY),
        (Component(aaa, Copy(), metadata=Metadata()), VOCABULARY),
        (Component(aaa, Copy(), mode=Mode("[R]")), VOCABULARY),
        (Component(aaa, Copy()), ByteVocabulary(extra_ids=31)),
    ]
    for component, vocabulary in others:
        with pytest.raises(UserError, match="SeqIO has a task or mixture 'aaa_copy' already"):
            register(Mixture("other", [component]), vocabulary)
    empty_registry.TaskRegistry.add("bbb_copy", source=task_of_nobody(), output_features={}, preprocessors=[])
    with pytest.raises(UserError, match="SeqIO has a task or mixture 'bbb_copy' already"):
        register(Mixture("other", [Component(corpus(tmp_path, "bbb", "b"), Copy())]), VOCABULARY)


def task_of_nobody():
    import seqio

    return seqio.FunctionDataSource(lambda split, shuffle_files: None, ["train"])


# --- Mode tokens and metadata. A text is told by its letters, a site by its name.

SITES = {"law": "https://law.org/x", "med": "https://med.org/y"}
WIDE = ByteVocabulary(extra_ids=100)
# 22 tokens of metadata at most and 5 of mode leave 200 of the inputs; x3_50 then needs 50 sentinels.
UL2_LENGTHS = {"inputs": 227, "targets": 200}
METADATA = Metadata(("URL: {url:domain}\n\n",), max_tokens=22)


def corpus_with_sites(tmp_path, name, letters, lengths, url=True):
    path = tmp_path / f"{name}.jsonl"
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(letters), size)) for size in lengths]
    fields = {"url": SITES[name]} if url else {}
    path.write_text("".join(json.dumps({"text": text, **fields}) + "\n" for text in texts))
    return Corpus(name, JsonlSource({"train": str(path)})), texts


def restored(inputs, targets):
    """The text that an example was made of: spans in the place of their sentinels, or inputs and targets joined."""
    inputs, targets = inputs[:-1], targets[:-1]
    starts = np.flatnonzero(targets > 258)
    spans = {span[0]: span[1:].tolist() for span in np.split(targets, starts)[1:]} if len(starts) else {}
    text = [token for place in inputs for token in spans.get(place, [place])]
    return WIDE.decode(text if spans else [*text, *targets])


def examples_of(task, lengths, **options):
    return list(task.get_dataset(lengths, split="train", shuffle=False, **options).as_numpy_iterator())


def test_metadata_and_mode_stand_before_every_piece(tmp_path, empty_registry):
    """Documents are not joined: each is cut by itself, and every piece carries the document's metadata, then the mode.
    The rest of the example is the objective's own and gives the text back, so the targets were left alone."""
    law, texts = corpus_with_sites(tmp_path, "law", "abcdefgh ", [5, 90, 1000, 300, 1])
    mixture = mixture_of_denoisers([law], metadata=METADATA)
    register(mixture, WIDE)
    site = WIDE.encode("URL: law.org\n\n").tolist()
    for component in mixture.components:
        examples = examples_of(empty_registry.get_mixture_or_task(component.name), UL2_LENGTHS)
        before = site + WIDE.encode(component.mode.token).tolist()
        assert len(before) == 14 + 5
        longest = component.objective.raw_length({"inputs": 200, "targets": 200})
        pieces = [text[start : start + longest] for text in texts for start in range(0, len(text), longest)]
        assert len(pieces) > len(texts) or longest > 1000
        assert len(examples) == len(pieces)
        for example, piece in zip(examples, pieces, strict=True):
            inputs, targets = example["inputs"], example["targets"]
            assert inputs.dtype == targets.dtype == np.int32
            assert inputs[: len(before)].tolist() == before
            assert restored(inputs[len(before) :], targets) == piece
            assert inputs[-1] == targets[-1] == 1
            assert (len(inputs) - len(before), len(targets)) == component.objective.lengths(len(piece))
            assert len(inputs) <= 227 and len(targets) <= 200
        # Without lengths every document is one example.
        if component.objective.sentinels_needed(1000) <= 100:
            whole = examples_of(empty_registry.get_mixture_or_task(component.name), None)
            assert all(example["inputs"][: len(before)].tolist() == before for example in whole)
            assert [restored(e["inputs"][len(before) :], e["targets"]) for e in whole] == texts


def test_documents_are_joined_when_there_is_only_a_mode(tmp_path, empty_registry):
    law, texts = corpus_with_sites(tmp_path, "law", "abcdefgh ", [5, 90, 1000, 300, 1])
    register(mixture_of_denoisers([law], denoisers="s_only"), WIDE)
    examples = examples_of(empty_registry.get_mixture_or_task("law_s"), {"inputs": 205, "targets": 200})
    mode = WIDE.encode("[S2S]").tolist()
    assert all(example["inputs"][:5].tolist() == mode for example in examples)
    assert "".join(restored(e["inputs"][5:], e["targets"]) for e in examples) == "".join(texts)
    # 200 inputs are left: 265 tokens less their last quarter, round(66.25) = 66, and EOS.
    assert [len(restored(e["inputs"][5:], e["targets"])) for e in examples] == [265] * 5 + [1396 - 5 * 265]


def test_rates_of_denoisers_and_corpora(tmp_path, empty_registry):
    """ul2_442 over two corpora at 3 : 1, 1,000 examples. Binomial: six standard deviations of a share p are
    6 sqrt(1000 p (1 - p)), at most 93."""
    law, _ = corpus_with_sites(tmp_path, "law", "abcdefgh ", [400] * 40)
    med, _ = corpus_with_sites(tmp_path, "med", "stuvwxyz ", [400] * 40)
    mixture = mixture_of_denoisers([law, med], rates=[3.0, 1.0], metadata=METADATA, name="both")
    registered = register(mixture, WIDE)
    assert {task.name: registered.get_rate(task) for task in registered.tasks} == {
        component.name: component.rate for component in mixture.components
    }
    dataset = empty_registry.get_mixture_or_task("both").get_dataset(UL2_LENGTHS, split="train", shuffle=False, seed=1)
    counts = {}
    for example in dataset.take(1000).as_numpy_iterator():
        text = WIDE.decode(example["inputs"][example["inputs"] <= 258])
        site, mode = text[5:12], text[14:19]
        assert set(text[19:]) <= set("abcdefgh " if site == "law.org" else "stuvwxyz ")
        for key in (site, mode):
            counts[key] = counts.get(key, 0) + 1
    shares = {"law.org": 0.75, "med.org": 0.25, "[NLU]": 0.4, "[NLG]": 0.4, "[S2S]": 0.2}
    assert counts.keys() == shares.keys()
    for key, share in shares.items():
        assert abs(counts[key] - 1000 * share) < 6 * (1000 * share * (1 - share)) ** 0.5


def test_half_of_the_documents_carry_metadata(tmp_path, empty_registry):
    """Binomial(400, 1/2): 200, standard deviation 10, six of them 60. All pieces of a document agree, and another epoch
    draws anew: in 400 documents two draws agree 200 times, give or take 60."""
    law, texts = corpus_with_sites(tmp_path, "law", "abcdefgh ", [120] * 400)
    metadata = dataclasses.replace(METADATA, rate=0.5)
    mixture = mixture_of_denoisers([law], denoisers=[("R", 3, 0.15, None, 1.0)], metadata=metadata)
    register(mixture, WIDE)
    lengths = {"inputs": 22 + 64, "targets": 14}  # 64 inputs and 14 targets hold 70 tokens: two pieces each
    examples = examples_of(empty_registry.get_mixture_or_task("law_r3_15"), lengths, num_epochs=2)
    site = WIDE.encode("URL: law.org\n\n").tolist()
    carries = np.array([example["inputs"][:14].tolist() == site for example in examples]).reshape(2, 400, 2)
    assert (carries[..., 0] == carries[..., 1]).all()
    assert (abs(carries[..., 0].sum(1) - 200) < 60).all()
    assert abs((carries[0, :, 0] == carries[1, :, 0]).sum() - 200) < 60
    for carried, example, piece in zip(
        carries.ravel(), examples, [piece for text in texts * 2 for piece in (text[:70], text[70:])], strict=True
    ):
        assert restored(example["inputs"][14 * carried :], example["targets"]) == piece


def test_documents_without_the_field(tmp_path, empty_registry):
    law, _ = corpus_with_sites(tmp_path, "law", "abcdefgh ", [50] * 3, url=False)
    fallback = Metadata(("URL: {url:domain}\n\n", "Unknown.\n\n"))
    knobs = {"denoisers": [("R", 3, 0.15, None, 1.0)]}
    register(mixture_of_denoisers([law], metadata=fallback, **knobs), WIDE)
    for example in examples_of(empty_registry.get_mixture_or_task("law_r3_15"), {"inputs": 128, "targets": 64}):
        assert WIDE.decode(example["inputs"]).startswith("Unknown.\n\n")
    empty_registry.TaskRegistry.reset()
    register(mixture_of_denoisers([law], metadata=METADATA, name="without", **knobs), WIDE)
    # 50 tokens: 8 noisy (7.5, halves to even) in 3 spans, 42 + 3 + 1.
    examples = examples_of(empty_registry.get_mixture_or_task("law_r3_15"), {"inputs": 128, "targets": 64})
    assert [len(example["inputs"]) for example in examples] == [46] * 3


def test_long_metadata_are_cut_and_the_mode_is_not(tmp_path, empty_registry):
    law, texts = corpus_with_sites(tmp_path, "law", "abcdefgh ", [50] * 3)
    metadata = dataclasses.replace(METADATA, max_tokens=8)
    register(mixture_of_denoisers([law], denoisers="s_only", metadata=metadata), WIDE)
    for example, text in zip(
        examples_of(empty_registry.get_mixture_or_task("law_s"), {"inputs": 80, "targets": 64}), texts, strict=True
    ):
        assert WIDE.decode(example["inputs"][:13]) == "URL: law[S2S]"
        assert restored(example["inputs"][13:], example["targets"]) == text


def test_causal_examples_have_only_the_prefix_as_inputs(tmp_path, empty_registry):
    law, texts = corpus_with_sites(tmp_path, "law", "abcdefgh ", [50] * 3)
    register(Mixture("mix", [Component(law, CausalLM(), mode=Mode("[S2S]"), metadata=METADATA)]), WIDE)
    examples = examples_of(empty_registry.get_mixture_or_task("mix").tasks[0], {"inputs": 27, "targets": 64})
    assert [WIDE.decode(example["inputs"]) for example in examples] == ["URL: law.org\n\n[S2S]"] * 3
    assert [WIDE.decode(example["targets"]) for example in examples] == texts


def test_modes_with_ids_of_their_own(tmp_path, empty_registry):
    """Through SeqIO's own SentencePiece vocabulary as well."""
    law, texts = corpus_with_sites(tmp_path, "law", ["heart ", "liver ", "of "], [60] * 20)
    mixture = mixture_of_denoisers([law], mode_form="id", metadata=METADATA)
    path = str(tmp_path / "words.model")
    train_sentencepiece([*texts, "URL: law.org"], path, 280, special_tokens=mixture.special_tokens)
    vocabulary = Vocabulary(path, extra_ids=50)
    assert register(mixture, vocabulary).output_features["inputs"].vocabulary.vocab_size == 280 + 50
    for component in mixture.components:
        own = {"r": 3, "x": 4, "s": 5}[component.objective.name[0]]
        before = prefix_ids(vocabulary, metadata=METADATA, fields={"url": SITES["law"]}, mode=component.mode)
        assert before[-1] == own == vocabulary.special_id(component.mode.token)
        examples = examples_of(empty_registry.get_mixture_or_task(component.name), {"inputs": 103, "targets": 80})
        assert len(examples) >= 20
        for example in examples:
            assert example["inputs"][: len(before)].tolist() == before.tolist()
            assert not set(example["inputs"][len(before) :]) & {3, 4, 5}
            assert not set(example["targets"]) & {3, 4, 5}
    # Vocabularies without these ids.
    empty_registry.TaskRegistry.reset()
    register(dataclasses.replace(mixture, name="bytes"), WIDE)
    with pytest.raises(UserError, match=r"no id of its own for '\[R\]'"):
        examples_of(empty_registry.get_mixture_or_task("law_r3_15"), UL2_LENGTHS)


def test_lengths_that_would_lose_text(tmp_path, empty_registry):
    """SeqIO cuts features that are too long without a word, which would lose text, sentinels and EOS."""
    law, _ = corpus_with_sites(tmp_path, "law", "abcdefgh ", [50] * 3)
    register(mixture_of_denoisers([law], denoisers="x_only", metadata=METADATA), WIDE)

    def read(name, inputs, targets):
        examples_of(empty_registry.get_mixture_or_task(name), {"inputs": inputs, "targets": targets})

    with pytest.raises(UserError, match="x64_50: the targets length 199 is too short.*set targets to 200 or more"):
        read("law_x64_50", 227, 199)
    # 512 inputs need 128 sentinels; WIDE has 100.
    with pytest.raises(UserError, match="x3_50: .* need 128 sentinels"):
        read("law_x3_50", 512 + 27, 512)
    with pytest.raises(
        UserError, match="law_x3_50: metadata and mode token take up to 27 tokens, more than the inputs"
    ):
        read("law_x3_50", 26, 64)
    read("law_x64_50", 227, 200)


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
