"""What the loader makes, against what SeqIO makes of the same documents and examples."""

import json

import numpy as np
import pytest

from t5x_domain.data import tasks
from t5x_domain.data.cache import TokenCache
from t5x_domain.data.curriculum import Phase
from t5x_domain.data.loader import Batches
from t5x_domain.data.packing import DecoderOnly, EncoderDecoder, Example
from t5x_domain.data.preparation import prepare
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.objectives.span_corruption import SpanCorruption


def example(inputs, targets):
    return Example(np.array(inputs, np.int32), np.array(targets, np.int32), 0)


@pytest.mark.parametrize("layout, converter", [("EncoderDecoder", "EncDec"), ("DecoderOnly", "PrefixLM")])
def test_equals_seqio(layout, converter):
    """The same stream of examples through SeqIO's packing converter. SeqIO fills rows in order, so rows are told apart
    by its segment ids and compared one by one."""
    import seqio
    import tensorflow as tf

    rng = np.random.default_rng(0)
    pairs = [[rng.integers(2, 99, size).tolist() + [1] for size in rng.integers(1, 9, 2)] for _ in range(40)]
    lengths = {"inputs": 24, "targets": 20}
    dataset = tf.data.Dataset.from_generator(
        lambda: ({"inputs": inputs, "targets": targets} for inputs, targets in pairs),
        output_signature={name: tf.TensorSpec([None], tf.int32) for name in lengths},
    )
    theirs = list(
        getattr(seqio, f"{converter}FeatureConverter")(pack=True, apply_length_check=False)(
            dataset, task_feature_lengths=lengths
        ).as_numpy_iterator()
    )
    stream, rows = iter(pairs), []
    for row in theirs:
        rows.append([example(*next(stream)) for _ in range(row["decoder_segment_ids"].max())])
    assert next(stream, None) is None and len(rows) > 5
    ours = {"EncoderDecoder": EncoderDecoder, "DecoderOnly": DecoderOnly}[layout]().batch(rows, lengths)
    ours["decoder_causal_attention"] = ours.pop("decoder_prefix", None)
    for name in theirs[0]:
        np.testing.assert_array_equal(ours[name], [row[name] for row in theirs], err_msg=name)


VOCABULARY = ByteVocabulary(extra_ids=30)
LENGTHS = {"inputs": 64, "targets": 14}  # T5's helper: 70 raw tokens -> 64 inputs, 14 targets, 3 spans


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents") / "text.jsonl"
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), rng.integers(5, 120))) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = tasks.Corpus("parity", JsonlSource({"train": str(path)}))
    return tasks.Mixture("parity_mixture", [tasks.Component(corpus, SpanCorruption())])


def raw_tokens(examples):
    """All text ids in the examples, counted; the spans of the targets belong to the text as well."""
    ids = np.concatenate([np.concatenate([inputs, targets]) for inputs, targets in examples])
    return np.bincount(ids[(ids > 2) & (ids < 259)])


def test_loader_and_seqio_task_make_the_same_kind_of_examples(mixture, tmp_path):
    import seqio

    tasks.register(mixture, VOCABULARY)
    dataset = seqio.get_mixture_or_task(mixture.name).get_dataset(
        sequence_length=LENGTHS, split="train", shuffle=False, num_epochs=1
    )
    theirs = [(features["inputs"], features["targets"]) for features in dataset.as_numpy_iterator()]

    prepare([Phase(mixture)], VOCABULARY, str(tmp_path))
    cache = TokenCache.open(tmp_path, "parity", vocabulary_fingerprint=VOCABULARY.fingerprint, version=1)
    batches = Batches(
        [cache.split("train")],
        mixture,
        VOCABULARY,
        lengths=LENGTHS,
        layout=EncoderDecoder(),
        batch_size=4,
        seed=0,
        epochs=1,
    )
    ours = [
        (inputs[inputs_segment > 0], targets[targets_segment > 0])
        for batch in batches
        for inputs, inputs_segment, targets, targets_segment in zip(
            batch["encoder_input_tokens"],
            batch["encoder_segment_ids"],
            batch["decoder_target_tokens"],
            batch["decoder_segment_ids"],
            strict=True,
        )
        if inputs_segment.any()
    ]
    assert len(ours) == len(theirs) > 40
    np.testing.assert_array_equal(raw_tokens(ours), raw_tokens(theirs), err_msg="the same text, all of it")
    sentinels = 288 - np.arange(3)
    for examples in (ours, theirs):
        assert {feature.dtype for pair in examples for feature in pair} == {np.dtype(np.int32)}
        assert all(feature[-1] == 1 for pair in examples for feature in pair)
        full = [pair for pair in examples if len(pair[0]) == 64]
        assert len(full) == len(examples) - 1, "all but the remainder are full"
        for inputs, targets in full:
            assert len(targets) == 14
            np.testing.assert_array_equal(inputs[inputs > 258], sentinels)
            np.testing.assert_array_equal(targets[targets > 258], sentinels)
