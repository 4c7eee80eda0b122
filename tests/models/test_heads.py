"""Heads: their shapes, what they must not see, and restoring their backbone from a whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_domain.conversion.layout import leaves
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import EncoderDecoder, EncoderOnly
from t5x_domain.models.heads import MASKED, head, mean_pool
from t5x_domain.training.initial import restore_params
from tests import tiny
from tests.small_models import CONFIG, random_checkpoint

BATCH, LENGTH, LABELS = 3, 7, 5
SHAPES = {
    ("classification", "mean"): (BATCH, LABELS),
    ("classification", "decoder"): (BATCH, LABELS),
    ("tagging", "mean"): (BATCH, LENGTH, LABELS),
    ("spans", "mean"): (BATCH, LENGTH, 2),
    ("pairs", "mean"): (BATCH, CONFIG.embed_dim),
}
OWN = {"spans": {"head/kernel", "head/bias"}, "pairs": {"head/kernel"}}
KINDS = pytest.mark.parametrize("kind, pooling", SHAPES)


def blueprint(kind, pooling):
    return tiny.blueprint(model=head(kind, num_labels=LABELS, pooling=pooling), config=CONFIG)


def inputs(lengths=(7, 4, 1), seed=0):
    tokens = np.random.default_rng(seed).integers(3, CONFIG.vocab_size, (BATCH, LENGTH)).astype(np.int32)
    return tokens, (np.arange(LENGTH) < np.array(lengths)[:, None]).astype(np.int32)


@KINDS
def test_shape_dtype_and_padding_is_not_seen(kind, pooling):
    plan = blueprint(kind, pooling)
    model = plan.merge(plan.init(0))
    tokens, segments = inputs()
    first = model(tokens, segments)
    assert first.shape == SHAPES[kind, pooling] and first.dtype == jnp.float32
    other = model(np.where(segments > 0, tokens, 39), segments)
    seen = segments > 0 if first.ndim == 3 else slice(None)
    np.testing.assert_allclose(first[seen], other[seen], atol=1e-6)
    changed = model(np.where(np.arange(LENGTH) == 0, 39, tokens), segments)
    assert not np.allclose(first[seen], changed[seen], atol=1e-4)


@KINDS
def test_rows_of_padding_only_stay_finite(kind, pooling):
    plan = blueprint(kind, pooling)
    tokens, segments = inputs(lengths=(7, 0, 2))
    out, gradients = jax.value_and_grad(lambda params: jnp.square(plan.merge(params)(tokens, segments)).mean())(
        plan.init(0)
    )
    assert np.isfinite(out) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@KINDS
def test_backbone_restores_strictly_from_an_encoder_decoder(kind, pooling):
    plan = blueprint(kind, pooling)
    whole = random_checkpoint(EncoderDecoder)
    restored = restore_params(whole, plan, include=("^(embedding|encoder|decoder)/",))
    assert set(restored.left) == OWN.get(kind, {"head/kernel", "head/bias"})
    backbone = EncoderDecoder if pooling == "decoder" else EncoderOnly
    names = {leaf.name for leaf in leaves(backbone, CONFIG)} - {"embedding/output"}
    assert set(restored.params) == names
    np.testing.assert_array_equal(restored.params["embedding/embedding"], whole.tensors["embedding/embedding"].read())


def test_mean_pool_is_the_mean_of_the_tokens():
    hidden = np.random.default_rng(0).normal(size=(BATCH, LENGTH, 4)).astype(np.float32)
    _, segments = inputs(lengths=(7, 4, 0))
    pooled = mean_pool(hidden, segments)
    np.testing.assert_allclose(pooled[0], hidden[0].mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pooled[1], hidden[1, :4].mean(axis=0), rtol=1e-5, atol=1e-6)
    assert not pooled[2].any()


def test_classifier_is_an_affine_map_of_the_mean():
    plan = blueprint("classification", "mean")
    params = plan.init(0)
    tokens, segments = inputs()
    logits = plan.merge(params)(tokens, segments)
    encoder = tiny.blueprint(model=EncoderOnly, config=CONFIG)
    embedding = {**params["embedding"], "output": np.zeros((CONFIG.vocab_size, CONFIG.embed_dim), np.float32)}
    hidden = encoder.merge({"embedding": embedding, "encoder": params["encoder"]})(tokens, encoder_segment_ids=segments)
    want = mean_pool(hidden, segments) @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-6)


def test_embeddings_have_length_one_and_start_as_the_plain_mean():
    plan = blueprint("pairs", "mean")
    params = plan.init(0)
    np.testing.assert_array_equal(params["head"]["kernel"], np.eye(CONFIG.embed_dim))
    vectors = plan.merge(params)(*inputs())
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-5)


def test_spans_cannot_be_chosen_in_padding():
    plan = blueprint("spans", "mean")
    tokens, segments = inputs()
    scores = np.asarray(plan.merge(plan.init(0))(tokens, segments))
    assert (scores[segments == 0] == MASKED).all() and (scores[segments > 0] > MASKED).all()


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"kind": "ranking"}, "'ranking' with pooling = 'mean': there is no such head"),
        ({"kind": "tagging", "pooling": "decoder", "num_labels": 2}, "'tagging' with pooling = 'decoder'"),
        ({"kind": "tagging"}, "tagging needs the number of its labels"),
    ],
)
def test_refuses_a_head_that_is_not(arguments, said):
    with pytest.raises(UserError, match=said):
        head(**arguments)
