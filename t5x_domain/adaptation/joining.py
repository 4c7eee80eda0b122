"""A decoder for a pretrained encoder: the encoder-decoder that writes what the encoder has read, such as summaries."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from t5x_domain.conversion.checkpoint import Checkpoint
from t5x_domain.conversion.layout import leaves
from t5x_domain.conversion.tensors import Tensor
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import EncoderDecoder, EncoderOnly
from t5x_domain.models.config import GLOBAL, ModelConfig
from t5x_domain.models.names import path_name

# What an encoder and the decoder that reads it may each have of their own. The rest is both's: one ModelConfig.
_OF_THE_ENCODER = (
    *("num_encoder_layers", "layer_pattern", "local_window", "dropout_rate"),
    *("global_tokens", "global_blocks", "global_block_size"),
)
_OF_THE_DECODER = (
    "num_decoder_layers",
    "decoder_layer_pattern",
    "tie_embeddings",
    "scale_logits",
    "final_logit_softcap",
)
_FREE = (*_OF_THE_ENCODER, *_OF_THE_DECODER, *ModelConfig.HOW)


def with_decoder(encoder: Checkpoint, decoder: Checkpoint) -> Checkpoint:
    """An encoder with the decoder of an encoder-decoder, e.g. of the one that it was continued from.

    Both read tokens with the encoder's embedding; an untied output embedding is the decoder's.

    Args:
      encoder: an `EncoderOnly`.
      decoder: an `EncoderDecoder` of the same widths and vocabulary.

    Raises:
      UserError: they are of other kinds, shapes or vocabularies.
    """
    _require(encoder, EncoderOnly, "--from", "an encoder alone")
    _require(decoder, EncoderDecoder, "--decoder", "an encoder-decoder, whose decoder is taken")
    known = [checkpoint.vocabulary and checkpoint.vocabulary.fingerprint for checkpoint in (encoder, decoder)]
    if None in known or known[0] != known[1]:
        raise UserError(
            f"--decoder={decoder.origin}: its vocabulary is not known to be that of {encoder.origin}; convert one of "
            "them with --new_vocabulary first."
        )
    if _has_windows(decoder.config) and decoder.config.local_window != encoder.config.local_window:
        raise UserError(
            f"--decoder={decoder.origin}: its windows are {decoder.config.local_window} positions wide and those of "
            f"{encoder.origin} {encoder.config.local_window}; one model has one ModelConfig.local_window."
        )
    own = {key: getattr(decoder.config, key) for key in _OF_THE_DECODER}
    own["decoder_layer_pattern"] = decoder.config.pattern(causal=True)
    theirs, ours = (dataclasses.asdict(checkpoint.config) for checkpoint in (decoder, encoder))
    if differing := [key for key in ours if key not in _FREE and theirs[key] != ours[key]]:
        said = "; ".join(f"ModelConfig.{key} is {theirs[key]!r}, not {ours[key]!r}" for key in differing)
        raise UserError(f"--decoder={decoder.origin}: no decoder for {encoder.origin}: {said}.")
    tensors = {name: t for name, t in decoder.tensors.items() if name.startswith(("decoder/", "embedding/output"))}
    return _joined(encoder, own, tensors, f"The decoder is that of {_name(decoder)}.")


def with_new_decoder(encoder: Checkpoint, num_layers: int, *, seed: int = 0) -> Checkpoint:
    """An encoder with a decoder made of it (Rothe et al. 2020, "Leveraging pre-trained checkpoints", section 2).

    Each decoder layer starts as a copy of an encoder layer, the first as the first and the last as the last. What
    encoders lack, cross-attention and the bias of keys that come before, is drawn at random. Layers see the whole text
    written so far, and the token embedding is also the output's.

    Args:
      encoder: an `EncoderOnly`.
      num_layers: of the decoder, at most the encoder's.
      seed: of what is drawn.

    Raises:
      UserError: it is no encoder alone, or has fewer layers.
    """
    _require(encoder, EncoderOnly, "--from", "an encoder alone")
    depth = encoder.config.num_encoder_layers
    if not 1 <= num_layers <= depth:
        raise UserError(f"--new_decoder_layers={num_layers}: give 1 to {depth}, the layers of {encoder.origin}.")
    own = {
        "num_decoder_layers": num_layers,
        "decoder_layer_pattern": (GLOBAL,),
        "tie_embeddings": True,
        "scale_logits": encoder.config.scale_logits,
    }
    fresh = _fresh_decoder(dataclasses.replace(encoder.config, **own), seed)
    copied = np.linspace(0, depth - 1, num_layers).round().astype(int) if num_layers > 1 else [0]

    def tensor(name: str) -> Tensor:
        stack, layer, rest = [*name.split("/", 2), ""][:3]
        source = f"encoder/{copied[int(layer)]}/{rest}" if layer.isdigit() else f"encoder/{name.split('/', 1)[1]}"
        # Its buckets are those of both directions.
        is_bias = "relative_bias/" in name
        return encoder.tensors[source] if source in encoder.tensors and not is_bias else fresh[name]

    return _joined(
        encoder,
        own,
        {name: tensor(name) for name in fresh},
        f"The decoder's {num_layers} layers began as copies of the encoder's {', '.join(map(str, copied))}.",
    )


def _fresh_decoder(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """A decoder's parameters as a model begins with them, by the names of conversions."""
    config = dataclasses.replace(config, scan_layers=False)

    def init() -> Any:
        return nnx.to_pure_dict(nnx.state(EncoderDecoder(config, rngs=nnx.Rngs(seed))))["decoder"]

    values = {f"decoder/{path_name(path)}": np.asarray(v) for path, v in _flat(jax.jit(init)())}
    unrolled = {leaf.name: leaf.parts[0] for leaf in leaves(EncoderDecoder, config)}
    return {unrolled[name]: Tensor.of(value) for name, value in values.items()}


def _joined(encoder: Checkpoint, own: dict[str, Any], decoder: dict[str, Tensor], note: str) -> Checkpoint:
    config = dataclasses.replace(encoder.config, **own)
    tensors = {name: tensor for name, tensor in encoder.tensors.items() if name != "embedding/output"} | decoder
    facts = {"notes": [f"The encoder is that of {_name(encoder)}.", note]}
    return Checkpoint(encoder.origin, EncoderDecoder, config, tensors, encoder.vocabulary, facts=facts).checked()


def _require(checkpoint: Checkpoint, model: type, flag: str, wanted: str) -> None:
    if checkpoint.model is not model:
        raise UserError(f"{flag}={checkpoint.origin}: is {checkpoint.model.__name__}, but it has to be {wanted}.")


def _has_windows(config: ModelConfig) -> bool:
    return set(config.pattern(causal=True)) != {GLOBAL}


def _name(checkpoint: Checkpoint) -> str:
    return checkpoint.origin.rstrip("/").rpartition("/")[2]


def _flat(tree: Any) -> Any:
    return jax.tree_util.tree_flatten_with_path(tree)[0]
