"""Checkpoints and Hugging Face folders small enough for a test."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from t5x_domain.conversion.checkpoint import Checkpoint
from t5x_domain.conversion.layout import part_shapes
from t5x_domain.conversion.tensors import Tensor
from t5x_domain.models.config import ModelConfig

GOLDEN = Path(__file__).parent / "golden"
ARCHITECTURES = {
    "t5_1_0": "T5ForConditionalGeneration",
    "t5_1_1": "T5ForConditionalGeneration",
    "t5_gated_tied": "T5ForConditionalGeneration",
    "t5_ungated_untied": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration",
    "ul2": "T5ForConditionalGeneration",
    "t5_encoder": "T5EncoderModel",
    "llama": "LlamaForCausalLM",
}
SHAPE = {"vocab_size": 40, "embed_dim": 8, "mlp_dim": 12, "num_heads": 2, "head_dim": 4, "dtype": "float32"}
CONFIG = ModelConfig(**SHAPE, num_encoder_layers=2, num_decoder_layers=3)


def golden(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """config.json and weights of a model that transformers has made."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        weights = {key.removeprefix("weights/"): file[key] for key in file.files if key.startswith("weights/")}
        return {**json.loads(str(file["config"])), "architectures": [ARCHITECTURES[name]]}, weights


def write_folder(folder: Path, name: str, *, weights: dict | None = None, **config) -> str:
    """The Hugging Face folder of a golden model, with other weights or settings if they are given."""
    its_config, its_weights = golden(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(its_config | config))
    safetensors.numpy.save_file(its_weights if weights is None else weights, folder / "model.safetensors")
    return str(folder)


def random_checkpoint(model, config=CONFIG, dtype=np.float32, seed=0, **more) -> Checkpoint:
    """A model of random numbers, none of them 0."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.uniform(0.1, 1, shape).astype(dtype) for name, shape in part_shapes(model, config).items()}
    return Checkpoint("random", model, config, {name: Tensor.of(array) for name, array in arrays.items()}, **more)


def bits(array: np.ndarray) -> tuple:
    """Shape, dtype and bytes: equal if and only if the arrays are, to the bit."""
    return array.shape, array.dtype, np.asarray(array, order="C").tobytes()


def all_bits(checkpoint: Checkpoint) -> dict[str, tuple]:
    return {name: bits(tensor.read()) for name, tensor in checkpoint.tensors.items()}
