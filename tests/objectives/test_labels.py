"""Labelled objectives: losses against numpy and finite differences, rows, predictions, and learning each kind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example as example_of
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.data.labelled import Labelled
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary, train_sentencepiece
from t5x_domain.errors import UserError
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.heads import head
from t5x_domain.objectives.labels import (
    LOSSES,
    OBJECTIVES,
    Classification,
    Pairs,
    Pieces,
    Spans,
    Tagging,
    classification_loss,
    pairs_loss,
    spans_loss,
    tagging_loss,
)
from t5x_domain.parallel.sharding import put
from t5x_domain.training.optimizer import AdamW, Updates
from t5x_domain.training.schedule import constant
from t5x_domain.training.step import make_eval_step, make_train_step
from tests.training import tiny

BYTES = ByteVocabulary(extra_ids=0)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A small SentencePiece vocabulary with byte fallback."""
    path = str(tmp_path_factory.mktemp("vocabulary") / "small.model")
    text = "the quick brown fox jumps over the lazy dog, in Paris and in Rome. " * 20
    train_sentencepiece([text], path, 295)
    return Vocabulary(path, extra_ids=0)


def example(inputs, target, name="1", **fields):
    return Labelled(name, inputs, target, {"text": inputs, **fields})


# --- losses ---


class Given:
    """A model whose outputs are given."""

    inputs = ()

    def __init__(self, outputs):
        self.outputs = outputs

    def __call__(self, *features, rng):
        return self.outputs


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_classification_gradient_is_the_analytic_one():
    """d nll / d logits = weight (softmax - one-hot)."""
    rng = np.random.default_rng(0)
    logits, labels, weights = rng.normal(size=(4, 3)), np.array([[0], [2], [1], [0]]), np.array([[1.0], [1], [0], [1]])
    batch = {"labels": labels, "label_weights": weights}
    with jax.enable_x64(True):
        loss = lambda x: classification_loss(Given(x), batch, None)  # noqa: E731
        (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logits))
    value, sums = float(value), {name: float(x) for name, x in sums.items()}
    p = softmax(logits)
    np.testing.assert_allclose(gradient, weights * (p - np.eye(3)[labels[:, 0]]), atol=1e-12)
    assert value == pytest.approx(-(np.log(p[range(4), labels[:, 0]]) * weights[:, 0]).sum())
    assert sums["weight"] == 3 and sums["nll"] == value
    assert sums["correct"] == (weights[:, 0] * (p.argmax(axis=-1) == labels[:, 0])).sum()


def test_tagging_gradient_is_zero_but_at_weighted_positions():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(2, 5, 3)), rng.integers(0, 3, (2, 5))
    weights = np.array([[1.0, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
    with jax.enable_x64(True):
        loss = lambda x: tagging_loss(Given(x), {"labels": labels, "label_weights": weights}, None)[0]  # noqa: E731
        gradient = jax.grad(loss)(jnp.asarray(logits))
    np.testing.assert_allclose(gradient, weights[..., None] * (softmax(logits) - np.eye(3)[labels]), atol=1e-12)


def test_spans_loss_is_the_mean_of_both_ends_and_a_row_counts_once():
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=(3, 6, 2)), np.array([[1, 4], [0, 0], [2, 2]])
    weights = np.array([[1.0], [1], [0]])
    with jax.enable_x64(True):
        value, sums = spans_loss(Given(jnp.asarray(logits)), {"labels": labels, "label_weights": weights}, None)
    p = softmax(np.swapaxes(logits, 1, 2))  # [B, 2, S]
    want = -sum(np.log(p[b, end, labels[b, end]]) for b in (0, 1) for end in (0, 1)) / 2
    assert float(value) == pytest.approx(want, rel=1e-12) and float(sums["weight"]) == 2


class Table:
    """Embeds a text as the unit vector of its first token."""

    def __init__(self, table):
        self.table = table

    def __call__(self, tokens, segment_ids, *, rng):
        vectors = self.table[tokens[:, 0]]
        return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def pair_batch(texts, positives, weights=None):
    ones = np.ones((len(texts), 1), np.int32)
    return {
        "encoder_input_tokens": np.array(texts)[:, None],
        "encoder_segment_ids": ones,
        "positive_input_tokens": np.array(positives)[:, None],
        "positive_segment_ids": ones,
        "label_weights": np.ones((len(texts), 1)) if weights is None else np.array(weights, float)[:, None],
    }


def reference_pairs(table, texts, positives, weights, temperature, symmetric):
    """Row by row, from the definition."""
    unit = table / np.linalg.norm(table, axis=-1, keepdims=True)
    total = 0.0
    for one, two in [(texts, positives), (positives, texts)][: 1 + symmetric]:
        for i in range(len(one)):
            candidates = [
                j
                for j in range(len(one))
                if j == i or (texts[j] != texts[i] and positives[j] != positives[i] and weights[j])
            ]
            scores = {j: unit[one[i]] @ unit[two[j]] / temperature for j in candidates}
            total += weights[i] * (np.log(sum(np.exp(list(scores.values())))) - scores[i])
    return total / (1 + symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1], [1, 0, 1, 1, 1]])
def test_pairs_loss_equals_the_definition(symmetric, weights):
    table = np.random.default_rng(3).normal(size=(12, 4))
    texts, positives = [0, 1, 2, 0, 4], [5, 6, 6, 8, 9]  # one text twice, one positive twice
    with jax.enable_x64(True):
        value, sums = pairs_loss(
            Table(jnp.asarray(table)), pair_batch(texts, positives, weights), None, temperature=0.3, symmetric=symmetric
        )
    want = reference_pairs(table, texts, positives, weights, 0.3, symmetric)
    assert float(value) == float(sums["nll"]) == pytest.approx(want, rel=1e-10)
    assert float(sums["weight"]) == sum(weights)


def test_pairs_gradient_equals_finite_differences():
    rng = np.random.default_rng(4)
    table, direction = rng.normal(size=(10, 4)), rng.normal(size=(10, 4))
    batch = pair_batch([0, 1, 2, 3], [5, 6, 6, 8])
    with jax.enable_x64(True):
        loss = lambda x: pairs_loss(Table(x), batch, None, temperature=0.5)[0]  # noqa: E731
        slope = (jax.grad(loss)(jnp.asarray(table)) * direction).sum()
        h = 1e-5
        want = (loss(jnp.asarray(table + h * direction)) - loss(jnp.asarray(table - h * direction))) / (2 * h)
    assert slope == pytest.approx(float(want), rel=1e-7)


def test_equal_positives_alone_cost_nothing():
    table = np.random.default_rng(5).normal(size=(5, 3))
    assert pairs_loss(Table(jnp.asarray(table)), pair_batch([0, 1, 2], [4, 4, 4]), None)[0] == 0


# --- rows ---


def test_texts_are_cut_and_closed():
    rows = Classification(BYTES, 4, ["a", "b"]).encode(
        [example("xyz", "b", "fits"), example("wxyz", "a", "long"), example("", "c", "other")]
    )
    x, y, z, w = (3 + ord(c) for c in "xyzw")
    np.testing.assert_array_equal(rows.features["encoder_input_tokens"], [[x, y, z, 1], [w, x, y, 1], [1, 0, 0, 0]])
    np.testing.assert_array_equal(rows.features["encoder_segment_ids"], [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]])
    np.testing.assert_array_equal(rows.features["labels"], [[1], [0], [0]])
    np.testing.assert_array_equal(rows.features["label_weights"], [[1], [1], [0]])
    assert rows.cut == ["long"]


def test_tags_stand_at_first_pieces():
    task = Tagging(BYTES, 9, ["B", "O"])
    rows = task.encode([example("in  Rome", ["O", "B"]), example("a bb Paris x", ["B", "O", "B", "O"], "long")])
    np.testing.assert_array_equal(np.flatnonzero(rows.features["label_weights"][0]), [0, 4])
    np.testing.assert_array_equal(rows.features["labels"][0][[0, 4]], [1, 0])
    # "a bb Par": the last word is cut off.
    np.testing.assert_array_equal(np.flatnonzero(rows.features["label_weights"][1]), [0, 2, 5])
    assert rows.cut == ["long"]


def test_a_word_that_begins_where_the_row_is_closed_is_cut_off():
    task, given = Tagging(BYTES, 3, ["B", "O"]), [example("a b", ["B", "B"])]
    np.testing.assert_array_equal(task.encode(given).features["label_weights"], [[1, 0, 0]])
    assert task.decode(np.array([[[1, 0]] * 3]), given) == [["B", "O"]]


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=150, deadline=None)
@example_of(text="0\x1f\x1b", length=3, as_bytes=False)  # a blank to Python, but SentencePiece's normalisation drops it
@given(text=words, length=st.integers(2, 40), as_bytes=st.booleans())
def test_one_tag_for_each_word(pieces, text, length, as_bytes):
    """Tags come back as they went in, wherever the row holds a piece of the word; else "O"."""
    labels = ["O", "X", "Y"]
    target = [labels[1 + i % 2] for i in range(len(text.split()))]
    task = Tagging(BYTES if as_bytes else pieces, length, labels)
    rows = task.encode([example(text, target)])
    decoded = task.decode(np.eye(3)[rows.features["labels"]], [example(text, target)])[0]
    assert len(decoded) == len(target)
    assert set(zip(decoded, target, strict=True)) <= {("X", "X"), ("Y", "Y"), ("O", "X"), ("O", "Y")}
    if as_bytes and not rows.cut:
        assert decoded == target


@settings(max_examples=100, deadline=None)
@given(words)
def test_pieces_are_the_encoding_in_order(pieces, text):
    for vocabulary in (BYTES, pieces):
        its = Pieces(*vocabulary.encode_with_offsets(text))
        np.testing.assert_array_equal(its.ids, vocabulary.encode(text))
        assert (its.begins <= its.ends).all() and (its.ends[:-1] <= its.begins[1:]).all()
        assert len(its.ends) == 0 or its.ends[-1] <= len(text)


def span_logits(rows, length):
    """Logits that point at the labels of each row."""
    return np.stack([np.eye(length)[label].T for label in rows.features["labels"]])


@pytest.mark.parametrize("vocabulary", ["bytes", "pieces"])
def test_answers_come_back(pieces, vocabulary):
    task = Spans(BYTES if vocabulary == "bytes" else pieces, 80, context_field="context")
    text = "the quick fox, in Paris and in Rome."
    given = [
        example(f"which fox in Paris? {text}", [answer] if answer else [], context=text)
        for answer in ("Paris", "the quick fox", "in Rome", "")
    ]
    rows = task.encode(given)
    assert task.decode(span_logits(rows, 80), given) == ["Paris", "the quick fox", "in Rome", ""] and not rows.cut
    assert (rows.features["encoder_input_tokens"][:, 0] == 1).all()
    np.testing.assert_array_equal(rows.features["labels"][3], [0, 0])
    # The occurrence in the question, which stands before the context, is not meant.
    assert rows.features["labels"][0][0] > len(task.vocabulary.encode("which fox in Paris?"))


def test_an_answer_that_is_cut_off_does_not_count():
    task = Spans(BYTES, 6)
    rows = task.encode([example("abcdef", ["d"], "held"), example("abcdef", ["de"], "lost"), example("abcd", ["d"])])
    np.testing.assert_array_equal(rows.features["label_weights"], [[1], [0], [1]])
    np.testing.assert_array_equal(rows.features["labels"], [[4, 4], [0, 0], [4, 4]])
    assert rows.cut == ["held", "lost"]


def test_predicted_spans_are_in_order_and_not_too_long():
    task, given = Spans(BYTES, 8, max_answer_tokens=2), [example("abcdef", [])]
    logits = np.zeros((1, 8, 2))
    logits[0, 4, 0], logits[0, 2, 1], logits[0, 6, 1] = 5, 4, 3  # best end before the start; second best too far
    logits[0, 5, 1] = 1
    assert task.decode(logits, given) == ["de"]
    logits[0, 0] = 10
    assert task.decode(logits, given) == [""]


def test_refuses_an_answer_that_is_not_in_the_context():
    with pytest.raises(UserError, match="example '1': its answer 'x' is not in its field 'text'"):
        Spans(BYTES, 8).encode([example("abc", ["x"])])


# --- learning ---

LEARNT = {
    "classification": [example("red apple", "fruit"), example("fast car", "vehicle"), example("sour pear", "fruit")],
    "tagging": [example("in Rome", ["O", "B"]), example("Paris is big", ["B", "O", "O"])],
    "spans": [example("it is Rome", ["Rome"]), example("a Paris", ["Paris"]), example("no answer", [])],
    "pairs": [example("red apple", "fruit"), example("fast car", "vehicle"), example("blue", "colour")],
}
LABELS = {"classification": ["fruit", "vehicle"], "tagging": ["B", "O"]}
SMALL = ModelConfig(
    vocab_size=BYTES.vocab_size,
    embed_dim=16,
    mlp_dim=32,
    num_heads=2,
    head_dim=8,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dtype="float32",
)


@pytest.mark.parametrize("kind, pooling", [*((kind, "mean") for kind in LEARNT), ("classification", "decoder")])
def test_each_kind_is_learnt_and_predicted(kind, pooling):
    given, length = LEARNT[kind], 16
    labels = {"labels": LABELS[kind]} if kind in LABELS else {}
    objective = OBJECTIVES[kind](BYTES, length, **labels)
    rows = objective.encode(given)
    model = head(kind, num_labels=len(LABELS.get(kind, ())), pooling=pooling)
    blueprint = tiny.blueprint(model=model, config=SMALL)
    transform = Updates(AdamW(), constant(0.02)).build(blueprint.axes)
    step = make_train_step(blueprint, LOSSES[kind], transform, seed=0)
    state = blueprint.init_state(blueprint.init(0), transform)
    losses = []
    for _ in range(60):
        state, metrics = step(state, rows.features)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 3
    merged = blueprint.merge(state.params)
    sides = ("encoder", "positive") if kind == "pairs" else ("encoder",)
    outputs = [
        np.asarray(merged(*(rows.features[f"{side}_{name}"] for name in ("input_tokens", "segment_ids"))))
        for side in sides
    ]
    wanted = [e.target if kind != "spans" else next(iter(e.target), "") for e in given]
    assert objective.decode(np.stack(outputs) if kind == "pairs" else outputs[0], given) == wanted


def test_negatives_are_the_same_on_any_mesh():
    rows = Pairs(BYTES, 12).encode(LEARNT["pairs"] + LEARNT["pairs"][:1])
    values = []
    for mesh in (tiny.mesh(), tiny.mesh(data=2, fsdp=2, tensor=2)):
        blueprint = tiny.blueprint(mesh, head("pairs"), SMALL)
        placed = put(mesh, rows.features)
        values.append(float(make_eval_step(blueprint, pairs_loss)(blueprint.init(0), placed)["nll"]))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_pairs_need_both_texts_to_fit():
    rows = Pairs(BYTES, 4).encode([example("a", "long one", "cut"), example("abc", "b", "fits")])
    assert rows.cut == ["cut"]
    assert rows.features["positive_segment_ids"].sum(axis=1).tolist() == [4, 2]


def test_kinds_are_those_that_have_losses():
    assert set(OBJECTIVES) == set(LOSSES)
    assert all(dataclasses.is_dataclass(objective) for objective in OBJECTIVES.values())
