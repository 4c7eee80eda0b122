"""Decoding with learned positions and post-norm blocks is the whole model run over what was written."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from t5x_domain.conversion.check import rounding_bound
from t5x_domain.errors import UserError
from t5x_domain.inference.decoding import Decoding
from t5x_domain.inference.embedding import Embedder
from t5x_domain.inference.generator import Generator, row_length
from t5x_domain.inference.opened import Opened
from t5x_domain.inference.scoring import Scorer
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder, EncoderOnly
from t5x_domain.models.config import ModelConfig
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.training.state import Blueprint

CONFIG = ModelConfig(
    vocab_size=40,
    embed_dim=8,
    mlp_dim=12,
    num_heads=2,
    head_dim=4,
    num_encoder_layers=1,
    num_decoder_layers=1,
    norm="layernorm",
    norm_placement="post",
    embedding_norm=True,
    position="learned",
    max_positions=20,
    attention_scale="head_dim",
    scan_layers=False,
    dtype="float32",
)
PROMPTS = [np.array(ids, np.int32) for ids in ([5, 9, 7, 11, 3], [8, 2, 30])]
MAX_TOKENS = 6


def opened(assembly) -> Opened:
    """A model of random numbers that never writes EOS."""
    blueprint = Blueprint(assembly, CONFIG, MeshShape(data=1).build(jax.devices()[:1]))
    params = nnx.to_pure_dict(nnx.state(assembly(CONFIG, rngs=nnx.Rngs(3))))
    vocabulary = SimpleNamespace(eos_id=39, vocab_size=38, decode=str, encode=lambda text: np.arange(3, 3 + len(text)))
    return Opened("tiny", blueprint, params, vocabulary, {})


def log_probability(model: Opened, prompt: np.ndarray, written: np.ndarray) -> float:
    """Of what was written after, or to, a prompt: by one run over all of it."""

    @jax.jit
    def run(params):
        network = model.blueprint.merge(params)
        if isinstance(network, EncoderDecoder):
            hidden = network(prompt[None], np.array([[0, *written[:-1]]], np.int32))
        else:
            hidden = network(np.array([[0, *prompt, *written[:-1]]], np.int32))[:, len(prompt) :]
        return jax.nn.log_softmax(network.logits(hidden)[0])

    return float(run(model.params)[np.arange(len(written)), written].sum())


@pytest.mark.parametrize(
    ("assembly", "how"), [(EncoderDecoder, {}), (DecoderOnly, {}), (DecoderOnly, {"num_beams": 2})]
)
def test_scores_are_those_of_the_whole_model(assembly, how):
    """Prompts of 5 and 3 tokens in one batch, so that positions differ from slots of the cache."""
    model = opened(assembly)
    outputs = Generator(model, Decoding(max_tokens=MAX_TOKENS, length_penalty=0.0, **how), batch_size=2)(PROMPTS)
    bound = MAX_TOKENS * rounding_bound(CONFIG, 10.0)
    for prompt, (output, *_) in zip(PROMPTS, outputs, strict=True):
        assert len(output.tokens) == MAX_TOKENS
        assert output.score == pytest.approx(log_probability(model, prompt, output.tokens), abs=bound)
    wrong = np.roll(model.params["embedding"]["positions"], 1, axis=0)
    moved = dataclasses.replace(
        model, params=model.params | {"embedding": model.params["embedding"] | {"positions": wrong}}
    )
    assert abs(log_probability(moved, prompt, output.tokens) - output.score) > 10 * bound


@pytest.mark.parametrize("assembly", [EncoderDecoder, DecoderOnly])
def test_scores_of_given_texts(assembly):
    model, written = opened(assembly), np.array([4, 6, 39], np.int32)
    found = Scorer(model, batch_size=2)(PROMPTS, [written, written])[:, 0]
    wanted = [log_probability(model, prompt, written) for prompt in PROMPTS]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3 * rounding_bound(CONFIG, 10.0))


def test_the_last_position_is_used_and_no_more():
    """Of 20 positions a decoder takes one for its start token, 13 for a prompt, and 6 for all but the last of 7."""
    model, prompt = opened(DecoderOnly), np.arange(3, 16, dtype=np.int32)
    (output,) = Generator(model, Decoding(max_tokens=7, length_penalty=0.0), batch_size=1)([prompt])[0]
    wanted = log_probability(model, prompt, output.tokens)
    assert output.score == pytest.approx(wanted, abs=7 * rounding_bound(CONFIG, 10.0))
    with pytest.raises(UserError, match=r"max_positions = 20, too few to read 14 tokens and write .*max_tokens = 7"):
        Generator(model, Decoding(max_tokens=7), batch_size=1)([np.arange(3, 17, dtype=np.int32)])
    with pytest.raises(UserError, match=r"max_positions = 20, too few to read 5 tokens and write .*max_tokens = 21"):
        Generator(opened(EncoderDecoder), Decoding(max_tokens=21), batch_size=1)(PROMPTS)


def test_rows_are_no_longer_than_the_positions():
    """17 to 20 tokens would have rows of 24."""
    cases = {(18, None): 24, (18, 20): 20, (3, 20): 16, (22, 20): 22}
    assert {(n, at_most): row_length([np.zeros(n)], at_most) for n, at_most in cases} == cases
    vectors = Embedder(opened(EncoderOnly), batch_size=2)(["a" * 18, "few"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    with pytest.raises(UserError, match=r"ModelConfig.max_positions = 20: .* a row of 24"):
        Embedder(opened(EncoderOnly), batch_size=1)(["a" * 23])
