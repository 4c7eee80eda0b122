"""Writes the golden files that tests/models/test_golden.py compares our models with.

Each holds the float32 weights of a tiny random Hugging Face model, token ids with padding, and what the model computes
of them. Run it in an environment of its own, Python 3.11 with torch 2.13 and transformers 5.23:

    pip install torch==2.13.0 transformers==5.23.0
    python tests/golden/make_hf_golden.py [NAME …]
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers as hf

VOCAB_SIZE, EMBED_DIM, MLP_DIM, HEADS, HEAD_DIM = 80, 16, 24, 4, 6
# Longer than max_distance of the relative bias and than the local windows, so that both borders are crossed.
INPUT_LENGTH, TARGET_LENGTH = 22, 17
T5 = {
    "vocab_size": VOCAB_SIZE, "d_model": EMBED_DIM, "d_kv": HEAD_DIM, "d_ff": MLP_DIM, "num_heads": HEADS,
    "num_layers": 2, "num_decoder_layers": 3,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
}  # fmt: skip
SHALLOW_T5 = {**T5, "num_layers": 1, "num_decoder_layers": 1}
DECODER = {
    "vocab_size": VOCAB_SIZE, "hidden_size": EMBED_DIM, "intermediate_size": MLP_DIM, "num_attention_heads": HEADS,
    "num_hidden_layers": 5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LOCAL = ["sliding_attention"]
GLOBAL = ["full_attention"]


def t5(rng: np.random.Generator, *, gated: bool, tied: bool) -> tuple[hf.PreTrainedModel, dict]:
    """T5 1.0 is neither gated nor untied, T5 1.1 is both."""
    kind = "gated-gelu" if gated else "relu"
    model = hf.T5ForConditionalGeneration(hf.T5Config(**T5, feed_forward_proj=kind, tie_word_embeddings=tied))
    if not tied:  # transformers 5 ties T5's output embedding whatever the configuration says
        model.lm_head = torch.nn.Linear(EMBED_DIM, VOCAB_SIZE, bias=False)
    randomise(model, rng)
    assert (model.lm_head.weight is model.shared.weight) == tied
    assert model.config.scale_decoder_outputs == tied
    return model, encoder_decoder(model, rng)


def umt5(rng: np.random.Generator) -> tuple[hf.PreTrainedModel, dict]:
    """A relative bias for each layer."""
    model = hf.UMT5ForConditionalGeneration(hf.UMT5Config(**T5))
    model.lm_head = torch.nn.Linear(EMBED_DIM, VOCAB_SIZE, bias=False)
    model.config.tie_word_embeddings = False  # transformers 5 says True, and would scale the logits as for T5 1.0
    randomise(model, rng)
    assert model.lm_head.weight is not model.shared.weight
    return model, encoder_decoder(model, rng)


def mt5(rng: np.random.Generator) -> tuple[hf.PreTrainedModel, dict]:
    """T5 1.1 under another name; transformers 5 never scales its logits."""
    model = hf.MT5ForConditionalGeneration(hf.MT5Config(**SHALLOW_T5, feed_forward_proj="gated-gelu"))
    model.lm_head = torch.nn.Linear(EMBED_DIM, VOCAB_SIZE, bias=False)
    randomise(model, rng)
    assert model.lm_head.weight is not model.shared.weight
    return model, encoder_decoder(model, rng)


def ul2(rng: np.random.Generator) -> tuple[hf.PreTrainedModel, dict]:
    """T5 1.1 with SwiGLU."""
    model = hf.T5ForConditionalGeneration(
        hf.T5Config(**SHALLOW_T5, feed_forward_proj="gated-silu", tie_word_embeddings=False)
    )
    model.lm_head = torch.nn.Linear(EMBED_DIM, VOCAB_SIZE, bias=False)
    randomise(model, rng)
    return model, encoder_decoder(model, rng)


def t5_encoder(rng: np.random.Generator) -> tuple[hf.PreTrainedModel, dict]:
    """Hidden states of an encoder alone."""
    model = hf.T5EncoderModel(hf.T5Config(**T5, feed_forward_proj="gated-gelu"))
    randomise(model, rng)
    return model, one_stack(model, rng, "last_hidden_state")


def longt5(rng: np.random.Generator) -> tuple[hf.PreTrainedModel, dict]:
    """Windows, and a token for each block: rows with and without left-over tokens, and one shorter than a block."""
    config = hf.LongT5Config(
        vocab_size=24, d_model=8, d_kv=4, d_ff=8, num_heads=4, num_layers=2, feed_forward_proj="gated-gelu",
        encoder_attention_type="transient-global", local_radius=5, global_block_size=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=12,
    )  # fmt: skip
    model = hf.LongT5EncoderModel(config)
    randomise(model, rng)
    return model, one_stack(model, rng, "last_hidden_state", padded(rng, 34, (34, 28, 3), config.vocab_size))


def llama(rng: np.random.Generator) -> tuple[hf.PreTrainedModel, dict]:
    """Grouped-query attention, rotary positions, SwiGLU."""
    config = hf.LlamaConfig(
        **DECODER, num_key_value_heads=2, head_dim=HEAD_DIM, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config)
    randomise(model, rng)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    return model, one_stack(model, rng, "logits")


def gemma2(rng: np.random.Generator) -> tuple[hf.PreTrainedModel, dict]:
    """Soft caps, alternating local and global layers, norms before and after with an offset of one."""
    config = hf.Gemma2Config(
        **DECODER, num_key_value_heads=2, head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM, sliding_window=5,
        attn_logit_softcapping=3.0, final_logit_softcapping=4.0,
    )  # fmt: skip
    model = hf.Gemma2ForCausalLM(config)
    randomise(model, rng)
    return model, one_stack(model, rng, "logits")


def gemma3(rng: np.random.Generator) -> tuple[hf.PreTrainedModel, dict]:
    """Norms of queries and keys, and a base of the rotation for each kind of layer."""
    config = hf.Gemma3TextConfig(
        **DECODER, num_key_value_heads=1, head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM, sliding_window=5,
        layer_types=LOCAL * 2 + GLOBAL + LOCAL * 2,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    )  # fmt: skip
    model = hf.Gemma3ForCausalLM(config)
    randomise(model, rng)
    return model, one_stack(model, rng, "logits")


def modernbert(rng: np.random.Generator) -> tuple[hf.PreTrainedModel, dict]:
    """ModernBERT, but with a norm before the first attention, as in our stack; the published one has none there."""
    config = hf.ModernBertConfig(
        **DECODER, cls_token_id=1, sep_token_id=2, local_attention=8, layer_types=GLOBAL + LOCAL * 2 + GLOBAL + LOCAL,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    )  # fmt: skip
    model = hf.ModernBertModel(config)
    model.layers[0].attn_norm = torch.nn.LayerNorm(EMBED_DIM, eps=config.norm_eps, bias=False)
    randomise(model, rng)
    return model, one_stack(model, rng, "last_hidden_state")


BERT = {
    "vocab_size": VOCAB_SIZE, "hidden_size": EMBED_DIM, "intermediate_size": MLP_DIM, "num_attention_heads": HEADS,
    "num_hidden_layers": 3, "pad_token_id": 0, "eos_token_id": 1, "layer_norm_eps": 1e-5,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def electra(rng: np.random.Generator, *, embedding_size: int) -> tuple[hf.PreTrainedModel, dict]:
    """With its embedding projected or not."""
    act = "gelu" if embedding_size == EMBED_DIM else "gelu_new"
    config = hf.ElectraConfig(**BERT, embedding_size=embedding_size, hidden_act=act, max_position_embeddings=24)
    model = hf.ElectraModel(config)
    randomise(model, rng, coarse=True)
    without_biases(model)
    return model, one_stack(model, rng, "last_hidden_state")


def longformer(rng: np.random.Generator) -> tuple[hf.PreTrainedModel, dict]:
    """Without global tokens, and with the first one global; projections of both kinds are the same."""
    config = hf.LongformerConfig(
        **BERT, attention_window=[6] * 3, max_position_embeddings=25, bos_token_id=None, sep_token_id=1
    )
    model = hf.LongformerModel(config, add_pooling_layer=False)
    randomise(model, rng, coarse=True)
    without_biases(model)
    model.embeddings.position_embeddings.weight.data[0] = 0  # of padding
    for layer in model.encoder.layer:
        for name in ("query", "key", "value"):
            usual, of_global = (getattr(layer.attention.self, f"{name}{kind}") for kind in ("", "_global"))
            of_global.weight.data = usual.weight.data.clone()
    arrays = one_stack(model, rng, "last_hidden_state")
    tensors = {key: torch.tensor(arrays[key], dtype=torch.long) for key in ("input_ids", "attention_mask")}
    first = torch.zeros_like(tensors["input_ids"])
    first[:, 0] = 1
    with torch.no_grad():
        arrays["expected_first_global"] = model(**tensors, global_attention_mask=first).last_hidden_state.numpy()
    return model, arrays


def without_biases(model: hf.PreTrainedModel) -> None:
    """Zeros where our models have nothing."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "token_type" in name:
            parameter.data.zero_()


def randomise(model: hf.PreTrainedModel, rng: np.random.Generator, *, coarse: bool = False) -> None:
    """Sets every parameter, so that no norm is at its trivial start and no initialiser of torch matters.

    Coarse ones are multiples of 1/64, which take half the room in a file.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # a norm, around the value at which it does nothing
            values = float(parameter.mean() > 0.5) + 0.3 * rng.standard_normal(parameter.shape)
        else:
            std = 0.7 if "relative" in name or "embed" in name or "shared" in name else parameter.shape[-1] ** -0.5
            values = std * rng.standard_normal(parameter.shape)
        values = np.round(64 * values) / 64 if coarse else values
        parameter.data = torch.tensor(values, dtype=torch.float32)
    model.tie_weights = lambda *_, **__: None
    model.set_attn_implementation("eager")
    model.eval()


def padded(
    rng: np.random.Generator, length: int, tokens: tuple[int, ...] | None = None, vocab_size: int = VOCAB_SIZE
) -> dict[str, np.ndarray]:
    """Rows of so many ids each, by default two, the second shorter, and padding."""
    tokens = tokens or (length, length - 6)
    ids = rng.integers(3, vocab_size, (len(tokens), length))
    mask = np.arange(length) < np.array(tokens)[:, None]
    return {"ids": np.where(mask, ids, 0).astype(np.int32), "mask": mask.astype(np.int32)}


def encoder_decoder(model: hf.PreTrainedModel, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Runs an encoder-decoder."""
    inputs, targets = padded(rng, INPUT_LENGTH), padded(rng, TARGET_LENGTH)
    tensors = {
        "input_ids": inputs["ids"], "attention_mask": inputs["mask"],
        "decoder_input_ids": targets["ids"], "decoder_attention_mask": targets["mask"],
    }  # fmt: skip
    with torch.no_grad():
        expected = model(**{key: torch.tensor(value, dtype=torch.long) for key, value in tensors.items()}).logits
    return {**tensors, "expected": expected.numpy()}


def one_stack(
    model: hf.PreTrainedModel, rng: np.random.Generator, output: str, inputs: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Runs a decoder or an encoder."""
    inputs = inputs or padded(rng, INPUT_LENGTH)
    tensors = {"input_ids": inputs["ids"], "attention_mask": inputs["mask"]}
    with torch.no_grad():
        expected = model(**{key: torch.tensor(value, dtype=torch.long) for key, value in tensors.items()})[output]
    return {**tensors, "expected": expected.numpy()}


MODELS = {
    "t5_1_0": lambda rng: t5(rng, gated=False, tied=True),
    "t5_1_1": lambda rng: t5(rng, gated=True, tied=False),
    "t5_gated_tied": lambda rng: t5(rng, gated=True, tied=True),
    "t5_ungated_untied": lambda rng: t5(rng, gated=False, tied=False),
    "umt5": umt5,
    "t5_encoder": t5_encoder,
    "llama": llama,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "modernbert": modernbert,
    "mt5": mt5,
    "ul2": ul2,
    "longt5": longt5,
    "electra": lambda rng: electra(rng, embedding_size=EMBED_DIM),
    "electra_narrow": lambda rng: electra(rng, embedding_size=10),
    "longformer": longformer,
}


def main(*chosen: str) -> None:
    """Writes one file for each of `MODELS`, or of those chosen, beside this script."""
    for seed, (name, make) in enumerate(MODELS.items()):
        if chosen and name not in chosen:
            continue
        model, arrays = make(np.random.default_rng(seed))
        # named_parameters() names shared weights once.
        weights = {f"weights/{key}": value.detach().numpy() for key, value in model.named_parameters()}
        config = np.array(json.dumps(model.config.to_diff_dict(), default=str))
        np.savez_compressed(Path(__file__).with_name(f"{name}.npz"), config=config, **weights, **arrays)
        print(f"{name}: {sum(w.size for w in weights.values())} parameters")


if __name__ == "__main__":
    main(*sys.argv[1:])
