"""config.json of Hugging Face folders to a `ModelConfig` and back, exactly or not at all."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_domain.conversion.huggingface_bert import bert_problems, electra_config, longformer_config
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder, EncoderOnly, LanguageModel
from t5x_domain.models.config import GLOBAL, LOCAL, ModelConfig

T5_TYPES = ("t5", "mt5", "umt5")
# transformers' names of activations; "gelu" is exact except in "gated-gelu", which means "gelu_new".
_ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "gelu": "gelu_exact", "silu": "silu", "swish": "silu"}
_T5_FEED_FORWARD = {
    ("relu",): "relu",
    ("gelu",): "gelu_new",
    ("gelu_exact",): "gelu",
    ("silu",): "silu",
    ("relu", "linear"): "gated-relu",
    ("gelu", "linear"): "gated-gelu",
    ("silu", "linear"): "gated-silu",
}
_OPTIONAL = ("num_decoder_layers", "num_key_value_heads", "head_dim")  # which may be null
_COUNTS = {
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "relative_attention_num_buckets", "relative_attention_max_distance"),
    *_OPTIONAL,
}
_NUMBERS = {"layer_norm_epsilon", "rms_norm_eps", "dropout_rate", "rope_theta"}
# Settings that a family has no other value for.
_COMMON = {
    "embedding_dim": None,
    "norm": "rmsnorm",
    "norm_unit_offset": False,
    "norm_placement": "pre",
    "embedding_norm": False,
    "qk_norm": False,
    "attention_softcap": None,
    "final_logit_softcap": None,
    "scale_embedding": False,
}
_T5_FIXED = _COMMON | {"position": "relative_bias", "attention_scale": "none"}
_LLAMA_FIXED = _COMMON | {
    "position": "rope",
    "attention_scale": "head_dim",
    "mlp_activations": ("silu", "linear"),
    "scale_logits": False,
}
_LONGFORMER_FIXED = _COMMON | {
    "norm": "layernorm",
    "norm_placement": "post",
    "embedding_norm": True,
    "position": "learned",
    "attention_scale": "head_dim",
}
_ELECTRA_FIXED = {key: value for key, value in _LONGFORMER_FIXED.items() if key != "embedding_dim"}


def read_config(
    origin: str, config: Mapping[str, Any], *, has_output: bool, dtype: str
) -> tuple[type[LanguageModel], ModelConfig]:
    """The assembly and shape that a config.json describes.

    Args:
      origin: the file, for messages.
      config: its content.
      has_output: whether the weights hold an output embedding of their own.
      dtype: of activations, which config.json does not decide.

    Raises:
      UserError: an architecture or option that our stack does not have, named; or a key that is missing.
    """
    kind = config.get("model_type")
    _require_numbers(origin, config)
    try:
        if kind in T5_TYPES:
            return _read_t5(origin, config, has_output=has_output, dtype=dtype)
        if kind == "llama":
            return DecoderOnly, _read_llama(origin, config, has_output=has_output, dtype=dtype)
    except KeyError as error:
        raise UserError(f"{origin}: has no {error}; it is not the configuration of a {kind} model.") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{origin}: a value of the wrong type ({error}).") from error
    except UserError as error:  # of ModelConfig, which does not know the file
        raise error if origin in str(error) else UserError(f"{origin}: {error}") from error
    raise UserError(
        f"{origin}: model_type = {kind!r} is not converted; {', '.join(T5_TYPES)} and llama are "
        "(T5, mT5, umT5, Flan-T5, UL2, ByT5 and Llama shapes)."
    )


def _require_numbers(origin: str, config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if value is None and key in _OPTIONAL:
            continue
        if key in _COUNTS and not (type(value) is int and value > 0):
            raise UserError(f"{origin}: {key} = {value!r} is no whole number above 0; copy the file anew.")
        if key in _NUMBERS and type(value) not in (int, float):
            raise UserError(f"{origin}: {key} = {value!r} is no number; copy the file anew.")


def _read_t5(
    origin: str, config: Mapping[str, Any], *, has_output: bool, dtype: str
) -> tuple[type[LanguageModel], ModelConfig]:
    architecture = (config.get("architectures") or ["T5ForConditionalGeneration"])[0]
    if architecture.endswith("EncoderModel"):
        model: type[LanguageModel] = EncoderOnly
    elif architecture.endswith(("ForConditionalGeneration", "WithLMHeadModel")):
        model = EncoderDecoder
    else:
        raise UserError(
            f"{origin}: architectures = [{architecture!r}] is not converted; …ForConditionalGeneration and "
            "…EncoderModel are."
        )
    gate, _, name = config.get("feed_forward_proj", "relu").rpartition("-")
    name = "gelu_new" if (gate, name) == ("gated", "gelu") else name
    if gate not in ("", "gated") or name not in _ACTIVATIONS:
        raise UserError(f"{origin}: feed_forward_proj = {config['feed_forward_proj']!r} is not converted.")
    layers = config["num_layers"]
    decoder_layers = config.get("num_decoder_layers")
    tied = config.get("tie_word_embeddings", True) is not False
    # transformers 5 says tie_word_embeddings = true of every T5 that it saves. Whether logits are scaled stands in a
    # key of its own (t5), follows from the tie (umt5), or never happens to an output embedding (mt5).
    scaled = config.get("scale_decoder_outputs", tied) and not (config["model_type"] == "mt5" and has_output)
    if model is EncoderDecoder and not tied and not has_output:
        raise UserError(
            f"{origin}: tie_word_embeddings is false, but there is no lm_head.weight; the weights are incomplete, or "
            "the key should be true."
        )
    return model, ModelConfig(
        vocab_size=config["vocab_size"],
        embed_dim=config["d_model"],
        mlp_dim=config["d_ff"],
        num_heads=config["num_heads"],
        head_dim=config["d_kv"],
        num_encoder_layers=layers,
        num_decoder_layers=(decoder_layers or layers) if model is EncoderDecoder else 0,
        mlp_activations=(_ACTIVATIONS[name], "linear") if gate else (_ACTIVATIONS[name],),
        norm_epsilon=config.get("layer_norm_epsilon", 1e-6),
        relative_bias_buckets=config.get("relative_attention_num_buckets", 32),
        relative_bias_max_distance=config.get("relative_attention_max_distance", 128),
        relative_bias_per_layer=config["model_type"] == "umt5",
        tie_embeddings=not has_output,
        scale_logits=scaled and model is EncoderDecoder,
        dropout_rate=config.get("dropout_rate", 0.1),
        dtype=dtype,
    )


def _read_llama(origin: str, config: Mapping[str, Any], *, has_output: bool, dtype: str) -> ModelConfig:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    unsupported = {
        "rope_type": (rope_type, "default"),
        "attention_bias": (config.get("attention_bias", False), False),
        "mlp_bias": (config.get("mlp_bias", False), False),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)), 1),
    }
    for key, (value, wanted) in unsupported.items():
        if value != wanted:
            raise UserError(f"{origin}: {key} = {value!r} is not converted, only {wanted!r}.")
    if not has_output and config.get("tie_word_embeddings", False) is False:
        raise UserError(f"{origin}: tie_word_embeddings is false, but there is no lm_head.weight.")
    heads = config["num_attention_heads"]
    return ModelConfig(
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        mlp_dim=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        num_encoder_layers=0,
        num_decoder_layers=config["num_hidden_layers"],
        mlp_activations=("silu", "linear"),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        position="rope",
        rope_base=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
        attention_scale="head_dim",
        tie_embeddings=not has_output,
        dtype=dtype,
    )


def write_config(model: type[LanguageModel], config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """The config.json of a model whose weights are of `dtype`.

    Raises:
      UserError: options that no Hugging Face model of the family has, each named; of an encoder the family that it
        differs least from.
    """
    if model is DecoderOnly:
        _refuse("Llama", _differences(config, _LLAMA_FIXED))
        return _llama_config(config) | _dtype(dtype)
    problems = {}
    if model is EncoderOnly:
        problems["Longformer"] = _differences(config, _LONGFORMER_FIXED, layers=LOCAL) + bert_problems(config)
        problems["Electra"] = _differences(config, _ELECTRA_FIXED) + bert_problems(config)
    problems["T5"] = _t5_problems(model, config)
    family = min(problems, key=lambda family: len(problems[family]))
    _refuse(family, problems[family], [other for other in problems if other != family])
    if family == "T5":
        return _t5_config(model, config) | _dtype(dtype)
    return {"Electra": electra_config, "Longformer": longformer_config}[family](config) | _dtype(dtype)


def _t5_problems(model: type[LanguageModel], config: ModelConfig) -> list[str]:
    problems = _differences(config, _T5_FIXED)
    if config.kv_heads != config.num_heads:
        problems.append(f"num_kv_heads = {config.num_kv_heads} (T5: as many as num_heads)")
    if tuple(config.mlp_activations) not in _T5_FEED_FORWARD:
        problems.append(f"mlp_activations = {tuple(config.mlp_activations)}")
    if model is EncoderDecoder and config.scale_logits != config.tie_embeddings:
        # transformers scales logits exactly where config.json says that the embeddings are tied.
        problems.append(f"scale_logits = {config.scale_logits} with tie_embeddings = {config.tie_embeddings}")
    if model is EncoderOnly and not config.tie_embeddings:
        problems.append("tie_embeddings = False (a T5EncoderModel has no output embedding)")
    return problems


def _t5_config(model: type[LanguageModel], config: ModelConfig) -> dict[str, Any]:
    family = "UMT5" if config.relative_bias_per_layer else "T5"
    encoder_only = model is EncoderOnly
    return {
        "architectures": [f"{family}EncoderModel" if encoder_only else f"{family}ForConditionalGeneration"],
        "model_type": family.lower(),
        "vocab_size": config.vocab_size,
        "d_model": config.embed_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers or config.num_encoder_layers,
        "num_heads": config.num_heads,
        "feed_forward_proj": _T5_FEED_FORWARD[tuple(config.mlp_activations)],
        "layer_norm_epsilon": config.norm_epsilon,
        "relative_attention_num_buckets": config.relative_bias_buckets,
        "relative_attention_max_distance": config.relative_bias_max_distance,
        "dropout_rate": config.dropout_rate,
        "initializer_factor": 1.0,
        "is_encoder_decoder": not encoder_only,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def _llama_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_decoder_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_base,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},  # transformers 5
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "bos_token_id": 0,  # rows of a decoder-only model start with id 0
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def _dtype(dtype: str) -> dict[str, str]:
    return {"dtype": dtype, "torch_dtype": dtype}  # transformers 5 and 4


def _differences(config: ModelConfig, fixed: Mapping[str, Any], *, layers: str = GLOBAL) -> list[str]:
    values = dataclasses.asdict(config)
    problems = [
        f"{key} = {values[key]!r} (not {wanted!r})"
        for key, wanted in fixed.items()
        if (tuple(values[key]) if isinstance(values[key], list) else values[key]) != wanted
    ]
    if set(config.layer_pattern) != {layers}:
        problems.append(f"layer_pattern = {tuple(config.layer_pattern)} (only {layers!r})")
    if set(config.decoder_layer_pattern or {GLOBAL}) != {GLOBAL}:
        problems.append(f"decoder_layer_pattern = {tuple(config.decoder_layer_pattern)} (only 'global')")
    return problems


def _refuse(family: str, problems: Sequence[str], others: Sequence[str] = ()) -> None:
    if problems:
        raise UserError(
            f"no Hugging Face {family} model computes what this one does: ModelConfig."
            + ", ModelConfig.".join(problems)
            + (f"; {' and '.join(others)} differ as much or more." if others else ".")
        )
