"""Embeddings are unit means of the encoder's states, whatever else is in the batch."""

import dataclasses

import numpy as np
import pytest
from test_generator import opened

from t5x_domain.conversion.check import rounding_bound
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.inference.embedding import Embedder

TEXTS = ["a", "bcd", "efghijklmnopqrstuvwxyz", "bcd", ""]


class Letters(ByteVocabulary):
    """Few enough ids for the golden models."""

    def encode(self, text):
        return np.array([10 + ord(c) - ord("a") for c in text], np.int32)


def model(name):
    return dataclasses.replace(opened(name)[0], vocabulary=Letters())


def bound(opened_model, states):
    """Of a unit vector: the error of a state, whose mean errs no more, relative to the length of that mean."""
    config, largest = opened_model.blueprint.config, max(np.abs(s).max() for s in states)
    shortest = min(np.linalg.norm(s.mean(axis=0)) for s in states)
    return rounding_bound(config, largest) * np.sqrt(config.embed_dim) / shortest


@pytest.mark.parametrize("name", ["t5_1_1", "t5_1_0"])
def test_it_is_the_unit_mean_of_the_encoders_states_however_they_are_batched(name):
    its = model(name)
    network = its.blueprint.merge(its.params)
    # Each text by itself, without a token of padding.
    states = [np.asarray(network.encoder(network.embed(its.inputs(text)[None])))[0] for text in TEXTS]
    means = np.stack([s.mean(axis=0) for s in states])
    expected = means / np.linalg.norm(means, axis=1, keepdims=True)
    atol = bound(its, states)
    assert np.abs(expected[0] - expected[1]).max() > 10 * atol  # texts differ by more than the bound
    for batch_size in (1, 3, 8):
        vectors = Embedder(its, batch_size=batch_size)(TEXTS)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, expected, rtol=0, atol=atol)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=0, atol=1e-6)


def test_no_texts_no_vectors():
    its = model("t5_1_1")
    assert Embedder(its)([]).shape == (0, its.blueprint.config.embed_dim)


def test_a_decoder_alone_is_refused():
    with pytest.raises(UserError, match="llama: it has no encoder to embed texts with"):
        Embedder(model("llama"))
    with pytest.raises(UserError, match="batch_size = 0"):
        Embedder(model("t5_1_1"), batch_size=0)
