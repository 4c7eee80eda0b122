"""Models as transformers saves, loads and runs them, in the interpreter that HF_PYTHON names (`make test-hf`)."""

import json
import os
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from t5x_domain.conversion.check import compare, outputs, rounding_bound
from t5x_domain.conversion.checkpoint import Checkpoint
from t5x_domain.conversion.formats import open_checkpoint, write_checkpoint
from t5x_domain.conversion.layout import leaves
from t5x_domain.conversion.tensors import Tensor
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder, EncoderOnly
from t5x_domain.models.config import ModelConfig

PYTHON = os.environ.get("HF_PYTHON")
FLAN = os.environ.get("FLAN_T5_SMALL")
SIDE = Path(__file__).with_name("transformers_side.py")
pytestmark = pytest.mark.skipif(not PYTHON, reason="HF_PYTHON names no interpreter with transformers (make test-hf)")

SAVED = ("t5_1_0", "t5_1_1", "ul2", "mt5", "umt5", "t5_encoder", "llama", "llama_tied")
SMALL = {"vocab_size": 384, "embed_dim": 32, "mlp_dim": 48, "num_heads": 4, "head_dim": 8, "dtype": "float32"}
T5 = {**SMALL, "num_encoder_layers": 2, "num_decoder_layers": 3}
LLAMA = {
    **SMALL,
    "num_encoder_layers": 0,
    "num_decoder_layers": 3,
    "num_kv_heads": 2,
    "mlp_activations": ("silu", "linear"),
    "position": "rope",
    "attention_scale": "head_dim",
    "rope_base": 500.0,
}
ELECTRA = {
    **SMALL,
    "num_encoder_layers": 3,
    "num_decoder_layers": 0,
    "mlp_activations": ("gelu_exact",),
    "norm": "layernorm",
    "norm_placement": "post",
    "embedding_norm": True,
    "position": "learned",
    "max_positions": 300,
    "attention_scale": "head_dim",
    "tie_embeddings": True,
}
OURS = {
    "t5_1_0": (EncoderDecoder, {**T5, "mlp_activations": ("relu",), "tie_embeddings": True, "scale_logits": True}),
    "t5_1_1": (EncoderDecoder, T5),
    "gelu_exact": (EncoderDecoder, {**T5, "mlp_activations": ("gelu_exact",)}),
    "ul2": (EncoderDecoder, {**T5, "mlp_activations": ("silu", "linear")}),
    "umt5": (EncoderDecoder, {**T5, "relative_bias_per_layer": True}),
    "encoder": (EncoderOnly, {**T5, "num_decoder_layers": 0, "tie_embeddings": True}),
    "umt5_encoder": (
        EncoderOnly,
        {**T5, "num_decoder_layers": 0, "tie_embeddings": True, "relative_bias_per_layer": True},
    ),
    "electra": (EncoderOnly, ELECTRA),
    "electra_narrow": (EncoderOnly, {**ELECTRA, "embedding_dim": 12, "mlp_activations": ("gelu",)}),
    "longformer": (EncoderOnly, {**ELECTRA, "layer_pattern": ("local",), "local_window": 16}),
    "llama": (DecoderOnly, LLAMA),
    "llama_tied": (DecoderOnly, {**LLAMA, "tie_embeddings": True, "num_kv_heads": None}),
}
TEXTS = [
    "translate English to German: The house is small.",
    "summarize: Heart failure is a syndrome in which the heart does not pump enough blood for the needs of the body.",
    "Answer the question: what is the capital of France?",
    "Is this sentence about medicine? The patient was given antibiotics. yes or no",
]


def transformers(*arguments: object) -> None:
    subprocess.run([PYTHON, str(SIDE), *map(str, arguments)], check=True, capture_output=True)


def random_checkpoint(name: str, dtype=np.float32) -> Checkpoint:
    """Values of a size at which no softmax saturates, and norms away from one."""
    model, options = OURS[name]
    config = ModelConfig(**options)
    rng = np.random.default_rng(0)
    tensors = {}
    for leaf in leaves(model, config):
        for part in leaf.parts:
            mean, std = (1, 0.3) if part.endswith("scale") else (0, leaf.part_shape[0] ** -0.5)
            tensors[part] = Tensor.of((mean + std * rng.standard_normal(leaf.part_shape)).astype(dtype))
    return Checkpoint("ours", model, config, tensors, ByteVocabulary(125)).checked()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    transformers("make", folder)
    return folder


@pytest.mark.parametrize("name", SAVED)
def test_what_transformers_saves_computes_the_same_here(saved, name):
    compare(open_checkpoint(str(saved / name)), str(saved / name), PYTHON)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("max_shard_bytes", [None, 20_000])
def test_what_is_written_computes_the_same_there(tmp_path, name, max_shard_bytes, monkeypatch):
    if max_shard_bytes:
        monkeypatch.setattr("t5x_domain.conversion.safetensors_files.MAX_SHARD_BYTES", max_shard_bytes)
    checkpoint = random_checkpoint(name)
    write_checkpoint(checkpoint, str(tmp_path / "hf"), "huggingface")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == bool(max_shard_bytes)
    compare(checkpoint, str(tmp_path / "hf"), PYTHON)


@pytest.mark.parametrize("name", ["electra", "longformer"])
def test_auto_classes_load_the_folder(tmp_path, name):
    """The tokenizer of bytes and the model, as a user gets them by the folder's name."""
    write_checkpoint(random_checkpoint(name), str(tmp_path / "hf"), "huggingface")
    transformers("embed", tmp_path / "hf", tmp_path / "states.json")
    made = json.loads((tmp_path / "states.json").read_text())
    assert made["ids"] == [[107, 104, 100, 117, 119, 1], [111, 108, 121, 104, 117, 1]]  # "heart", "liver" and EOS
    assert made["shape"] == [2, 6, 32]
    assert made["longest"] == 300


@pytest.mark.skipif(not FLAN, reason="FLAN_T5_SMALL names no folder")
class TestFlanT5Small:
    """The real flan-t5-small, there and back."""

    @pytest.fixture(scope="class")
    @classmethod
    def folders(cls, tmp_path_factory):
        place = tmp_path_factory.mktemp("flan")
        write_checkpoint(open_checkpoint(FLAN), str(place / "native"), "native")
        write_checkpoint(open_checkpoint(str(place / "native")), str(place / "back"), "huggingface")
        (place / "texts.json").write_text(json.dumps(TEXTS))
        for name, folder in (("original", FLAN), ("back", place / "back")):
            transformers("generate", folder, place / "texts.json", place / f"{name}.json")
        return place

    def test_greedy_and_beam_search_write_the_same(self, folders):
        original = json.loads((folders / "original.json").read_text())
        assert json.loads((folders / "back.json").read_text()) == original
        assert original[0]["text"] == "Das Haus ist kleiner."  # known of this model

    def test_greedy_search_is_our_first_choice_too(self, folders):
        checkpoint = open_checkpoint(str(folders / "native"))
        for made in json.loads((folders / "original.json").read_text()):
            written = made["greedy"]
            logits = outputs(checkpoint, teacher_forced(made["inputs"], written))[0]
            assert logits.argmax(-1).tolist() == written[1:]

    def test_beams_have_the_same_score(self, folders):
        checkpoint = open_checkpoint(str(folders / "native"))
        for made in json.loads((folders / "original.json").read_text()):
            written = made["beam"]
            logits = outputs(checkpoint, teacher_forced(made["inputs"], written))[0].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            score = log_probabilities[np.arange(len(written) - 1), written[1:]].mean()
            # transformers' scores are float32 sums of as many terms, each off by what rounding does to two logits.
            bound = 2 * rounding_bound(checkpoint.config, float(abs(logits).max()))
            assert abs(score - made["beam_score"]) < bound


def teacher_forced(inputs: list[int], written: list[int]) -> dict[str, np.ndarray]:
    ids = {"input_ids": inputs, "decoder_input_ids": written[:-1]}
    features = {name: np.array([value], np.int32) for name, value in ids.items()}
    masks = {name.replace("input_ids", "attention_mask"): np.ones_like(value) for name, value in features.items()}
    return features | masks


def test_bfloat16_is_loaded_as_it_was_written(tmp_path):
    checkpoint = random_checkpoint("t5_1_1", ml_dtypes.bfloat16)
    write_checkpoint(checkpoint, str(tmp_path / "hf"), "huggingface")
    compare(checkpoint, str(tmp_path / "hf"), PYTHON)
