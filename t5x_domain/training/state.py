"""What a run carries from step to step, and where on the mesh each array of it lives."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_domain.models.assemblies import LanguageModel
from t5x_domain.models.config import ModelConfig
from t5x_domain.parallel.sharding import sharding

Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes while training.

    Attributes:
      step: int32, updates asked for so far, skipped ones included.
      params: nested dict of float32 arrays.
      opt_state: optax's state.
      skipped: int32, updates skipped because they were not finite.
      skipped_in_a_row: int32, how many of the last updates were skipped.
    """

    step: jax.Array
    params: Tree
    opt_state: Tree
    skipped: jax.Array
    skipped_in_a_row: jax.Array


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A model before it has values: its graph, and the shape, sharding and axis names of every parameter."""

    model_class: type[LanguageModel]
    config: ModelConfig
    mesh: Mesh

    def __post_init__(self) -> None:
        """Traces the constructor once, without allocating anything."""
        graph, state = jax.eval_shape(self._split, jax.random.key(0))
        axes = {path: variable.logical_axes for path, variable in nnx.to_flat_state(state)}
        shapes = nnx.to_pure_dict(state)
        object.__setattr__(self, "graph", graph)
        object.__setattr__(self, "shapes", shapes)
        object.__setattr__(self, "axes", jax.tree_util.tree_map_with_path(lambda p, _: axes[_keys(p)], shapes))
        place = lambda path, leaf: sharding(self.mesh, leaf.shape, axes[_keys(path)])  # noqa: E731
        object.__setattr__(self, "shardings", jax.tree_util.tree_map_with_path(place, shapes))

    graph: Any = dataclasses.field(init=False)
    shapes: Tree = dataclasses.field(init=False)
    axes: Tree = dataclasses.field(init=False)
    shardings: Tree = dataclasses.field(init=False)

    @property
    def num_parameters(self) -> int:
        """Parameters in all."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes))

    @property
    def abstract_params(self) -> Tree:
        """Shapes and shardings of the parameters."""
        sharded = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
        return jax.tree.map(sharded, self.shapes, self.shardings)

    def merge(self, params: Tree) -> LanguageModel:
        """The model with these parameters."""
        return nnx.merge(self.graph, params)

    def init(self, seed: int) -> Tree:
        """Fresh parameters, created where they belong."""
        create = lambda key: nnx.to_pure_dict(self._split(key)[1])  # noqa: E731
        return jax.jit(create, out_shardings=self.shardings)(jax.random.key(seed))

    def init_state(self, params: Tree, transform: optax.GradientTransformation) -> TrainState:
        """Step 0 with these parameters."""
        create = lambda params: _state(params, transform)  # noqa: E731
        return jax.jit(create, out_shardings=self.state_shardings(transform))(params)

    def abstract_state(self, transform: optax.GradientTransformation) -> TrainState:
        """Shapes and shardings of a state: what a checkpoint is restored into."""
        shapes = jax.eval_shape(lambda params: _state(params, transform), self.shapes)
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            self.state_shardings(transform),
        )

    def state_shardings(self, transform: optax.GradientTransformation) -> TrainState:
        """The optimizer's arrays lie where their parameters lie; Adafactor's factors lack one of the axes."""
        params = {_keys(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(self.shapes)[0]}
        specs = {_keys(path): place.spec for path, place in jax.tree_util.tree_flatten_with_path(self.shardings)[0]}

        def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            keys = _keys(path)
            owner = next((keys[i:] for i in range(len(keys)) if keys[i:] in params), None)
            spec = PartitionSpec()
            if owner is not None:
                shape, full = params[owner].shape, tuple(specs[owner])
                without = [(shape[:i] + shape[i + 1 :], full[:i] + full[i + 1 :]) for i in range(len(shape))]
                if "v_row" in keys:  # of a square matrix the factor for rows lacks the last axis
                    without.reverse()
                spec = PartitionSpec(*next((s for have, s in [(shape, full), *without] if have == leaf.shape), ()))
            return NamedSharding(self.mesh, spec)

        shapes = jax.eval_shape(lambda params: _state(params, transform), self.shapes)
        return jax.tree_util.tree_map_with_path(place, shapes)

    def _split(self, key: jax.Array) -> tuple[Any, nnx.State]:
        return nnx.split(self.model_class(self.config, rngs=nnx.Rngs(params=key)))


def _state(params: Tree, transform: optax.GradientTransformation) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, transform.init(params), zero, zero)


def _keys(path: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path)
