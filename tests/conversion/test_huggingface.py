"""Folders as transformers writes them: read, compared with what transformers computes, and written back to the bit."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from small_models import ARCHITECTURES, GOLDEN, all_bits, golden, write_folder

from t5x_domain.conversion.check import outputs, rounding_bound
from t5x_domain.conversion.formats import write_checkpoint
from t5x_domain.conversion.huggingface import open_huggingface
from t5x_domain.conversion.native import open_native
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder, EncoderOnly


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_equal_transformers(tmp_path, name):
    checkpoint = open_huggingface(write_folder(tmp_path / "hf", name))
    golden = dict(np.load(GOLDEN / f"{name}.npz"))
    mine = outputs(checkpoint, {key: value for key, value in golden.items() if value.dtype == np.int32})
    valid = golden.get("decoder_attention_mask", golden["attention_mask"]).astype(bool)
    expected = golden["expected"][valid]
    bound = rounding_bound(checkpoint.config, abs(expected).max())
    np.testing.assert_allclose(mine[valid], expected, rtol=0, atol=bound)


@pytest.mark.parametrize("changes", [{"norm_epsilon": 1e-5}, {"mlp_activations": ("gelu_exact", "linear")}])
def test_the_bound_sees_small_mistakes(tmp_path, changes):
    checkpoint = open_huggingface(write_folder(tmp_path / "hf", "t5_1_1"))
    wrong = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, **changes))
    golden = dict(np.load(GOLDEN / "t5_1_1.npz"))
    mine = outputs(wrong, {key: value for key, value in golden.items() if value.dtype == np.int32})
    valid = golden["decoder_attention_mask"].astype(bool)
    largest = abs(golden["expected"][valid]).max()
    assert abs(mine - golden["expected"])[valid].max() > rounding_bound(checkpoint.config, largest)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_there_and_back_to_the_bit(tmp_path, name, dtype):
    weights = {key: value.astype(dtype) for key, value in golden(name)[1].items()}
    first = open_huggingface(write_folder(tmp_path / "hf", name, weights=weights))
    write_checkpoint(first, str(tmp_path / "native"), "native")
    write_checkpoint(open_native(str(tmp_path / "native")), str(tmp_path / "back"), "huggingface")
    second = open_huggingface(str(tmp_path / "back"))
    assert (second.model, second.config) == (first.model, first.config)
    assert all_bits(second) == all_bits(first)
    assert {tensor.dtype for tensor in second.tensors.values()} == {np.dtype(dtype)}


def test_assemblies(tmp_path):
    for name, model in (("t5_1_1", EncoderDecoder), ("t5_encoder", EncoderOnly), ("llama", DecoderOnly)):
        write_folder(tmp_path / name, name)
        assert open_huggingface(str(tmp_path / name)).model is model


class TestOutputEmbedding:
    """Whether the output embedding is the input's, and whether logits are scaled, said in four ways over the years."""

    def test_of_transformers_5(self, tmp_path):
        write_folder(tmp_path / "hf", "t5_1_1")  # whose config.json says tie_word_embeddings = true
        config = open_huggingface(str(tmp_path / "hf")).config
        assert (config.tie_embeddings, config.scale_logits) == (False, False)

    def test_of_transformers_4(self, tmp_path):
        write_folder(tmp_path / "hf", "t5_1_1", tie_word_embeddings=False)
        content = json.loads((tmp_path / "hf" / "config.json").read_text())
        del content["scale_decoder_outputs"]
        (tmp_path / "hf" / "config.json").write_text(json.dumps(content))
        config = open_huggingface(str(tmp_path / "hf")).config
        assert (config.tie_embeddings, config.scale_logits) == (False, False)

    def test_copies_of_a_tied_embedding_are_no_tensors_of_their_own(self, tmp_path):
        weights = golden("t5_1_0")[1]
        for copy in ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            weights[copy] = weights["shared.weight"].copy()
        unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        weights[unused] = np.zeros((8, 4), np.float32)
        write_folder(tmp_path / "hf", "t5_1_0", weights=weights)
        checkpoint = open_huggingface(str(tmp_path / "hf"))
        assert checkpoint.config.tie_embeddings
        assert checkpoint.config.scale_logits

    def test_a_second_embedding_is_refused(self, tmp_path):
        weights = golden("t5_1_0")[1]
        weights["decoder.embed_tokens.weight"] = weights["shared.weight"] + 1
        write_folder(tmp_path / "hf", "t5_1_0", weights=weights)
        with pytest.raises(UserError, match="left over: decoder.embed_tokens.weight"):
            open_huggingface(str(tmp_path / "hf"))

    def test_an_output_that_is_said_to_be_there_but_is_not(self, tmp_path):
        write_folder(tmp_path / "hf", "t5_1_0", tie_word_embeddings=False)
        with pytest.raises(UserError, match="no lm_head.weight"):
            open_huggingface(str(tmp_path / "hf"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("t5_1_1", {"feed_forward_proj": "gated-tanh"}, "gated-tanh"),
        ("t5_1_1", {"architectures": ["T5ForTokenClassification"]}, "T5ForTokenClassification"),
        ("t5_1_1", {"model_type": "longt5"}, "longt5"),
        ("t5_1_1", {"num_layers": 3}, "missing: encoder/2/"),
        ("t5_1_1", {"num_decoder_layers": 2}, r"left over: decoder\.block\.2\."),
        ("t5_1_1", {"d_ff": 32}, r"of another shape: decoder/{0-2}/mlp/inner/wi/0/kernel \(16, 24\), not \(16, 32\)"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0}}, "llama3"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        (
            "llama",
            {"tie_word_embeddings": None, "num_key_value_heads": 4},
            "of another shape: decoder/{0-4}/self_attention",
        ),
    ],
)
def test_what_is_refused(tmp_path, name, changes, message):
    write_folder(tmp_path / "hf", name, **changes)
    with pytest.raises(UserError, match=message):
        open_huggingface(str(tmp_path / "hf"))


def test_a_prefix_language_model_is_no_llama(tmp_path):
    """Its inputs saw one another; a Llama's tokens see only earlier ones."""
    checkpoint = open_huggingface(write_folder(tmp_path / "hf", "llama"))
    trained = dataclasses.replace(checkpoint, facts={"prefix_lm": ["r3_15"]})
    with pytest.raises(UserError, match=r"in training \(r3_15\) the inputs saw one another"):
        write_checkpoint(trained, str(tmp_path / "out"), "huggingface")
    assert not (tmp_path / "out").exists()


def test_the_model_card_says_what_was_trained(tmp_path):
    write_folder(tmp_path / "hf", "t5_1_1")
    component = ["law", 1, "SpanCorruption()", 1.0, "None", "None"]
    facts = {
        "step": 1234,
        "run": {
            "Run.lengths": {"inputs": 512, "targets": 114},
            "Run.batch_size": 32,
            "Run.packing": "first_fit",
            "Run.seed": 7,
            "Updates.optimizer": "Adafactor()",
            "phases": [{"start": 0, "components": [component], "subset": {}}],
        },
        "scores": {"step": 1234, "law": {"perplexity": 9.5, "bits_per_byte": 0.8, "accuracy": 0.5}},
        "phases": [{"raw_tokens": 56_789}],
    }
    checkpoint = dataclasses.replace(open_huggingface(str(tmp_path / "hf")), facts=facts)
    write_checkpoint(checkpoint, str(tmp_path / "out"), "huggingface")
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "1,234",
        "32 rows of 512 inputs, 114 targets",
        "first_fit",
        "| law |",
        "9.50",
        "0.800",
        "20,912",
        "56,789",
        "trained with",
    ):
        assert said in card, said
