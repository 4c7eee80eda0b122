"""Hugging Face folders: T5 and its kin, Llama, and, written only, encoders of BERT's form.

The names of tensors follow transformers' `modeling_t5.py`, `modeling_umt5.py` and `modeling_llama.py`; torch keeps the
kernel of a linear map as (out, in), we as (in, out).
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5x_domain import files
from t5x_domain.conversion import safetensors_files
from t5x_domain.conversion.checkpoint import Checkpoint
from t5x_domain.conversion.huggingface_bert import BERT, completed
from t5x_domain.conversion.huggingface_config import read_config, write_config
from t5x_domain.conversion.layout import part_shapes
from t5x_domain.conversion.model_card import model_card
from t5x_domain.conversion.tensors import Tensor
from t5x_domain.conversion.tokenizer import read_vocabulary, require_writable, write_tokenizer
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import DecoderOnly, LanguageModel
from t5x_domain.models.config import ModelConfig

CONFIG = "config.json"
_OUTPUT = "lm_head.weight"
_EMBEDDINGS = ("shared.weight", "model.embed_tokens.weight")
_EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# A bias that early T5 files hold though no layer has it; transformers ignores it, too.
_UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def tensor_names(model: type[LanguageModel], config: ModelConfig) -> dict[str, str]:
    """Hugging Face's name for each of our parameters (see `conversion.layout`)."""
    patterns = GATED_T5 if len(config.mlp_activations) > 1 else PLAIN_T5
    if config.position == "learned":
        patterns = BERT
    elif model is DecoderOnly:
        patterns = LLAMA
    return {ours: filled(patterns, ours) for ours in part_shapes(model, config)}


def filled(patterns: Mapping[str, str], ours: str) -> str:
    """The name in `patterns` of a parameter of ours, whose layer takes the place of {i}."""
    stack, number, rest = re.fullmatch(r"(\w+)/(?:(\d+)/)?(.+)", ours).groups()
    return patterns[f"{stack}/{rest}" if number is None else f"{stack}/{{i}}/{rest}"].format(i=number)


def is_transposed(ours: str) -> bool:
    """Whether Hugging Face keeps the tensor on its side."""
    return ours.endswith("kernel")


def open_huggingface(path: str, *, tokenizer: bool = True) -> Checkpoint:
    """A folder as `save_pretrained` writes it.

    Args:
      path: the folder, of this machine or in a bucket.
      tokenizer: whether to read the vocabulary, too; only those of T5's kind can be.

    Raises:
      UserError: an architecture or option that is not converted, incomplete or left-over tensors, another vocabulary.
    """
    folder = files.path(path)
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{folder / CONFIG}: cannot be read ({error.strerror}); is it a Hugging Face folder?"
        ) from error
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: not JSON ({error}); copy it anew.") from error
    if not isinstance(content, dict):
        raise UserError(f"{folder / CONFIG}: no JSON object; copy it anew.")
    tensors = _without_copies(content, safetensors_files.open_folder(folder))
    dtype = "float32" if np.dtype(np.float32) in {tensor.dtype for tensor in tensors.values()} else "bfloat16"
    model, config = read_config(str(folder / CONFIG), content, has_output=_OUTPUT in tensors, dtype=dtype)
    names = tensor_names(model, config)
    found = {ours: _turned(ours, tensors.pop(theirs)) for ours, theirs in names.items() if theirs in tensors}
    return Checkpoint(
        path,
        model,
        config,
        found | tensors,  # what is left over keeps its name, for `checked` to list it
        read_vocabulary(folder, into=files.scratch_folder() / "vocabulary.model") if tokenizer else None,
        facts={"huggingface": {key: content[key] for key in ("model_type", "architectures") if key in content}},
    ).checked()


def require_exportable(
    model: type[LanguageModel],
    config: ModelConfig,
    vocabulary: Vocabulary | ByteVocabulary | None,
    prefix_lm: Sequence[str] = (),
) -> None:
    """Raises UserError if no Hugging Face model and tokenizer do what these do.

    Args:
      model: the assembly.
      config: its shape.
      vocabulary: its vocabulary; None if that is not known.
      prefix_lm: objectives by which a decoder-only model was trained with inputs that see one another.
    """
    write_config(model, config, dtype="float32")
    if prefix_lm:
        raise UserError(
            f"LlamaForCausalLM lets no token see a later one, but in training ({', '.join(prefix_lm)}) the inputs saw "
            "one another (decoder_prefix); only decoder-only models of causal objectives can be written."
        )
    if vocabulary is not None:
        require_writable(vocabulary)


def write_huggingface(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes a folder that `from_pretrained` loads, one tensor in memory at a time.

    Raises:
      UserError: no Hugging Face model computes what this one does.
    """
    require_exportable(
        checkpoint.model, checkpoint.config, checkpoint.vocabulary, checkpoint.facts.get("prefix_lm", ())
    )
    dtypes = {tensor.dtype.name for tensor in checkpoint.tensors.values()}
    config = write_config(checkpoint.model, checkpoint.config, dtype="float32" if len(dtypes) > 1 else dtypes.pop())
    names = tensor_names(checkpoint.model, checkpoint.config)
    tensors = {names[ours]: _turned(ours, tensor) for ours, tensor in checkpoint.tensors.items()}
    safetensors_files.write_folder(folder, completed(tensors, config))
    _write_json(folder / CONFIG, config)
    ids = ("decoder_start_token_id", "bos_token_id", "pad_token_id", "eos_token_id")
    _write_json(folder / "generation_config.json", {key: config[key] for key in ids if key in config})
    if checkpoint.vocabulary is not None:
        write_tokenizer(
            folder,
            checkpoint.vocabulary,
            start_token=checkpoint.model is DecoderOnly,
            max_length=checkpoint.config.longest,
        )
    (folder / "README.md").write_text(model_card(checkpoint, config), encoding="utf-8")


def _turned(ours: str, tensor: Tensor) -> Tensor:
    return tensor.transposed() if is_transposed(ours) and len(tensor.shape) == 2 else tensor


def _without_copies(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without tensors that are there twice: older versions of transformers save one for each place it is used in."""
    kept = {name: tensor for name, tensor in tensors.items() if name not in _UNUSED}
    embedding = next((name for name in (*_EMBEDDINGS, *_EMBEDDING_COPIES) if name in kept), None)
    if embedding in _EMBEDDING_COPIES:
        kept[_EMBEDDINGS[0]] = kept.pop(embedding)
        embedding = _EMBEDDINGS[0]
    copies = list(_EMBEDDING_COPIES)
    if content.get("tie_word_embeddings", True):
        copies.append(_OUTPUT)
    for copy in copies:
        if embedding and copy in kept and np.array_equal(kept[copy].read(), kept[embedding].read()):
            del kept[copy]
    return kept


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _t5_patterns(*, gated: bool) -> dict[str, str]:
    """Ours -> Hugging Face's; {i} is the layer. A shared bias stands in its first layer."""
    names = {"embedding/embedding": "shared.weight", "embedding/output": _OUTPUT}
    for stack, sublayers in (
        ("encoder", ("self_attention", "mlp")),
        ("decoder", ("self_attention", "cross_attention", "mlp")),
    ):
        bias = "layer.0.SelfAttention.relative_attention_bias.weight"
        names[f"{stack}/relative_bias/table"] = f"{stack}.block.0.{bias}"
        names[f"{stack}/{{i}}/relative_bias/table"] = f"{stack}.block.{{i}}.{bias}"
        names[f"{stack}/norm/scale"] = f"{stack}.final_layer_norm.weight"
        for j, sublayer in enumerate(sublayers):
            ours, theirs = f"{stack}/{{i}}/{sublayer}", f"{stack}.block.{{i}}.layer.{j}"
            names[f"{ours}/norm/scale"] = f"{theirs}.layer_norm.weight"
            if sublayer == "mlp":
                for branch in (0, 1):
                    wi = f"wi_{branch}" if gated else "wi"
                    names[f"{ours}/inner/wi/{branch}/kernel"] = f"{theirs}.DenseReluDense.{wi}.weight"
                names[f"{ours}/inner/wo/kernel"] = f"{theirs}.DenseReluDense.wo.weight"
                continue
            attention = "SelfAttention" if sublayer == "self_attention" else "EncDecAttention"
            for linear in ("query", "key", "value", "out"):
                names[f"{ours}/inner/{linear}/kernel"] = f"{theirs}.{attention}.{linear[0]}.weight"
    return names


def _llama_patterns() -> dict[str, str]:
    ours, theirs = "decoder/{i}", "model.layers.{i}"
    names = {
        "embedding/embedding": "model.embed_tokens.weight",
        "embedding/output": _OUTPUT,
        "decoder/norm/scale": "model.norm.weight",
        f"{ours}/self_attention/norm/scale": f"{theirs}.input_layernorm.weight",
        f"{ours}/mlp/norm/scale": f"{theirs}.post_attention_layernorm.weight",
    }
    for linear in ("query", "key", "value", "out"):
        names[f"{ours}/self_attention/inner/{linear}/kernel"] = f"{theirs}.self_attn.{linear[0]}_proj.weight"
    for linear, name in (("wi/0", "gate"), ("wi/1", "up"), ("wo", "down")):
        names[f"{ours}/mlp/inner/{linear}/kernel"] = f"{theirs}.mlp.{name}_proj.weight"
    return names


GATED_T5, PLAIN_T5, LLAMA = _t5_patterns(gated=True), _t5_patterns(gated=False), _llama_patterns()
