"""Optimizers from optax, applied to parameters whose layers are stacked for scanning.

Whatever depends on a whole tensor (Adafactor's factors, its clipping, its parameter scale; Muon's orthogonalisation)
is computed for each layer by itself, so a scanned and an unrolled model learn the same.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gin
import jax
import numpy as np
import optax

from t5x_domain.errors import UserError
from t5x_domain.models.names import path_name

Tree = Any


def path_mask(tree: Tree, patterns: Sequence[str]) -> Tree:
    """True for every leaf whose name one of the regular expressions finds."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(re.search(pattern, path_name(path)) for pattern in patterns), tree
    )


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Adafactor (Shazeer & Stern 2018) with T5's settings (Raffel et al. 2020, section 3.1.2).

    Attributes:
      decay_rate: the second moment forgets as 1 - step^-decay_rate.
      clipping_threshold: largest root mean square of a tensor's update.
      multiply_by_parameter_scale: steps are relative to the size of the tensor.
      momentum: None for none.
      min_dim_size_to_factor: smaller matrices keep their whole second moment.
    """

    decay_rate: float = 0.8
    clipping_threshold: float = 1.0
    multiply_by_parameter_scale: bool = True
    momentum: float | None = None
    min_dim_size_to_factor: int = 128

    def direction(self, axes: Tree) -> optax.GradientTransformation:
        """Unit-learning-rate ascent direction. `axes` holds each parameter's axis names."""
        transform = optax.chain(optax.adafactor(learning_rate=None, **dataclasses.asdict(self)), optax.scale(-1.0))
        return _each_layer(transform, axes)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with bias correction (Kingma & Ba 2015); decoupled weight decay is `Updates.weight_decay`."""

    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8

    def direction(self, axes: Tree) -> optax.GradientTransformation:
        """Unit-learning-rate ascent direction."""
        return optax.scale_by_adam(self.b1, self.b2, self.epsilon)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon (Jordan et al. 2024) for the matrices inside layers, Adam with Nesterov momentum for everything else.

    Updates are scaled to Adam's size (Liu et al. 2025, "Muon is scalable", section 2.2), so both share a schedule.
    """

    momentum: float = 0.95
    newton_schulz_steps: int = 5
    update_rms: float = 0.2
    adam_b1: float = 0.9
    adam_b2: float = 0.999

    def direction(self, axes: Tree) -> optax.GradientTransformation:
        """Unit-learning-rate ascent direction."""

        def dimensions(names: tuple[str, ...]) -> optax.contrib.MuonDimensionNumbers | None:
            is_matrix = len(names) - (names[0] == "layers") == 2
            if not is_matrix or {"vocab", "positions", "relative_bias_buckets"} & set(names):
                return None
            # Any axis that is neither of the two counts as a batch of matrices: the stacked layers.
            return optax.contrib.MuonDimensionNumbers(reduction_axis=len(names) - 2, output_axis=len(names) - 1)

        return optax.contrib.muon(
            learning_rate=-1.0,  # optax descends; a direction ascends
            beta=self.momentum,
            ns_steps=self.newton_schulz_steps,
            consistent_rms=self.update_rms,
            adam_b1=self.adam_b1,
            adam_b2=self.adam_b2,
            muon_weight_dimension_numbers=jax.tree.map(dimensions, axes, is_leaf=_is_axes),
        )


@gin.configurable
@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """How gradients become updates: clip, optimizer, weight decay, schedule.

    Attributes:
      optimizer: Adafactor, AdamW or Muon.
      schedule: step -> learning rate, see training/schedule.py.
      clip_global_norm: gradients are scaled down to this norm; None for never.
      weight_decay: decoupled, multiplied by the learning rate (Loshchilov & Hutter 2019).
      no_weight_decay: regular expressions of parameter names that do not decay.
    """

    optimizer: Any
    schedule: Callable[[jax.Array], jax.Array]
    clip_global_norm: float | None = None
    weight_decay: float = 0.0
    no_weight_decay: Sequence[str] = ("scale$", "relative_bias")

    def chain(self, axes: Tree) -> optax.GradientTransformation:
        """The optax transformation for parameters with these axis names."""
        steps = [] if self.clip_global_norm is None else [optax.clip_by_global_norm(self.clip_global_norm)]
        steps.append(self.optimizer.direction(axes))
        if self.weight_decay:
            exempt = path_mask(_one_leaf_each(axes), self.no_weight_decay)
            steps.append(optax.add_decayed_weights(self.weight_decay, jax.tree.map(lambda e: not e, exempt)))
        return optax.chain(*steps, optax.scale_by_learning_rate(self.schedule))


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Updates(ParameterGroup):
    """The rule for all parameters, but those that are frozen or have a rule of their own.

    Attributes:
      freeze: regular expressions of parameter names that do not learn.
      groups: rules of their own by regular expressions of parameter names, the first that matches:
        {"^generator/": @ParameterGroup()} decouples a generator from its discriminator. All update in the same step,
        but each group has its own optimizer and schedule, which a phase's does not replace, and is clipped by its own
        norm. None for no group.
    """

    freeze: Sequence[str] = ()
    groups: Mapping[str, ParameterGroup] | None = None

    def build(self, axes: Tree, multipliers: Tree | None = None) -> optax.GradientTransformation:
        """The optax transformation for parameters with these axis names.

        Args:
          axes: names of the axes of every parameter.
          multipliers: factors of the finished updates, see adaptation/layerwise.py; a parameter whose factors are all 0
            is frozen. None for 1.

        Raises:
          UserError: a pattern of `freeze` or `groups` matches no parameter.
        """
        transform = self.chain(axes)
        if self.groups:
            rules = {pattern: group.chain(axes) for pattern, group in self.groups.items()}
            transform = optax.partition({"": transform} | rules, self._group_of_each(axes))
        frozen = self.frozen(axes, multipliers)
        if any(jax.tree.leaves(frozen)):
            labels = jax.tree.map(lambda is_frozen: "frozen" if is_frozen else "learning", frozen)
            transform = optax.partition({"frozen": optax.set_to_zero(), "learning": transform}, labels)
        if multipliers is None:
            return transform
        # After the optimizer, for Adam and Adafactor undo whatever scale their gradients have.
        multiply = optax.stateless(lambda updates, _: jax.tree.map(lambda u, m: u * m, updates, multipliers))
        return optax.chain(transform, multiply)

    def frozen(self, axes: Tree, multipliers: Tree | None = None) -> Tree:
        """True for every parameter that does not learn; the arguments are those of `build`, as are the errors."""
        params = _one_leaf_each(axes)
        _require_match("freeze", self.freeze, params)
        frozen = path_mask(params, self.freeze)
        if multipliers is None:
            return frozen
        return jax.tree.map(lambda named, factors: named or not np.any(factors), frozen, multipliers)

    def _group_of_each(self, axes: Tree) -> Tree:
        """For every parameter the pattern of its group; "" for none."""
        params = _one_leaf_each(axes)
        _require_match("groups", self.groups, params)

        def group(path: tuple[Any, ...], _: Any) -> str:
            return next((pattern for pattern in self.groups if re.search(pattern, path_name(path))), "")

        return jax.tree_util.tree_map_with_path(group, params)


def _require_match(key: str, patterns: Iterable[str], params: Tree) -> None:
    for pattern in patterns:
        if not any(jax.tree.leaves(path_mask(params, [pattern]))):
            names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
            raise UserError(f"Updates.{key}: {pattern!r} matches no parameter; there are {', '.join(names)}.")


def _one_leaf_each(axes: Tree) -> Tree:
    """A leaf for each parameter, where `axes` has a tuple."""
    return jax.tree.map(lambda names: 0, axes, is_leaf=_is_axes)


def _is_axes(names: Any) -> bool:
    return isinstance(names, tuple) and all(isinstance(name, str | None) for name in names)


def _each_layer(transform: optax.GradientTransformation, axes: Tree) -> optax.GradientTransformation:
    """Applies `transform` to every layer of stacked parameters by itself, each stack having its own depth."""
    label = lambda path, names: path[0].key if names[0] == "layers" else "single"  # noqa: E731
    labels = jax.tree_util.tree_map_with_path(label, axes, is_leaf=_is_axes)
    stacks = set(jax.tree.leaves(labels)) - {"single"}
    if not stacks:
        return transform

    def update(updates: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        if not jax.tree.leaves(updates):  # all are frozen, and nothing is left that vmap could count
            return updates, state
        return jax.vmap(transform.update)(updates, state, params)

    init = lambda params: jax.vmap(transform.init)(params) if jax.tree.leaves(params) else ()  # noqa: E731
    over_layers = optax.GradientTransformation(init, update)
    return optax.partition(dict.fromkeys(sorted(stacks), over_layers) | {"single": transform}, labels)
