"""Layers that learn at rates of their own when a model is fine-tuned (Tinn et al. 2021).

Layers count from the input of their own stack, encoder or decoder, whether the model stacks its parameters or not.
"""

import re
from typing import Any, NamedTuple

import jax
import numpy as np

from t5x_domain.errors import UserError
from t5x_domain.models.names import path_name
from t5x_domain.training.state import Blueprint

Tree = Any
_IN_LAYER = re.compile(r"(?:^|/)(encoder|decoder)/(layers|rest)/blocks/(\d+)/")
# What the lowest layers use: the token embedding, and the bias that a whole stack shares, which T5 counts as layer 0's.
_INPUT = re.compile(r"(?:^|/)embedding/(?!output$)")
_SHARED_BIAS = re.compile(r"(?:^|/)(encoder|decoder)/(?:global_)?relative_bias/")


class Place(NamedTuple):
    """Where a parameter stands.

    Attributes:
      layers: int [entries of the first axis] of a stacked parameter, int [] of one layer's, -1 for the embedding;
        None if it is above all layers: a final norm, the output, a head.
      depth: layers of its stack; the deeper stack for the embedding.
    """

    layers: np.ndarray | None
    depth: int


def places(blueprint: Blueprint) -> dict[str, Place]:
    """The place of every parameter, by name."""
    config = blueprint.config
    depths = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    names = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(blueprint.shapes)[0]}
    used = [depth for stack, depth in depths.items() if any(f"{stack}/" in name for name in names)]

    def place(name: str, shape: tuple[int, ...]) -> Place:
        if found := _IN_LAYER.search(name):
            stack, group, block = found[1], found[2], int(found[3])
            kinds = len(config.pattern(causal=stack == "decoder"))
            if group == "layers":
                return Place(np.arange(shape[0]) * kinds + block, depths[stack])
            scanned = depths[stack] // kinds * kinds if config.scan_layers else 0
            return Place(np.asarray(scanned + block), depths[stack])
        if found := _SHARED_BIAS.search(name):
            return Place(np.asarray(0), depths[found[1]])
        return Place(np.asarray(-1), max(used)) if _INPUT.search(name) else Place(None, 0)

    return {name: place(name, leaf.shape) for name, leaf in names.items()}


def multipliers(blueprint: Blueprint, *, layer_decay: float = 1.0, freeze_layers: int = 0) -> Tree:
    """Factors of the updates: 1 for the top layer and all above it, `layer_decay` less for each lower one.

    The embedding, below all layers, has the smallest (Clark et al. 2020, ELECTRA).

    Args:
      blueprint: the model.
      layer_decay: in (0, 1].
      freeze_layers: so many lowest layers of each stack, the embedding with them, have 0.

    Returns:
      Tree of float32 arrays that broadcast against the parameters, for `Updates.build`.

    Raises:
      UserError: a decay that is none, or more frozen layers than there are.
    """
    if not 0 < layer_decay <= 1:
        raise UserError(f"layer_decay = {layer_decay}: it must be above 0 and at most 1.")
    known = places(blueprint)
    _require_layers("freeze_layers", freeze_layers, known)

    def factor(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        layers, depth = known[path_name(path)]
        if layers is None:
            return np.ones((), np.float32)
        frozen = (layers < freeze_layers) & (freeze_layers > 0)
        factors = np.where(frozen, 0.0, layer_decay ** (depth - 1.0 - layers)).astype(np.float32)
        return _along_first(factors, leaf)

    return jax.tree_util.tree_map_with_path(factor, blueprint.shapes)


def with_fresh_top(params: Tree, blueprint: Blueprint, count: int, *, seed: int) -> Tree:
    """The parameters with those of the top `count` layers of each stack drawn afresh (Zhang et al. 2021, section 5).

    Raises:
      UserError: more layers than there are.
    """
    known = places(blueprint)
    _require_layers("reinit_top_layers", count, known)
    if count == 0:
        return params

    def choose(path: Any, old: jax.Array, new: jax.Array) -> jax.Array:
        layers, depth = known[path_name(path)]
        in_layer = layers is not None and _IN_LAYER.search(path_name(path))
        if not in_layer:
            return old
        return jax.device_put(np.where(_along_first(layers >= depth - count, old), new, old), old.sharding)

    return jax.tree_util.tree_map_with_path(choose, params, blueprint.init(seed))


def _along_first(values: np.ndarray, leaf: Any) -> np.ndarray:
    """[] as it is; [layers] with as many axes as the stacked parameter has."""
    return values.reshape(values.shape + (1,) * (len(leaf.shape) - 1)) if values.ndim else values


def _require_layers(key: str, count: int, known: dict[str, Place]) -> None:
    depth = min(place.depth for place in known.values() if place.layers is not None)
    if not 0 <= count <= depth:
        raise UserError(f"{key} = {count}: the model has {depth} layers; give 0 to {depth}.")
