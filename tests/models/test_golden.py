"""Our stack computes what Hugging Face's models compute with the same weights (see golden/make_hf_golden.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
    "t5_encoder": ("t5", EncoderOnly, {**T5, "tie_embeddings": True}),
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


def t5_names(stack: str, sublayers: tuple[str, ...]) -> dict[str, str]:
    """Ours -> Hugging Face's; {i} is the layer. The shared bias stands in Hugging Face's first layer."""
    bias = "layer.0.SelfAttention.relative_attention_bias.weight"
    names = {
        f"{stack}.relative_bias.table": f"{stack}.block.0.{bias}",
        f"{stack}.{{i}}.relative_bias.table": f"{stack}.block.{{i}}.{bias}",
        f"{stack}.norm.scale": f"{stack}.final_layer_norm.weight",
    }
    for j, sublayer in enumerate(sublayers):
        ours, theirs = f"{stack}.{{i}}.{sublayer}", f"{stack}.block.{{i}}.layer.{j}"
        names[f"{ours}.norm.scale"] = f"{theirs}.layer_norm.weight"
        if sublayer == "mlp":
            names |= {f"{ours}.inner.wi.{b}.kernel": f"{theirs}.DenseReluDense.wi_{b}.weight" for b in (0, 1)}
            names[f"{ours}.inner.wo.kernel"] = f"{theirs}.DenseReluDense.wo.weight"
        else:
            attention = "SelfAttention" if j == 0 else "EncDecAttention"
            for linear in ("query", "key", "value", "out"):
                names[f"{ours}.inner.{linear}.kernel"] = f"{theirs}.{attention}.{linear[0]}.weight"
    return names


def decoder_names() -> dict[str, str]:
    """Llama and Gemma."""
    ours, theirs = "decoder.{i}", "model.layers.{i}"
    names = {"decoder.norm.scale": "model.norm.weight", "embedding.embedding": "model.embed_tokens.weight"}
    for linear in ("query", "key", "value", "out"):
        names[f"{ours}.self_attention.inner.{linear}.kernel"] = f"{theirs}.self_attn.{linear[0]}_proj.weight"
    for norm in ("query", "key"):
        names[f"{ours}.self_attention.inner.{norm}_norm.scale"] = f"{theirs}.self_attn.{norm[0]}_norm.weight"
    for linear, name in (("wi.0", "gate"), ("wi.1", "up"), ("wo", "down")):
        names[f"{ours}.mlp.inner.{linear}.kernel"] = f"{theirs}.mlp.{name}_proj.weight"
    return names | {f"{ours}.self_attention.norm.scale": f"{theirs}.input_layernorm.weight"}


NAMES = {
    "t5": {
        "embedding.embedding": "shared.weight",
        "embedding.output": "lm_head.weight",
        **t5_names("encoder", ("self_attention", "mlp")),
        **t5_names("decoder", ("self_attention", "cross_attention", "mlp")),
    },
    "llama": {
        **decoder_names(),
        "embedding.output": "lm_head.weight",
        "decoder.{i}.mlp.norm.scale": "model.layers.{i}.post_attention_layernorm.weight",
    },
    "gemma": {
        **decoder_names(),
        "decoder.{i}.self_attention.post_norm.scale": "model.layers.{i}.post_attention_layernorm.weight",
        "decoder.{i}.mlp.norm.scale": "model.layers.{i}.pre_feedforward_layernorm.weight",
        "decoder.{i}.mlp.post_norm.scale": "model.layers.{i}.post_feedforward_layernorm.weight",
    },
    "modernbert": {
        "embedding.embedding": "embeddings.tok_embeddings.weight",
        "embedding.norm.scale": "embeddings.norm.weight",
        "encoder.norm.scale": "final_norm.weight",
        "encoder.{i}.self_attention.norm.scale": "layers.{i}.attn_norm.weight",
        **{
            f"encoder.{{i}}.self_attention.inner.{name}.kernel": f"layers.{{i}}.attn.Wqkv.weight[{part}/3]"
            for part, name in enumerate(("query", "key", "value"))
        },
        "encoder.{i}.self_attention.inner.out.kernel": "layers.{i}.attn.Wo.weight",
        "encoder.{i}.mlp.norm.scale": "layers.{i}.mlp_norm.weight",
        "encoder.{i}.mlp.inner.wi.0.kernel": "layers.{i}.mlp.Wi.weight[0/2]",
        "encoder.{i}.mlp.inner.wi.1.kernel": "layers.{i}.mlp.Wi.weight[1/2]",
        "encoder.{i}.mlp.inner.wo.kernel": "layers.{i}.mlp.Wo.weight",
    },
}


NAMES["t5_ungated"] = {ours: theirs.replace(".wi_0.", ".wi.") for ours, theirs in NAMES["t5"].items()}


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

    def weight(ours: str, layer: int | None) -> np.ndarray:
        name, _, part = names[ours].format(i=layer).partition("[")
        unused.discard(name)
        array = weights[name]
        if part:
            index, parts = map(int, part.rstrip("]").split("/"))
            array = np.split(array, parts)[index]
        return array.T if ours.endswith("kernel") else array

    state = nnx.state(model)
    for path, param in nnx.to_flat_state(state):
        stack, *rest = map(str, path)
        layers = getattr(model, stack).layers if stack != "embedding" else None
        kinds = 0 if layers is None else len(layers.blocks)
        repeats = 0 if layers is None else param.shape[0]
        if rest[0] == "layers":  # layers.blocks.KIND.…: layer KIND of each repeated pattern
            ours = ".".join([stack, "{i}", *rest[3:]])
            value = np.stack([weight(ours, repeat * kinds + int(rest[2])) for repeat in range(repeats)])
        elif rest[0] == "rest":  # rest.blocks.INDEX.…: after the whole patterns
            done = 0 if layers is None else kinds * jax.tree.leaves(nnx.state(layers))[0].shape[0]
            value = weight(".".join([stack, "{i}", *rest[3:]]), done + int(rest[2]))
        else:
            value = weight(".".join([stack, *rest]), None)
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


def tolerance(config: ModelConfig, largest: float) -> float:
    """Largest difference that float32 rounding explains.

    One sub-layer has about 8 steps that round (norm, projections, softmax, products, sum). A product of length n has a
    relative error of about sqrt(n) u, u = 2^-24 (Higham & Mary 2019), with n = mlp_dim the longest here. Both models
    round, and errors of all sub-layers add on the residual stream; the last norm makes them relative to the outputs.
    """
    sublayers = 2 * config.num_encoder_layers + 3 * config.num_decoder_layers
    return 2 * 8 * sublayers * config.mlp_dim**0.5 * 2**-24 * largest


UNROLLED = ("t5_1_1", "umt5", "gemma3", "modernbert")  # one of each way to share, repeat and leave over layers


@pytest.mark.parametrize("name, scan_layers", [(n, True) for n in MODELS] + [(n, False) for n in UNROLLED])
def test_outputs_equal_hugging_face(name, scan_layers):
    model, golden, valid = load(name, scan_layers=scan_layers)
    predicted = np.asarray(nnx.jit(outputs)(model, {k: v for k, v in golden.items() if v.dtype == np.int32}))
    expected = golden["expected"][valid]
    bound = tolerance(model.config, abs(expected).max())
    np.testing.assert_allclose(predicted[valid], expected, rtol=0, atol=bound)


def test_the_bound_sees_a_wrong_epsilon():
    """The bound is tight enough: the smallest wrong detail, an epsilon of 1e-5 instead of 1e-6, oversteps it."""
    model, golden, valid = load("t5_1_1", norm_epsilon=1e-5)
    error = np.abs(np.asarray(outputs(model, golden)) - golden["expected"])[valid].max()
    assert error > tolerance(model.config, abs(golden["expected"]).max())


def test_golden_files_are_small():
    assert sum(path.stat().st_size for path in GOLDEN.glob("*.npz")) < 1_000_000
