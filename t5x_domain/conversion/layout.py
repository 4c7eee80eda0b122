"""The names by which conversions know parameters: one for each layer, whether the model stacks its layers or not.

`encoder/3/mlp/inner/wo/kernel` is layer 3 of the encoder. In a model whose layers are scanned it is part of
`encoder/layers/blocks/0/mlp/inner/wo/kernel`, whose first axis counts layers; in an unrolled one it is
`encoder/rest/blocks/3/mlp/inner/wo/kernel`. See `models.stack.Stack`.
"""

import dataclasses
import re

import jax
from flax import nnx

from t5x_domain.models.assemblies import LanguageModel
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.names import path_name

EMBEDDINGS = (  # whose rows are tokens
    "embedding/embedding",
    "embedding/output",
    "generator/embedding/embedding",
    "generator/embedding/output",
    "embedding_delta",
)
POSITIONS = "embedding/positions"  # how names of tables of learned positions end
_IN_LAYER = re.compile(r"(?P<stack>.+)/(?P<group>layers|rest)/blocks/(\d+)/(.+)")


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
    shapes = {path_name(path): param.shape for path, param in jax.tree_util.tree_flatten_with_path(params)[0]}
    in_layer = {name: found for name in shapes if (found := _IN_LAYER.fullmatch(name))}
    repeats = {found["stack"]: shapes[name][0] for name, found in in_layer.items() if found["group"] == "layers"}

    def leaf(name: str, shape: tuple[int, ...]) -> Leaf:
        if name not in in_layer:
            return Leaf(name, shape, (name,), stacked=False)
        stack, group, block, inner = in_layer[name].groups()
        turns, kinds = repeats.get(stack, 0), len(config.pattern(causal=stack == "decoder"))
        if group == "layers":
            parts = tuple(f"{stack}/{turn * kinds + int(block)}/{inner}" for turn in range(turns))
            return Leaf(name, shape, parts, stacked=True)
        return Leaf(name, shape, (f"{stack}/{turns * kinds + int(block)}/{inner}",), stacked=False)

    return [leaf(name, shape) for name, shape in shapes.items()]


def part_shapes(model: type[LanguageModel], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by the names of conversions."""
    return {part: leaf.part_shape for leaf in leaves(model, config) for part in leaf.parts}
