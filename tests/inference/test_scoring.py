"""Scores of given targets are the model's log-probabilities, however they are batched."""

import dataclasses

import jax
import numpy as np
import pytest
from test_generator import opened

from t5x_domain.conversion.check import rounding_bound
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.inference.scoring import Scorer
from t5x_domain.models.assemblies import EncoderOnly

TARGETS = [np.array(t, np.int32) for t in ([5, 6, 7, 1], [9, 1], [12, 3, 44, 8, 30, 21, 1])]


@pytest.mark.parametrize("name, facts", [("t5_1_1", {}), ("llama", {}), ("llama", {"prefix_lm": ["prefix_lm"]})])
def test_scores_are_log_probabilities_of_the_model(name, facts):
    model, prompts = opened(name, **facts)
    network = model.blueprint.merge(model.params)
    scores = Scorer(model, batch_size=2)(prompts, TARGETS)
    for prompt, target, (score, count) in zip(prompts, TARGETS, scores, strict=True):
        if name == "t5_1_1":
            hidden = network(prompt[None], np.array([[0, *target[:-1]]], np.int32))
        else:
            tokens = np.array([[0, *prompt, *target[:-1]]], np.int32)
            prefix = (np.arange(tokens.shape[1]) <= len(prompt)).astype(np.int32)[None] if facts else None
            hidden = network(tokens, decoder_prefix=prefix)[:, len(prompt) :]
        logits = jax.nn.log_softmax(network.logits(hidden)[0])
        expected = float(logits[np.arange(len(target)), target].sum())
        assert score == pytest.approx(expected, abs=len(target) * rounding_bound(network.config, 10.0))
        assert count == len(target)


def test_the_likelier_choice_scores_more_by_token():
    model, prompts = opened("t5_1_1")
    model = dataclasses.replace(model, vocabulary=_Letters())
    scorer = Scorer(model)
    by_token = scorer.choose(prompts, ["a", "bcd"])
    whole = scorer.choose(prompts, ["a", "bcd"], normalize=False)
    assert by_token.shape == (3, 2)
    np.testing.assert_allclose(whole, by_token * [2, 4])  # letters and EOS


@pytest.mark.parametrize("name", ["t5_1_1", "llama"])
def test_a_choice_scores_as_the_same_text_given_as_target(name):
    model, prompts = opened(name)
    model = dataclasses.replace(model, vocabulary=_Letters())
    scorer, choices = Scorer(model, batch_size=2), ["a", "bcd", "ec"]
    chosen = scorer.choose(prompts, choices, normalize=False)
    for number, choice in enumerate(choices):
        expected = scorer(prompts, [model.targets(choice)] * len(prompts))[:, 0]
        bound = (len(choice) + 1) * rounding_bound(model.blueprint.config, 10.0)
        np.testing.assert_allclose(chosen[:, number], expected, atol=bound, rtol=0)


def test_other_parameters_are_taken_without_compiling_again():
    model, prompts = opened("t5_1_1")
    others = jax.tree.map(lambda p: p * 0.5, model.params)
    scorer = Scorer(model)
    before = scorer(prompts, TARGETS)
    found = scorer(prompts, TARGETS, params=others)
    np.testing.assert_array_equal(found, Scorer(dataclasses.replace(model, params=others))(prompts, TARGETS))
    assert not np.allclose(before, found)
    assert scorer._nll._cache_size() == 1


class _Letters(ByteVocabulary):
    def encode(self, text):
        return np.array([10 + ord(c) - ord("a") for c in text], np.int32)


def test_what_cannot_be_scored_is_refused():
    model, prompts = opened("t5_1_1")
    with pytest.raises(UserError, match="no token"):
        Scorer(model)(prompts[:1], [np.zeros(0, np.int32)])
    encoder = dataclasses.replace(model.blueprint, model_class=EncoderOnly)
    with pytest.raises(UserError, match="EncoderOnly has no decoder"):
        Scorer(dataclasses.replace(model, blueprint=encoder))
