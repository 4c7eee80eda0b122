"""Encoders of BERT's form as Hugging Face has them: ElectraModel, and LongformerModel where attention is local.

Names and settings follow transformers' `modeling_electra.py` and `modeling_longformer.py`. Biases and token types,
which ours have not, are written as zeros.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from t5x_domain.conversion.tensors import Tensor
from t5x_domain.data.vocabulary import EOS_ID, PAD_ID
from t5x_domain.models.config import ModelConfig

# Longformer counts positions from the one behind its padding's id.
_ROWS_BEFORE_POSITIONS = PAD_ID + 1
_ACTIVATIONS = {"gelu": "gelu_new", "gelu_exact": "gelu", "relu": "relu", "silu": "silu"}
_TOKEN_TYPES = 2
_POSITIONS = "embeddings.position_embeddings.weight"


def _patterns() -> dict[str, str]:
    """Ours -> Hugging Face's; {i} is the layer."""
    ours, theirs = "encoder/{i}", "encoder.layer.{i}"
    names = {
        "embedding/embedding": "embeddings.word_embeddings.weight",
        "embedding/positions": _POSITIONS,
        "embedding/norm/scale": "embeddings.LayerNorm.weight",
        "embedding/projection/kernel": "embeddings_project.weight",
        f"{ours}/self_attention/inner/out/kernel": f"{theirs}.attention.output.dense.weight",
        f"{ours}/self_attention/norm/scale": f"{theirs}.attention.output.LayerNorm.weight",
        f"{ours}/mlp/inner/wi/0/kernel": f"{theirs}.intermediate.dense.weight",
        f"{ours}/mlp/inner/wo/kernel": f"{theirs}.output.dense.weight",
        f"{ours}/mlp/norm/scale": f"{theirs}.output.LayerNorm.weight",
    }
    for linear in ("query", "key", "value"):
        names[f"{ours}/self_attention/inner/{linear}/kernel"] = f"{theirs}.attention.self.{linear}.weight"
    return names


BERT = _patterns()


def bert_problems(config: ModelConfig) -> list[str]:
    """What keeps an encoder from BERT's form, beside settings that have but one value there."""
    problems = []
    if config.kv_heads != config.num_heads:
        problems.append(f"num_kv_heads = {config.num_kv_heads} (as many as num_heads)")
    if config.num_heads * config.head_dim != config.embed_dim:
        problems.append(f"head_dim = {config.head_dim} (embed_dim / num_heads)")
    if len(config.mlp_activations) > 1 or config.mlp_activations[0] not in _ACTIVATIONS:
        problems.append(f"mlp_activations = {tuple(config.mlp_activations)} (one, and not 'linear')")
    if config.global_blocks == "transient":
        problems.append("global_blocks = 'transient' (only 'none' and 'every')")
    if not config.tie_embeddings:
        problems.append("tie_embeddings = False (there is no output embedding)")
    return problems


def electra_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of an ElectraModel."""
    return _common(config) | {
        "architectures": ["ElectraModel"],
        "model_type": "electra",
        "embedding_size": config.embedding_dim or config.embed_dim,
        "max_position_embeddings": config.max_positions,
    }


def longformer_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a LongformerModel, whose windows are counted over both sides."""
    return _common(config) | {
        "architectures": ["LongformerModel"],
        "model_type": "longformer",
        "attention_window": [2 * config.local_window] * config.num_encoder_layers,
        "max_position_embeddings": config.max_positions + _ROWS_BEFORE_POSITIONS,
        "bos_token_id": None,
        "sep_token_id": EOS_ID,
    }


def global_positions(config: ModelConfig, length: int) -> list[int]:
    """Tokens of a text of `length` that Longformer's `global_attention_mask` has to name."""
    every = range(config.global_block_size - 1, length, config.global_block_size)
    blocks = every if config.global_blocks == "every" else ()
    return sorted({*range(min(config.global_tokens, length)), *blocks})


def completed(tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of the model that a config.json describes.

    Args:
      tensors: those that our model has, by Hugging Face's names; of another family than BERT's they are all.
      content: the config.json.

    Returns:
      With zeros for biases and token types. Longformer's global tokens have projections of their own, which are copies
      (Beltagy et al. 2020, section 3.1), and its positions rows before the first that belong to padding.
    """
    if content["model_type"] not in ("electra", "longformer"):
        return dict(tensors)
    words = tensors["embeddings.word_embeddings.weight"]
    types = _zeros((_TOKEN_TYPES, words.shape[1]), words.dtype)
    result = {**tensors, "embeddings.token_type_embeddings.weight": types}
    for name, weight in tensors.items():
        if "_embeddings." not in name:
            result[name.replace(".weight", ".bias")] = _zeros(weight.shape[:1], weight.dtype)
    if content["model_type"] == "longformer":
        result[_POSITIONS] = _with_rows_before(tensors[_POSITIONS])
        projections = [name for name in result if ".attention.self." in name]
        for name in projections:
            layer, linear, kind = name.rsplit(".", 2)
            result[f"{layer}.{linear}_global.{kind}"] = result[name]
    return result


def _common(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_encoder_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": _ACTIVATIONS[config.mlp_activations[0]],
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.norm_epsilon,
        "type_vocab_size": _TOKEN_TYPES,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
    }


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    return Tensor.of(np.zeros(shape, dtype))


def _with_rows_before(table: Tensor) -> Tensor:
    rows, width = table.shape
    before = np.zeros((_ROWS_BEFORE_POSITIONS, width), table.dtype)
    shape = (rows + _ROWS_BEFORE_POSITIONS, width)
    return Tensor(shape, table.dtype, lambda index: np.concatenate([before, table.read()])[index])
