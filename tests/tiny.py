"""A model and a batch small enough to train in a test, yet with every feature that a real one has."""

import functools

import jax
import numpy as np

from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder
from t5x_domain.models.config import ModelConfig
from t5x_domain.objectives.losses import language_model_loss
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.training.state import Blueprint

VOCAB = 512
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    embed_dim=64,
    mlp_dim=128,
    num_heads=4,
    head_dim=16,
    num_encoder_layers=2,
    num_decoder_layers=2,
    dtype="float32",
)
LOSS = functools.partial(language_model_loss, num_components=2, z_loss=1e-4)


def mesh(**shape):
    """The mesh of that shape over the virtual devices; one device without arguments."""
    return MeshShape(**shape).build() if shape else MeshShape().build(jax.devices()[:1])


def blueprint(on=None, model=EncoderDecoder, config=CONFIG):
    return Blueprint(model, config, on or mesh())


def batch(rows=16, encoder=24, decoder=16, seed=0):
    """Two packed segments a row, then padding of different lengths; two corpora."""
    rng = np.random.default_rng(seed)
    result = {}
    for side, length in (("encoder", encoder), ("decoder", decoder)):
        position = np.arange(length)
        padding = rng.integers(0, 5, (rows, 1))
        second = position >= length // 2
        result[f"{side}_input_tokens"] = rng.integers(1, VOCAB, (rows, length)).astype(np.int32)
        result[f"{side}_segment_ids"] = np.where(position < length - padding, 1 + second, 0).astype(np.int32)
        result[f"{side}_positions"] = np.tile(position - second * (length // 2), (rows, 1)).astype(np.int32)
    result["decoder_target_tokens"] = rng.integers(1, VOCAB, (rows, decoder)).astype(np.int32)
    result["decoder_loss_weights"] = (result["decoder_segment_ids"] > 0).astype(np.float32)
    result["decoder_prefix"] = (result["decoder_positions"] < 3).astype(np.int32)
    result["component_ids"] = rng.integers(0, 2, (rows, decoder)).astype(np.int32)
    result["encoder_target_tokens"] = rng.integers(1, VOCAB, (rows, encoder)).astype(np.int32)
    result["encoder_loss_weights"] = (result["encoder_segment_ids"] > 0).astype(np.float32)
    return result


MASK = 1  # the id at positions to predict


def masked_batch(rows=16, length=24, seed=0):
    """As `batch`, of an encoder: a sixth of the text is masked; the first two tokens of a segment are metadata."""
    rng = np.random.default_rng(seed)
    result = {name: value for name, value in batch(rows, length, seed=seed).items() if name.startswith("encoder")}
    tokens = np.where(result["encoder_segment_ids"] > 0, np.maximum(result["encoder_input_tokens"], MASK + 1), 0)
    text = (result["encoder_segment_ids"] > 0) & (result["encoder_positions"] >= 2)
    chosen = text & (rng.random((rows, length)) < 1 / 6)
    chosen[:, 2] = True  # none is without
    result["encoder_input_tokens"] = np.where(chosen, MASK, tokens).astype(np.int32)
    result["encoder_target_tokens"] = tokens.astype(np.int32)
    result["encoder_loss_weights"] = chosen.astype(np.float32)
    result["encoder_token_weights"] = text.astype(np.float32)
    result["component_ids"] = rng.integers(0, 2, (rows, length)).astype(np.int32)
    return result


MODELS = {"encoder_decoder": EncoderDecoder, "decoder_only": DecoderOnly}
