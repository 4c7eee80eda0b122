import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_domain.data import packing
from t5x_domain.errors import UserError
from t5x_domain.evaluation.perplexity import headline, held_out_scores
from t5x_domain.models.assemblies import EncoderDecoder, EncoderOnly
from t5x_domain.models.config import ModelConfig
from t5x_domain.objectives.losses import language_model_loss
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.training.state import Blueprint
from t5x_domain.training.step import make_eval_step


def test_scores_by_hand():
    # Three targets of 1 bit each, then one of 5 bits: 8 bits over 4 targets, i.e. 2 bits a target. Perplexity is
    # 2^2 = 4 (a mean of the batches' perplexities would be (2 + 32) / 2), and 2 bits over 4 bytes a token are 0.5.
    batches = [
        {"nll": 3 * math.log(2), "correct": 2.0, "weight": 3.0},
        {"nll": 5 * math.log(2), "correct": 1.0, "weight": 1.0},
    ]
    scores = held_out_scores(lambda _, batch: batch, None, batches, bytes_per_token=4.0)
    assert scores == {
        "loss": pytest.approx(2 * math.log(2)),
        "perplexity": pytest.approx(4.0),
        "bits_per_byte": pytest.approx(0.5),
        "accuracy": 0.75,
        "targets": 4,
    }


def test_ratios_of_a_loss_are_those_of_its_sums():
    # 1 of 2 and 5 of 6 are 6 of 8, where the mean of the ratios would be 2/3; nothing of nothing is no number.
    pairs = [np.array([1.0, 2.0]), np.array([5.0, 6.0])]
    batches = [
        {"nll": 1.0, "correct": 1.0, "weight": 1.0, "ratios": {"recall": pair, "precision": np.zeros(2)}}
        for pair in pairs
    ]
    scores = held_out_scores(lambda _, batch: batch, None, batches, bytes_per_token=1.0)
    assert (scores["recall"], scores["precision"]) == (0.75, None)


def test_binary_decisions_have_no_perplexity():
    batches = [{"binary_nll": 1.0, "correct": 3.0, "weight": 4.0}, {"binary_nll": 2.0, "correct": 1.0, "weight": 2.0}]
    scores = held_out_scores(lambda _, batch: batch, None, batches, bytes_per_token=1.0)
    assert scores == {"loss": pytest.approx(0.5), "accuracy": pytest.approx(4 / 6), "targets": 6}
    assert headline(scores) == ("binary cross-entropy", "0.5000")
    assert headline({**scores, "perplexity": 12.3456}) == ("perplexity", "12.35")


def test_no_batch_is_refused():
    with pytest.raises(UserError, match="no target to score"):
        held_out_scores(lambda _, batch: batch, None, [], bytes_per_token=1.0)


def test_perplexity_of_a_diverged_model_is_finite():
    scores = held_out_scores(
        lambda _, batch: batch, None, [{"nll": 1e6, "correct": 0.0, "weight": 1.0}], bytes_per_token=1.0
    )
    assert scores["loss"] == 1e6
    assert scores["perplexity"] == pytest.approx(math.exp(700))


def test_a_masked_model_is_scored_on_what_is_hidden():
    """With all parameters 0 each of 48 tokens has probability 1/48; 2 of 5 tokens are hidden, in two components."""
    config = ModelConfig(vocab_size=48, embed_dim=8, mlp_dim=8, num_heads=1, head_dim=8, num_encoder_layers=1)
    blueprint = Blueprint(EncoderOnly, config, MeshShape().build(jax.devices()[:1]))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), blueprint.shapes)
    tokens, prefix = np.arange(3, 8, dtype=np.int32), np.array([20, 21], np.int32)
    chosen = np.array([0, 1, 0, 1, 0], bool)
    rows = [[packing.Example(tokens, tokens, component, prefix, chosen)] for component in (0, 1)]
    batch = packing.EncoderOnly().batch([*rows, []], {"inputs": 8})
    loss = functools.partial(language_model_loss, num_components=2)
    sums = make_eval_step(blueprint, loss)(params, batch)
    assert sums["component_weight"].tolist() == [2, 2]
    scores = held_out_scores(lambda *_: sums, params, [batch], bytes_per_token=2.0)
    assert scores["targets"] == 4
    assert scores["perplexity"] == pytest.approx(48, rel=1e-5)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    # With all parameters 0 every one of 48 tokens has probability 1/48, whatever the text and the padding.
    config = ModelConfig(
        vocab_size=48, embed_dim=8, mlp_dim=8, num_heads=1, head_dim=8, num_encoder_layers=1, num_decoder_layers=1
    )
    blueprint = Blueprint(EncoderDecoder, config, MeshShape().build(jax.devices()[:1]))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), blueprint.shapes)
    example = packing.Example(np.arange(3, 8, dtype=np.int32), np.arange(3, 9, dtype=np.int32), 0)
    batch = packing.EncoderDecoder().batch([[example], []], {"inputs": 8, "targets": 8})
    eval_step = make_eval_step(
        blueprint, lambda model, batch, rng: language_model_loss(model, batch, rng, num_components=1)
    )
    scores = held_out_scores(eval_step, params, [batch], bytes_per_token=2.0)
    assert scores["targets"] == 6
    assert scores["perplexity"] == pytest.approx(48, rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(math.log2(48) / 2, rel=1e-5)
