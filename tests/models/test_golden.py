"""Our stack computes what Hugging Face's models compute with the same weights (see golden/make_hf_golden.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_domain.conversion.check import rounding_bound
from t5x_domain.conversion.huggingface import GATED_T5, LLAMA, PLAIN_T5, filled, is_transposed
from t5x_domain.conversion.layout import leaves
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder, EncoderOnly
from t5x_domain.models.config import ModelConfig

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPE = {"vocab_size": 80, "embed_dim": 16, "mlp_dim": 24, "num_heads": 4, "head_dim": 6, "dtype": "float32"}
T5 = {
    **SHAPE,
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
    "relative_bias_buckets": 8,
    "relative_bias_max_distance": 12,
}
SHALLOW_T5 = {**T5, "num_encoder_layers": 1, "num_decoder_layers": 1}
DECODER = {**SHAPE, "num_decoder_layers": 5, "position": "rope", "attention_scale": "head_dim"}
# Hugging Face counts a causal window with the query itself (5 there is 4 here) and ModernBERT's over both sides (8).
GEMMA = {
    **DECODER,
    "norm_unit_offset": True,
    "norm_placement": "pre_post",
    "tie_embeddings": True,
    "scale_embedding": True,
    "local_window": 4,
}
MODELS = {
    "t5_1_0": (
        "t5_ungated",
        EncoderDecoder,
        {**T5, "mlp_activations": ("relu",), "tie_embeddings": True, "scale_logits": True},
    ),
    "t5_1_1": ("t5", EncoderDecoder, T5),
    "t5_gated_tied": ("t5", EncoderDecoder, {**T5, "tie_embeddings": True, "scale_logits": True}),
    "t5_ungated_untied": ("t5_ungated", EncoderDecoder, {**T5, "mlp_activations": ("relu",)}),
    "umt5": ("t5", EncoderDecoder, {**T5, "relative_bias_per_layer": True}),
    "mt5": ("t5", EncoderDecoder, SHALLOW_T5),
    "ul2": ("t5", EncoderDecoder, {**SHALLOW_T5, "mlp_activations": ("silu", "linear")}),
    "t5_encoder": ("t5", EncoderOnly, {**T5, "tie_embeddings": True}),
    "longt5": (
        "longt5",
        EncoderOnly,
        {
            **SHAPE,
            "vocab_size": 24,
            "embed_dim": 8,
            "mlp_dim": 8,
            "head_dim": 4,
            "num_encoder_layers": 2,
            "relative_bias_buckets": 8,
            "relative_bias_max_distance": 12,
            "tie_embeddings": True,
            "layer_pattern": ("local",),
            "local_window": 5,
            "global_blocks": "transient",
            "global_block_size": 4,
        },
    ),
    "llama": (
        "llama",
        DecoderOnly,
        {**DECODER, "num_kv_heads": 2, "mlp_activations": ("silu", "linear"), "norm_epsilon": 1e-5, "rope_base": 500.0},
    ),
    "gemma2": (
        "gemma",
        DecoderOnly,
        {
            **GEMMA,
            "num_kv_heads": 2,
            "layer_pattern": ("local", "global"),
            "attention_softcap": 3.0,
            "final_logit_softcap": 4.0,
        },
    ),
    "gemma3": (
        "gemma",
        DecoderOnly,
        {
            **GEMMA,
            "num_kv_heads": 1,
            "layer_pattern": ("local", "local", "global"),
            "qk_norm": True,
            "rope_base": 1000.0,
            "rope_base_local": 100.0,
        },
    ),
    "modernbert": (
        "modernbert",
        EncoderOnly,
        {
            **DECODER,
            "head_dim": 4,
            "num_encoder_layers": 5,
            "layer_pattern": ("global", "local", "local"),
            "local_window": 4,
            "rope_base": 1000.0,
            "rope_base_local": 100.0,
            "norm": "layernorm",
            "norm_epsilon": 1e-5,
            "embedding_norm": True,
            "tie_embeddings": True,
            "mlp_activations": ("gelu_exact", "linear"),
        },
    ),
}


GEMMA_NAMES = {ours: theirs for ours, theirs in LLAMA.items() if not ours.endswith("mlp/norm/scale")} | {
    "decoder/{i}/self_attention/inner/query_norm/scale": "model.layers.{i}.self_attn.q_norm.weight",
    "decoder/{i}/self_attention/inner/key_norm/scale": "model.layers.{i}.self_attn.k_norm.weight",
    "decoder/{i}/self_attention/post_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
    "decoder/{i}/mlp/norm/scale": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "decoder/{i}/mlp/post_norm/scale": "model.layers.{i}.post_feedforward_layernorm.weight",
}
MODERNBERT_NAMES = {
    "embedding/embedding": "embeddings.tok_embeddings.weight",
    "embedding/norm/scale": "embeddings.norm.weight",
    "encoder/norm/scale": "final_norm.weight",
    "encoder/{i}/self_attention/norm/scale": "layers.{i}.attn_norm.weight",
    "encoder/{i}/self_attention/inner/out/kernel": "layers.{i}.attn.Wo.weight",
    "encoder/{i}/mlp/norm/scale": "layers.{i}.mlp_norm.weight",
    "encoder/{i}/mlp/inner/wi/0/kernel": "layers.{i}.mlp.Wi.weight[0/2]",
    "encoder/{i}/mlp/inner/wi/1/kernel": "layers.{i}.mlp.Wi.weight[1/2]",
    "encoder/{i}/mlp/inner/wo/kernel": "layers.{i}.mlp.Wo.weight",
} | {
    f"encoder/{{i}}/self_attention/inner/{name}/kernel": f"layers.{{i}}.attn.Wqkv.weight[{part}/3]"
    for part, name in enumerate(("query", "key", "value"))
}
LONGT5_NAMES = {
    ours: theirs.replace(".SelfAttention.", ".TransientGlobalSelfAttention.") for ours, theirs in GATED_T5.items()
} | {
    "encoder/{i}/self_attention/inner/global_norm/scale": (
        "encoder.block.{i}.layer.0.TransientGlobalSelfAttention.global_input_layer_norm.weight"
    ),
    "encoder/global_relative_bias/table": (
        "encoder.block.0.layer.0.TransientGlobalSelfAttention.global_relative_attention_bias.weight"
    ),
}
NAMES = {
    "t5": GATED_T5,
    "t5_ungated": PLAIN_T5,
    "longt5": LONGT5_NAMES,
    "llama": LLAMA,
    "gemma": GEMMA_NAMES,
    "modernbert": MODERNBERT_NAMES,
}


def load(name: str, **changes):
    """The model of that name with its golden weights, the golden arrays, and which of the outputs are not padding."""
    family, assembly, options = MODELS[name]
    golden = dict(np.load(GOLDEN / f"{name}.npz"))
    weights = {key.removeprefix("weights/"): value for key, value in golden.items() if key.startswith("weights/")}
    model = assembly(ModelConfig(**options | changes), rngs=nnx.Rngs(0))
    set_weights(model, NAMES[family], weights)
    valid = golden.get("decoder_attention_mask", golden["attention_mask"]).astype(bool)
    return model, golden, valid


def set_weights(model, names: dict[str, str], weights: dict[str, np.ndarray]) -> None:
    """Puts Hugging Face's weights into the model; every weight must find its place and every place its weight."""
    unused = set(weights)

    def weight(ours: str) -> np.ndarray:
        name, _, part = filled(names, ours).partition("[")
        unused.discard(name)
        array = weights[name]
        if part:
            index, parts = map(int, part.rstrip("]").split("/"))
            array = np.split(array, parts)[index]
        return array.T if is_transposed(ours) else array

    by_name = {leaf.name: leaf for leaf in leaves(type(model), model.config)}
    state = nnx.state(model)
    for path, param in nnx.to_flat_state(state):
        leaf = by_name["/".join(map(str, path))]
        values = [weight(part) for part in leaf.parts]
        value = np.stack(values) if leaf.stacked else values[0]
        assert value.shape == param.shape, path
        param.set_value(jnp.asarray(value))
    nnx.update(model, state)
    assert not unused


def outputs(model, golden) -> jax.Array:
    """Logits, or of an encoder the hidden states."""
    mask = golden["attention_mask"]
    if isinstance(model, EncoderDecoder):
        hidden = model(
            golden["input_ids"],
            golden["decoder_input_ids"],
            encoder_segment_ids=mask,
            decoder_segment_ids=golden["decoder_attention_mask"],
        )
        return model.logits(hidden)
    if isinstance(model, EncoderOnly):
        return model(golden["input_ids"], encoder_segment_ids=mask)
    return model.logits(model(golden["input_ids"], decoder_segment_ids=mask))


UNROLLED = ("t5_1_1", "umt5", "gemma3", "modernbert")  # one of each way to share, repeat and leave over layers


@pytest.mark.parametrize("name, scan_layers", [(n, True) for n in MODELS] + [(n, False) for n in UNROLLED])
def test_outputs_equal_hugging_face(name, scan_layers):
    model, golden, valid = load(name, scan_layers=scan_layers)
    predicted = np.asarray(nnx.jit(outputs)(model, {k: v for k, v in golden.items() if v.dtype == np.int32}))
    expected = golden["expected"][valid]
    bound = rounding_bound(model.config, abs(expected).max())
    np.testing.assert_allclose(predicted[valid], expected, rtol=0, atol=bound)


def test_the_bound_sees_a_wrong_epsilon():
    """The bound is tight enough: the smallest wrong detail, an epsilon of 1e-5 instead of 1e-6, oversteps it."""
    model, golden, valid = load("t5_1_1", norm_epsilon=1e-5)
    error = np.abs(np.asarray(outputs(model, golden)) - golden["expected"])[valid].max()
    assert error > rounding_bound(model.config, abs(golden["expected"]).max())


def test_golden_files_are_small():
    """Each of them, so that there may be one for every family."""
    assert max(path.stat().st_size for path in GOLDEN.glob("*.npz")) < 115_000
