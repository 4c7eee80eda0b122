"""T5X's tree of parameters: which of its arrays holds which of our parameters, and the shape of the model.

Trees of `t5x/examples/{t5,scalable_t5,decoder_only}` and of flaxformer's T5. Names are theirs joined with slashes, such
as `encoder/layers_3/mlp/wo/kernel`, or `encoder/encoder/mlp/wo/kernel` where layers are scanned; ours are those of
`conversion.layout`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_domain.conversion.tensors import LastRead, Tensor
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder, LanguageModel

LAYERS = -1

_STACKS = {
    "token_embedder/embedding": "embedding/embedding",
    "decoder/token_embedder/embedding": "embedding/embedding",  # of a decoder alone
    "decoder/logits_dense/kernel": "embedding/output",
    "encoder/encoder_norm/scale": "encoder/norm/scale",
    "decoder/decoder_norm/scale": "decoder/norm/scale",
    "encoder/relpos_bias/rel_embedding": "encoder/relative_bias/table",
    "decoder/relpos_bias/rel_embedding": "decoder/relative_bias/table",
}
_ATTENTIONS = {
    "attention": "self_attention",
    "self_attention": "self_attention",
    "encoder_decoder_attention": "cross_attention",
}
_LAYER = {
    **{
        f"{theirs}/{linear}/kernel": f"{ours}/inner/{linear}/kernel"
        for theirs, ours in _ATTENTIONS.items()
        for linear in ("query", "key", "value", "out")
    },
    "pre_attention_layer_norm/scale": "self_attention/norm/scale",
    "pre_self_attention_layer_norm/scale": "self_attention/norm/scale",
    "pre_cross_attention_layer_norm/scale": "cross_attention/norm/scale",
    "pre_mlp_layer_norm/scale": "mlp/norm/scale",
    "mlp/wi/kernel": "mlp/inner/wi/0/kernel",
    "mlp/wi_0/kernel": "mlp/inner/wi/0/kernel",
    "mlp/wi_1/kernel": "mlp/inner/wi/1/kernel",
    "mlp/wo/kernel": "mlp/inner/wo/kernel",
    "relpos_bias/rel_embedding": "relative_bias/table",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where T5X keeps one of our parameters.

    Attributes:
      path: its name in the tree.
      shape: the shape it has there.
      axes: for each axis there, the axis of ours that it is, or (heads and their width) a part of; `LAYERS` for the
        axis of scanned layers.
      layer: our place on that axis.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    layer: int = 0

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Shape of our parameter."""
        sizes = list(zip(self.shape, self.axes, strict=True))
        return tuple(math.prod(size for size, axis in sizes if axis == ours) for ours in range(max(self.axes) + 1))

    def part(self, tensor: Tensor, last_read: LastRead) -> Tensor:
        """Our parameter out of theirs, or out of an array of the same shape that belongs to it."""
        axes = self.axes
        if LAYERS in axes:
            tensor = last_read.layer(tensor, axes.index(LAYERS), self.layer)
            axes = tuple(axis for axis in axes if axis != LAYERS)
        if axes == (1, 0):
            return tensor.transposed()
        return tensor if tensor.shape == self.our_shape else tensor.reshaped(self.our_shape)


def find_sources(shapes: Mapping[str, tuple[int, ...]], origin: str) -> dict[str, Source]:
    """Our names -> where T5X keeps them.

    Args:
      shapes: of every array of the tree.
      origin: the checkpoint, for messages.

    Raises:
      UserError: arrays that no T5 of ours has, listed by name; or shapes in which the axis of layers cannot be told.
    """
    scanned = _scan_axes(shapes, origin)
    sources: dict[str, Source] = {}
    unknown = []
    for path, shape in shapes.items():
        found = _sources_of(path, shape, scanned)
        if not found or not sources.keys().isdisjoint(found):
            unknown.append(f"{path} {shape}")
        sources |= found
    if unknown:
        hint = ""
        if any("fused" in name for name in unknown):
            hint = " Fused kernels are laid out differently from network to network; split them with flaxformer first."
        raise UserError(f"{origin}: these arrays belong to no T5 known here: {', '.join(unknown)}.{hint}")
    return sources


def infer_config(sources: Mapping[str, Source], origin: str) -> tuple[type[LanguageModel], dict[str, Any]]:
    """The assembly, and the fields of its `ModelConfig` that shapes tell.

    Raises:
      UserError: an array is missing without which the shape is unknown.
    """

    def one(pattern: str) -> tuple[int, ...]:
        for name, source in sources.items():
            if re.fullmatch(pattern, name):
                return source.our_shape
        raise UserError(f"{origin}: none of its arrays is our {pattern}; is it a T5?")

    def depth(stack: str) -> int:
        return max((int(name.split("/")[1]) + 1 for name in sources if re.match(rf"{stack}/\d+/", name)), default=0)

    vocab_size, embed_dim = one("embedding/embedding")
    buckets, num_heads = one(r"(en|de)coder/(\d+/)?relative_bias/table")
    heads_width = one(r"(en|de)coder/\d+/self_attention/inner/query/kernel")[1]
    if heads_width % num_heads:
        raise UserError(
            f"{origin}: the relative bias has {num_heads} heads, which do not divide queries {heads_width}."
        )
    tied = "embedding/output" not in sources
    fields = {
        "vocab_size": vocab_size,
        "embed_dim": embed_dim,
        "mlp_dim": one(r"(en|de)coder/\d+/mlp/inner/wo/kernel")[0],
        "num_heads": num_heads,
        "head_dim": heads_width // num_heads,
        "num_encoder_layers": depth("encoder"),
        "num_decoder_layers": depth("decoder"),
        "relative_bias_buckets": buckets,
        "relative_bias_per_layer": any(re.search(r"/\d+/relative_bias/table$", name) for name in sources),
        "tie_embeddings": tied,
        "scale_logits": tied,
    }
    return EncoderDecoder if fields["num_encoder_layers"] else DecoderOnly, fields


def is_gated(sources: Mapping[str, Source]) -> bool:
    """Whether the feed-forward layer multiplies two branches."""
    return any(name.endswith("/wi/1/kernel") for name in sources)


def _sources_of(path: str, shape: tuple[int, ...], scanned: Mapping[str, int]) -> dict[str, Source]:
    """What one of their arrays holds of ours; nothing if it is unknown or of a strange shape."""
    if path in _STACKS:
        axes = _axes(_STACKS[path], len(shape))
        return {_STACKS[path]: Source(path, shape, axes)} if axes else {}
    match = re.fullmatch(r"(encoder|decoder)/(\1|layers_(\d+))/(.+)", path)
    if match is None or match[4] not in _LAYER:
        return {}
    stack, layer, ours = match[1], match[3], _LAYER[match[4]]
    axes = _axes(ours, len(shape) - (layer is None))
    if axes is None:
        return {}
    if layer is not None:
        return {f"{stack}/{int(layer)}/{ours}": Source(path, shape, axes)}
    position = scanned[stack] % len(shape)
    axes = (*axes[:position], LAYERS, *axes[position:])
    return {f"{stack}/{i}/{ours}": Source(path, shape, axes, i) for i in range(shape[position])}


def _axes(ours: str, ndim: int) -> tuple[int, ...] | None:
    """`Source.axes` of an array of one layer; None if our parameter cannot have so many."""
    if ours.endswith("/scale"):
        return (0,) if ndim == 1 else None
    if ours.endswith(("/table", "/output")):
        return (1, 0) if ndim == 2 else None
    if ndim == 3 and ours.endswith("/out/kernel"):
        return (0, 0, 1)
    if ndim == 3 and ours.endswith(("/query/kernel", "/key/kernel", "/value/kernel")):
        return (0, 1, 1)
    return (0, 1) if ndim == 2 else None


def _scan_axes(shapes: Mapping[str, tuple[int, ...]], origin: str) -> dict[str, int]:
    """For each stack that is scanned, the axis of layers: the only one whose size is the same in all of its arrays."""
    axes = {}
    for stack in ("encoder", "decoder"):
        layers = {path: shape for path, shape in shapes.items() if path.startswith(f"{stack}/{stack}/")}
        width = shapes.get(f"{stack}/{stack}_norm/scale")
        if layers:
            fitting = [axis for axis in (0, 1, -1) if _counts_layers(axis, layers, width)]
            if len(fitting) != 1:
                raise UserError(
                    f"{origin}: which axis of the scanned {stack} counts layers cannot be told from the shapes "
                    f"{', '.join(f'{path} {shape}' for path, shape in layers.items())}."
                )
            axes[stack] = fitting[0]
    return axes


def _counts_layers(axis: int, layers: Mapping[str, Sequence[int]], width: Sequence[int] | None) -> bool:
    if any(len(shape) < 2 for shape in layers.values()):
        return False
    scales = [shape for path, shape in layers.items() if path.endswith("/scale")]
    same = len({shape[axis] for shape in layers.values()}) == 1
    return same and all(tuple(np.delete(shape, axis)) == width for shape in scales)
