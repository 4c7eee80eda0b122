"""A finished model of any format, opened for use."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from t5x_domain.conversion.formats import open_checkpoint
from t5x_domain.conversion.layout import leaves
from t5x_domain.conversion.rtd import discriminator
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import DecoderOnly
from t5x_domain.models.names import path_name
from t5x_domain.objectives.prefix import NO_TOKENS
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.training.initial import restore_params
from t5x_domain.training.state import Blueprint


@dataclasses.dataclass(frozen=True)
class Opened:
    """A finished model.

    Attributes:
      origin: where it was read from, for messages.
      blueprint: its class, shape and mesh. Layers are unrolled and there is no dropout.
      params: nested dict of float32 arrays on the mesh.
      vocabulary: what its ids mean.
      facts: what is known of its training.
    """

    origin: str
    blueprint: Blueprint
    params: Any
    vocabulary: Vocabulary | ByteVocabulary
    facts: Mapping[str, Any]

    @property
    def reads_whole_inputs(self) -> bool:
        """Whether inputs are seen as a whole, closed by EOS, before anything is written; else they are continued."""
        return self.blueprint.model_class is not DecoderOnly or bool(self.facts.get("prefix_lm"))

    def inputs(self, text: str, prefix: np.ndarray = NO_TOKENS) -> np.ndarray:
        """Ids of a text as the model reads it, int32 [n]: after `prefix`, closed by EOS if inputs are read whole."""
        end = [self.vocabulary.eos_id] if self.reads_whole_inputs else []
        return np.concatenate([prefix, self.vocabulary.encode(text), np.array(end, np.int32)]).astype(np.int32)

    def targets(self, text: str) -> np.ndarray:
        """Ids of a text as the model writes it, int32 [n], closed by EOS."""
        return np.append(self.vocabulary.encode(text), self.vocabulary.eos_id).astype(np.int32)


def unrolled(blueprint: Blueprint, params: Any) -> tuple[Blueprint, Any]:
    """The same model with a parameter for each layer and no dropout, as decoding takes it.

    A step of decoding then reads each kernel where it lies instead of slicing it out of a stack.
    """
    config = dataclasses.replace(blueprint.config, scan_layers=False, remat="none", dropout_rate=0.0)
    target = Blueprint(blueprint.model_class, config, blueprint.mesh)
    source_leaves = {leaf.name: leaf for leaf in leaves(blueprint.model_class, blueprint.config)}
    target_parts = {leaf.name: leaf.parts[0] for leaf in leaves(blueprint.model_class, config)}

    def split(params: Any) -> Any:
        parts = {}
        for path, value in jax.tree_util.tree_flatten_with_path(params)[0]:
            leaf = source_leaves[path_name(path)]
            parts |= dict(zip(leaf.parts, value if leaf.stacked else [value], strict=True))
        return jax.tree_util.tree_map_with_path(lambda path, _: parts[target_parts[path_name(path)]], target.shapes)

    return target, jax.jit(split, in_shardings=(blueprint.shardings,), out_shardings=target.shardings)(params)


def open_model(path: str, *, flag: str = "--model", mesh: MeshShape = MeshShape(), dtype: str | None = None) -> Opened:
    """Opens a run, a converted folder, a Hugging Face folder or a T5X checkpoint; of a discriminator, its encoder.

    Args:
      path: where the model is.
      flag: where `path` was given, for messages.
      mesh: devices that share it.
      dtype: of activations and matrix products; None for the model's own, float32 on a CPU.

    Raises:
      UserError: there is no complete model, or it does not say its vocabulary.
    """
    checkpoint = discriminator(open_checkpoint(path, flag=flag))
    if checkpoint.vocabulary is None:
        raise UserError(
            f"{flag}={path}: does not say its vocabulary, so it cannot read text; convert it first, naming its "
            "--vocabulary, or put its tokenizer into its folder."
        )
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else checkpoint.config.dtype
    # As `unrolled` makes it.
    config = dataclasses.replace(checkpoint.config, scan_layers=False, remat="none", dropout_rate=0.0, dtype=dtype)
    blueprint = Blueprint(checkpoint.model, config, mesh.build())
    found = restore_params(checkpoint, blueprint, include=[".*"], strict=True).params
    params = jax.tree_util.tree_map_with_path(lambda path, _: found[path_name(path)], blueprint.shapes)
    return Opened(checkpoint.origin, blueprint, params, checkpoint.vocabulary, checkpoint.facts)
