"""Encoders of BERT's form: computed as transformers computes them, and written as it would write them."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from small_models import GOLDEN, bits

from t5x_domain.conversion import check
from t5x_domain.conversion.check import outputs, rounding_bound
from t5x_domain.conversion.checkpoint import Checkpoint
from t5x_domain.conversion.formats import write_checkpoint
from t5x_domain.conversion.huggingface import is_transposed, open_huggingface, tensor_names
from t5x_domain.conversion.huggingface_bert import completed, global_positions
from t5x_domain.conversion.tensors import Tensor
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import EncoderOnly
from t5x_domain.models.config import ModelConfig

ELECTRA = ModelConfig(
    vocab_size=80,
    embed_dim=16,
    mlp_dim=24,
    num_heads=4,
    head_dim=4,
    num_encoder_layers=3,
    num_decoder_layers=0,
    mlp_activations=("gelu_exact",),
    norm="layernorm",
    norm_epsilon=1e-5,
    norm_placement="post",
    embedding_norm=True,
    position="learned",
    max_positions=24,
    attention_scale="head_dim",
    tie_embeddings=True,
    dropout_rate=0.1,
    dtype="float32",
)
CONFIGS = {
    "electra": ELECTRA,
    "electra_narrow": dataclasses.replace(ELECTRA, embedding_dim=10, mlp_activations=("gelu",)),
    "longformer": dataclasses.replace(ELECTRA, layer_pattern=("local",), local_window=3),
}


def checkpoint(name: str, vocabulary=None, **changes) -> Checkpoint:
    """A golden model as ours: without biases, token types, global projections and positions of padding."""
    config = dataclasses.replace(CONFIGS[name], **changes)
    weights = golden_weights(name)
    tensors = {}
    for ours, theirs in tensor_names(EncoderOnly, config).items():
        array = weights[theirs][-config.max_positions :] if ours == "embedding/positions" else weights[theirs]
        tensors[ours] = Tensor.of(array.T if is_transposed(ours) else array)
    return Checkpoint(name, EncoderOnly, config, tensors, vocabulary).checked()


def golden_weights(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key.removeprefix("weights/"): file[key] for key in file.files if key.startswith("weights/")}


def largest_difference(ours: Checkpoint, name: str, expected: str = "expected") -> tuple[float, float]:
    """Largest difference from transformers' outputs at tokens, and what rounding may explain."""
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    valid = arrays["attention_mask"].astype(bool)
    mine = outputs(ours, {key: arrays[key] for key in ("input_ids", "attention_mask")})[valid]
    wanted = arrays[expected][valid]
    return abs(mine - wanted).max(), rounding_bound(ours.config, abs(wanted).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_equal_transformers(name):
    """22 tokens, of the second row 16, and of Longformer a window of 3 on either side."""
    difference, bound = largest_difference(checkpoint(name), name)
    assert difference <= bound


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("electra", {"norm_epsilon": 1e-6}),
        ("electra", {"mlp_activations": ("gelu",)}),
        ("longformer", {"local_window": 4}),
    ],
)
def test_the_bound_sees_small_mistakes(name, changes):
    difference, bound = largest_difference(checkpoint(name, **changes), name)
    assert difference > bound


def test_a_first_global_token():
    """What transformers computes with `global_attention_mask` and copied projections is our global token."""
    assert largest_difference(checkpoint("longformer"), "longformer", "expected_first_global")[0] > 0.1
    ours = checkpoint("longformer", global_tokens=1)
    difference, bound = largest_difference(ours, "longformer", "expected_first_global")
    assert difference <= bound


def test_which_tokens_are_marked(tmp_path):
    """Of 22 tokens the first two, and the last of each seven."""
    config = dataclasses.replace(CONFIGS["longformer"], global_tokens=2, global_blocks="every", global_block_size=7)
    assert global_positions(config, 22) == [0, 1, 6, 13, 20]
    ours = checkpoint("longformer", global_tokens=2, global_blocks="every", global_block_size=7)
    write_checkpoint(ours, str(tmp_path / "hf"), "huggingface")
    assert "zeros with `[:, :2] = 1` and `[:, 6::7] = 1`" in (tmp_path / "hf" / "README.md").read_text()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_folder_is_transformers_own(tmp_path, name):
    """Every tensor to the bit, zeros and copies with them; and every setting, or it is left at its default."""
    write_checkpoint(checkpoint(name), str(tmp_path / "hf"), "huggingface")
    written = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    assert {key: bits(array) for key, array in written.items()} == {
        key: bits(array) for key, array in golden_weights(name).items()
    }
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    with np.load(GOLDEN / f"{name}.npz") as file:
        wanted = json.loads(str(file["config"]))
    left = ("transformers_version", "summary_", "use_cache", "classifier_", "is_decoder", "add_cross", "bos_", "onnx_")
    assert all(key in config or key.startswith(left) for key in wanted)
    assert {key: config.get(key) for key in wanted if key in config} == {k: wanted[k] for k in wanted if k in config}


def test_a_part_of_the_positions_is_read():
    table = Tensor.of(np.arange(1.0, 7.0).reshape(3, 2))
    tensors = {"embeddings.position_embeddings.weight": table, "embeddings.word_embeddings.weight": table}
    made = completed(tensors, {"model_type": "longformer"})["embeddings.position_embeddings.weight"]
    np.testing.assert_array_equal(made.read((slice(0, 2), slice(1, 2))), [[0], [2]])


def test_the_tokenizer_and_the_card_know_the_limit(tmp_path):
    """Texts are cut at the last position; a Longformer is loaded without the pooler that we do not write."""
    words = {"vocab_size": 384}
    ours = checkpoint("longformer")
    table = Tensor.of(np.zeros((384, 16), np.float32))
    ours = dataclasses.replace(
        ours,
        config=dataclasses.replace(ours.config, **words),
        tensors=ours.tensors | {"embedding/embedding": table},
        vocabulary=ByteVocabulary(125),
    )
    write_checkpoint(ours, str(tmp_path / "hf"), "huggingface")
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["model_max_length"] == 24
    card = (tmp_path / "hf" / "README.md").read_text()
    for said in (
        "24 at most",
        "add_pooling_layer=False",
        "leave `global_attention_mask` out",
        "without. No text starts",
    ):
        assert said in card, said
    with pytest.raises(UserError, match="model_type = 'longformer' is not converted"):
        open_huggingface(str(tmp_path / "hf"))


@pytest.mark.parametrize(
    ("family", "name", "changes"),
    [
        ("Electra", "electra", {"norm": "rmsnorm"}),
        ("Electra", "electra", {"norm_placement": "pre"}),
        ("Electra", "electra", {"embedding_norm": False}),
        ("Electra", "electra", {"position": "rope"}),
        ("Electra", "electra", {"attention_scale": "none"}),
        ("Electra", "electra", {"mlp_activations": ("gelu", "linear")}),
        ("Electra", "electra", {"mlp_activations": ("linear",)}),
        ("Electra", "electra", {"num_kv_heads": 2}),
        ("Electra", "electra", {"head_dim": 6}),
        ("Electra", "electra", {"qk_norm": True}),
        ("Electra", "electra", {"scale_embedding": True}),
        ("Electra", "electra", {"attention_softcap": 30.0}),
        ("Electra", "electra", {"norm_unit_offset": True}),
        ("Longformer", "electra", {"layer_pattern": ("local", "global")}),
        ("Electra", "electra", {"tie_embeddings": False}),
        ("Longformer", "longformer", {"embedding_dim": 8}),
        ("Longformer", "longformer", {"norm": "rmsnorm"}),
    ],
    ids=str,
)
def test_what_transformers_cannot_compute_is_refused(tmp_path, family, name, changes):
    (key, value), *_ = changes.items()
    ours = dataclasses.replace(checkpoint(name), config=dataclasses.replace(CONFIGS[name], **changes))
    with pytest.raises(UserError, match=f"no Hugging Face {family} model computes .*{key} = ") as refused:
        write_checkpoint(ours, str(tmp_path / "hf"), "huggingface")
    assert "T5" in str(refused.value) and not (tmp_path / "hf").exists()


@pytest.mark.parametrize(("changes", "length"), [({}, 24), ({"max_positions": 100, "local_window": 70}, 100)])
def test_a_check_reads_no_more_than_there_are_positions(changes, length):
    ours = Checkpoint("ours", EncoderOnly, dataclasses.replace(CONFIGS["longformer"], **changes), {})
    assert check._features(ours)["input_ids"].shape == (2, length)
