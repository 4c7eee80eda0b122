"""The names by which conversions know parameters: one for each layer, whether the model stacks its layers or not.

`encoder/3/mlp/inner/wo/kernel` is layer 3 of the encoder. In a model whose layers are scanned it is part of
`encoder/layers/blocks/0/mlp/inner/wo/kernel`, whose first axis counts layers; in an unrolled one it is
`encoder/rest/blocks/3/mlp/inner/wo/kernel`. See `models.stack.Stack`.
"""

import dataclasses

import jax
from flax import nnx

from t5x_domain.models.assemblies import LanguageModel
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.names import path_name

EMBEDDINGS = ("embedding/embedding", "embedding/output")  # whose rows are tokens


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter as the model holds it.

    Attributes:
      name: its path in the model.
      shape: its shape.
      parts: what conversions call it; for a stacked parameter one name for each entry of its first axis.
      stacked: whether the first axis counts layers.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    stacked: bool

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of each part."""
        return self.shape[1:] if self.stacked else self.shape


def leaves(model: type[LanguageModel], config: ModelConfig) -> list[Leaf]:
    """Every parameter of a model, without making any."""
    params = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(model(config, rngs=nnx.Rngs(0)))))
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return [_leaf(path_name(path), param.shape, config) for path, param in flat]


def part_shapes(model: type[LanguageModel], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by the names of conversions."""
    return {part: leaf.part_shape for leaf in leaves(model, config) for part in leaf.parts}


def _leaf(name: str, shape: tuple[int, ...], config: ModelConfig) -> Leaf:
    stack, group, *path = name.split("/")
    if group not in ("layers", "rest"):
        return Leaf(name, shape, (name,), stacked=False)
    block, inner = int(path[1]), "/".join(path[2:])  # path: blocks, number of the block, name inside it
    kinds = len(config.layer_pattern)
    num_layers = config.num_encoder_layers if stack == "encoder" else config.num_decoder_layers
    repeats = num_layers // kinds if config.scan_layers else 0
    if group == "layers":
        return Leaf(name, shape, tuple(f"{stack}/{r * kinds + block}/{inner}" for r in range(repeats)), stacked=True)
    return Leaf(name, shape, (f"{stack}/{repeats * kinds + block}/{inner}",), stacked=False)
