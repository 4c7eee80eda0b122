import functools

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.data import packing
from t5x_domain.data.tasks import Component, Corpus
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary, train_sentencepiece
from t5x_domain.errors import UserError
from t5x_domain.evaluation.fill import Blank, compare, fill_spans
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder, EncoderOnly
from t5x_domain.models.config import ModelConfig
from t5x_domain.objectives.losses import language_model_loss
from t5x_domain.objectives.prefix import Metadata, Mode
from t5x_domain.objectives.span_corruption import SpanCorruption
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.training.state import Blueprint
from t5x_domain.training.step import make_train_step

BYTES = ByteVocabulary(extra_ids=8)
SENTINEL = [BYTES.sentinel_id(k) for k in range(8)]


def ids(*parts):
    """Sentinels (int) and text as token ids."""
    return np.array([i for part in parts for i in ([part] if isinstance(part, int) else BYTES.encode(part))], np.int32)


# `the cat sat on the mat` without `cat sat` and `mat`.
INPUTS = ids("the ", SENTINEL[0], " on the ", SENTINEL[1], BYTES.eos_id)
TARGETS = ids(SENTINEL[0], "cat sat", SENTINEL[1], "mat", BYTES.eos_id)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (ids(SENTINEL[0], "cat sat", SENTINEL[1], "mat", BYTES.eos_id), ["cat sat", "mat"]),
        (ids(SENTINEL[0], "cat sat", SENTINEL[1], "mat"), ["cat sat", "mat"]),  # no room for EOS
        (ids(SENTINEL[0], "dog", SENTINEL[1], "mat", BYTES.eos_id, SENTINEL[1], "x"), ["dog", "mat"]),
        (ids(SENTINEL[1], "mat", BYTES.eos_id), ["", "mat"]),  # missing
        (ids(SENTINEL[1], "mat", SENTINEL[0], "cat sat"), ["cat sat", "mat"]),  # out of order
        (ids(SENTINEL[0], "cat", SENTINEL[5], "x", SENTINEL[1], "mat"), ["cat", "mat"]),  # extra
        (ids(SENTINEL[0], "cat", SENTINEL[0], "x", SENTINEL[1], "mat"), ["cat", "mat"]),  # repeated
        (ids("x", SENTINEL[0], "cat"), ["cat", ""]),  # text before any sentinel
        (ids(), ["", ""]),
    ],
)
def test_spans_belong_to_the_sentinel_before_them(written, expected):
    filled = compare(INPUTS, TARGETS, written, BYTES)
    assert filled.pieces == ("the ", " on the ", "")
    originals = ["cat sat", "mat"]
    assert filled.blanks == tuple(Blank(o, w, o == w) for o, w in zip(originals, expected, strict=True))


def test_documents_may_contain_the_name_of_a_sentinel():
    inputs = ids("a", SENTINEL[6], "b", SENTINEL[0], "c", SENTINEL[0], BYTES.eos_id)
    filled = compare(inputs, ids(SENTINEL[0], "x", BYTES.eos_id), ids(SENTINEL[0], "x"), BYTES)
    assert filled.pieces == ("a<extra_id_6>b", "c<extra_id_0>")
    assert filled.blanks == (Blank("x", "x", True),)


def test_halves_of_a_character_are_compared_as_bytes():
    # "é" is the bytes C3 A9 and "è" C3 A8: a blank on the second byte shows the whole character.
    first, second, other = 0xC3 + 3, 0xA9 + 3, 0xA8 + 3
    inputs, targets = ids("caf", first, SENTINEL[0], "s", BYTES.eos_id), ids(SENTINEL[0], second, BYTES.eos_id)
    right, wrong = (compare(inputs, targets, ids(SENTINEL[0], byte), BYTES) for byte in (second, other))
    assert right.pieces == ("caf", "s")
    assert right.blanks == (Blank("é", "é", True),)
    assert wrong.blanks == (Blank("é", "è", False),)


def assert_puts_together(text, seed, vocabulary):
    example = SpanCorruption(noise_density=0.3)(vocabulary.encode(text), np.random.default_rng(seed), vocabulary)
    filled = compare(example["inputs"], example["targets"], example["targets"], vocabulary)
    assert all(blank.correct and blank.written == blank.original for blank in filled.blanks)
    whole = filled.pieces[0] + "".join(b.original + p for b, p in zip(filled.blanks, filled.pieces[1:], strict=True))
    assert whole == vocabulary.decode(vocabulary.encode(text))


@settings(max_examples=150, deadline=None)
@given(text=st.text(min_size=2, max_size=20), seed=st.integers(0, 2**32))
def test_pieces_and_originals_make_the_document(text, seed):
    assert_puts_together(text, seed, ByteVocabulary(extra_ids=100))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "v.model"
    train_sentencepiece(["the cat sat on the mat and the dog sat on the log"] * 20, str(path), 280)
    return Vocabulary(str(path), extra_ids=100)


@settings(max_examples=150, deadline=None)
@given(
    words=st.lists(st.sampled_from(["the", "cat", "mat", "naïve", "日本", "🙂", "�", "log."]), min_size=2, max_size=12),
    seed=st.integers(0, 2**32),
)
def test_pieces_and_originals_make_the_document_with_byte_fallback(sentencepiece, words, seed):
    assert_puts_together(" ".join(words), seed, sentencepiece)


def test_spaces_stay_where_the_document_has_them(sentencepiece):
    v = sentencepiece
    inputs = np.array([*v.encode("the cat"), v.sentinel_id(0), *v.encode("on the mat"), v.eos_id], np.int32)
    targets = np.array([v.sentinel_id(0), *v.encode("sat"), v.eos_id], np.int32)
    filled = compare(inputs, targets, np.array([v.sentinel_id(0), *v.encode("and")]), v)
    assert filled.pieces == ("the cat", " on the mat")
    assert filled.blanks == (Blank(" sat", " and", False),)


def blueprint(model_class, mesh=MeshShape(data=1)):
    # More rows in the embedding than ids in the vocabulary, as when padded for the hardware.
    config = ModelConfig(
        vocab_size=BYTES.vocab_size + 5,
        embed_dim=32,
        mlp_dim=64,
        num_heads=2,
        head_dim=16,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dtype="float32",
    )
    return Blueprint(model_class, config, mesh.build(jax.devices()[: mesh.data * mesh.tensor]))


TEXTS = ["the router drops packets", "the judge – ruled"]  # of different lengths, so that one is padded


@pytest.mark.parametrize(
    ("model_class", "layout", "mesh"),
    [
        (EncoderDecoder, packing.EncoderDecoder(), MeshShape(data=2, tensor=2)),
        (DecoderOnly, packing.DecoderOnly(), MeshShape(data=1)),
    ],
)
def test_a_model_that_learned_its_examples_by_heart_fills_them(model_class, layout, mesh):
    corrupt = SpanCorruption(noise_density=0.3)
    examples = [corrupt(BYTES.encode(text), np.random.default_rng(i), BYTES) for i, text in enumerate(TEXTS)]
    lengths = {name: max(len(example[name]) for example in examples) for name in ("inputs", "targets")}
    batch = layout.batch([[packing.Example(e["inputs"], e["targets"], 0)] for e in examples], lengths)
    model_of = blueprint(model_class, mesh)
    adam = optax.adam(1e-2)
    step = make_train_step(model_of, functools.partial(language_model_loss, num_components=1), adam, seed=0)
    state = model_of.init_state(model_of.init(0), adam)

    fill = functools.partial(fill_spans, model_of, examples=examples, vocabulary=BYTES, max_targets=lengths["targets"])
    assert not any(blank.correct for filled in fill(state.params) for blank in filled.blanks)
    for _ in range(80):
        state, _ = step(state, batch)
    for text, filled in zip(TEXTS, fill(state.params), strict=True):
        assert filled.blanks
        assert all(blank.correct for blank in filled.blanks)
        written = [blank.written for blank in filled.blanks]
        assert "".join(p + w for p, w in zip(filled.pieces, [*written, ""], strict=True)) == text


@pytest.mark.parametrize(
    ("model_class", "layout"), [(EncoderDecoder, packing.EncoderDecoder()), (DecoderOnly, packing.DecoderOnly())]
)
def test_metadata_and_mode_stand_where_training_put_them(model_class, layout):
    """The same blank, and nothing but what stands before it says what belongs there."""
    component = Component(None, SpanCorruption(), mode=Mode("[R]"), metadata=Metadata(("{source}:",)))
    sentinel, eos = SENTINEL[0], BYTES.eos_id
    inputs = np.array([*BYTES.encode("the "), sentinel, eos], np.int32)
    answers = {"law:[R]": "judge", "net:[R]": "router", "[R]": "cat", "": "dog", "net:[S]": "cable"}
    rows = [
        [packing.Example(inputs, np.array([sentinel, *BYTES.encode(answer), eos], np.int32), 0, BYTES.encode(prefix))]
        for prefix, answer in answers.items()
    ]
    batch = layout.batch(rows, {"inputs": 16, "targets": 12})
    model_of = blueprint(model_class)
    adam = optax.adam(1e-2)
    step = make_train_step(model_of, functools.partial(language_model_loss, num_components=1), adam, seed=0)
    state = model_of.init_state(model_of.init(0), adam)
    for _ in range(100):
        state, _ = step(state, batch)

    def filled(**conditions):
        example = {"inputs": inputs, "targets": np.array([sentinel, *BYTES.encode("?"), eos], np.int32)}
        return fill_spans(model_of, state.params, [example], BYTES, max_targets=12, **conditions)[0].blanks[0].written

    assert filled(component=component, metadata={"source": "law"}) == "judge"
    assert filled(component=component, metadata={"source": "net"}) == "router"
    assert filled(component=component, metadata={"source": "net"}, mode=Mode("[S]")) == "cable"
    assert filled(component=component) == "cat"
    assert filled() == "dog"
    with pytest.raises(UserError, match="name the field court, but Metadata.templates have only source"):
        filled(component=component, metadata={"court": "law"})
    with pytest.raises(UserError, match="metadata='own': examples have none of their own here"):
        filled(component=component, metadata="own")
    with pytest.raises(UserError, match="was trained without metadata"):
        filled(component=Component(Corpus("c", None), SpanCorruption()), metadata={"source": "law"})


def test_no_examples_no_fills():
    assert fill_spans(blueprint(EncoderDecoder), {}, [], BYTES, max_targets=8) == []


def test_refuses_what_it_cannot_fill():
    example = {"inputs": INPUTS, "targets": TARGETS}
    with pytest.raises(UserError, match="EncoderOnly has no decoder"):
        fill_spans(blueprint(EncoderOnly), {}, [example], BYTES, max_targets=32)
    # 2 sentinels, 10 bytes and EOS.
    with pytest.raises(UserError, match=r"max_targets = 12 .* set it to 13"):
        fill_spans(blueprint(EncoderDecoder), {}, [example], BYTES, max_targets=12)
