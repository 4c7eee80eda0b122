"""Floating-point operations of a model by formula: its matrix products, and attention to the keys that its masks allow.

Norms, activations, softmax and the optimizer are left out, as is what rematerialisation computes again: these are the
"model FLOPs" of model FLOPs utilisation (Chowdhery et al. 2022, PaLM, section 4.1 and appendix B).
"""

import math
from collections.abc import Mapping

import numpy as np

from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder, LanguageModel
from t5x_domain.models.config import LOCAL, ModelConfig
from t5x_domain.models.rtd import DetectingEncoderDecoder, Detector, ReplacedTokenDetection, generator_config

# Positions of a row that a generator scores: `max_share` and `share` of the losses, unless gin binds others.
_PREDICTED = {ReplacedTokenDetection: 0.2, DetectingEncoderDecoder: 0.15}


def train_step_flops(
    model: type[LanguageModel], config: ModelConfig, batch_size: int, lengths: Mapping[str, int]
) -> float:
    """FLOPs of an update: forward, and twice as much backward, but what a generator draws once.

    Args:
      model: an assembly that learns from text.
      config: its shape.
      batch_size: rows. Each counts as one full text: what is packed into a row sees less of it.
      lengths: tokens in a row, {"inputs": …, "targets": …}, as of `training.run.Run`.
    """
    drawn = 0.0
    if issubclass(model, Detector):
        drawn = _scores(generator_config(config), _predicted(model, lengths))
    return batch_size * (3 * forward_flops(model, config, lengths) + drawn)


def forward_flops(
    model: type[LanguageModel], config: ModelConfig, lengths: Mapping[str, int], *, scored: int | None = None
) -> float:
    """FLOPs of the loss of one row; the arguments are those of `train_step_flops`.

    A model of one stack may have logits of `scored` positions only.
    """
    inputs, targets = lengths["inputs"], lengths.get("targets", 0)
    encoder = _embedding(config, inputs) + _stack(config, inputs, causal=False)
    if issubclass(model, DecoderOnly):
        length = inputs + targets
        return _embedding(config, length) + _stack(config, length, causal=True) + _scores(config, scored or length)
    if issubclass(model, EncoderDecoder):
        decoder = _embedding(config, targets) + _stack(config, targets, causal=True, memory=inputs)
        found = encoder + decoder + _scores(config, targets)
    elif issubclass(model, ReplacedTokenDetection):
        found = 0.0
    else:
        found = encoder + _scores(config, scored or inputs)
    if issubclass(model, Detector):  # a generator that fills in, and a pass of the encoder that detects
        narrow, chosen = generator_config(config), _predicted(model, lengths)
        found += _embedding(narrow, inputs) + _stack(narrow, inputs, causal=False) + _scores(narrow, chosen)
        found += encoder + 2 * inputs * (config.embed_dim**2 + config.embed_dim)
    return found


def visible_keys(
    length: int,
    *,
    causal: bool,
    window: tuple[int, int] | None = None,
    global_tokens: int = 0,
    every: int | None = None,
) -> int:
    """Pairs of a query and a key that it sees, in a row of one text.

    Args:
      length: tokens.
      causal: only keys up to the query.
      window: keys before and after a query; None for all.
      global_tokens: the first tokens, so many, that see all and are seen by all.
      every: so are the last tokens of blocks of this size; None for none.
    """
    query = np.arange(length)
    last = query if causal else np.full(length, length - 1)
    whole = last + 1
    if window is None:
        return int(whole.sum())
    start, stop = np.maximum(query - window[0], 0), np.minimum(query + window[1], last) + 1
    is_global = query < global_tokens
    if every is not None:
        is_global |= query % every == every - 1
    count = np.concatenate([[0], np.cumsum(is_global)])
    outside = count[whole] - (count[stop] - count[start])
    return int(np.where(is_global, whole, stop - start + outside).sum())


def _stack(config: ModelConfig, length: int, *, causal: bool, memory: int | None = None) -> float:
    """All layers of an encoder or a decoder, the latter with cross-attention to `memory` tokens of an encoder."""
    pattern = config.pattern(causal=causal)
    layers = config.num_decoder_layers if causal else config.num_encoder_layers
    total = 0.0
    for number in range(layers):
        kind = pattern[number % len(pattern)]
        total += _attention(config, length, length) + _pairs(config, _self_pairs(config, kind, length, causal))
        total += 2 * length * config.embed_dim * config.mlp_dim * (len(config.mlp_activations) + 1)
        if config.global_blocks == "transient" and kind == LOCAL and not causal:
            blocks = length // config.global_block_size
            total += _keys_values(config, blocks) + _pairs(config, length * blocks)
        if memory is not None:
            total += _attention(config, length, memory) + _pairs(config, length * memory)
    return total


def _self_pairs(config: ModelConfig, kind: str, length: int, causal: bool) -> int:
    has_blocks = config.global_blocks == "every" and not causal
    return visible_keys(
        length,
        causal=causal,
        window=config.window(kind),
        global_tokens=0 if causal else config.global_tokens,
        every=config.global_block_size if has_blocks else None,
    )


def _attention(config: ModelConfig, queries: int, keys: int) -> float:
    """The four projections of attention."""
    return 2 * queries * config.embed_dim * 2 * config.num_heads * config.head_dim + _keys_values(config, keys)


def _keys_values(config: ModelConfig, keys: int) -> float:
    return 2 * keys * config.embed_dim * 2 * config.kv_heads * config.head_dim


def _pairs(config: ModelConfig, pairs: int) -> float:
    """Logits, and the sum of values, of pairs of a query and a key."""
    return 2 * 2 * pairs * config.num_heads * config.head_dim


def _embedding(config: ModelConfig, length: int) -> float:
    """The projection of narrow token embeddings; a look-up is no product."""
    if config.embedding_dim in (None, config.embed_dim):
        return 0.0
    return 2 * length * config.embedding_dim * config.embed_dim


def _scores(config: ModelConfig, length: int) -> float:
    """Logits over the vocabulary."""
    return 2 * length * config.vocab_size * config.embed_dim


def _predicted(model: type[Detector], lengths: Mapping[str, int]) -> int:
    return math.ceil(lengths["inputs"] * _PREDICTED[model])
