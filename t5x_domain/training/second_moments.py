"""Adafactor's state of another program in the optimizer state of a run, which then goes on where that stopped."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from t5x_domain.conversion.checkpoint import SecondMoments
from t5x_domain.conversion.layout import Leaf, leaves
from t5x_domain.errors import UserError
from t5x_domain.models.names import path_name
from t5x_domain.training.run import Run
from t5x_domain.training.state import TrainState

_UNUSED = (1,)  # shape of a slot that a parameter does not need


def with_second_moments(run: Run, state: TrainState, moments: SecondMoments | None) -> tuple[TrainState, int]:
    """The state after `moments.step` updates, schedule included, and that step.

    Raises:
      UserError: there are no moments, the run ends before their step, or its optimizer or a parameter lacks them.
    """
    if moments is None:
        raise UserError(
            f"Run.init_optimizer: there is no optimizer state for this vocabulary in {run.init_from}; set it to False."
        )
    if moments.step >= run.total_steps:
        raise UserError(
            f"Run.init_optimizer: {run.init_from} is at step {moments.step}; set TRAIN_STEPS, which counts from the "
            "very beginning, to more."
        )
    by_name = {leaf.name: leaf for leaf in leaves(run.model, run.config)}

    def visit(node: Any) -> Any:
        if isinstance(node, optax.FactoredState):
            slots = {
                slot: jax.tree_util.tree_map_with_path(
                    lambda path, value, s=slot: _carried(run, moments, s, by_name[path_name(path)], value), tree
                )
                for slot, tree in (("v_row", node.v_row), ("v_col", node.v_col), ("v", node.v))
            }
            return node._replace(count=_filled(node.count, moments.step), **slots)
        if isinstance(node, optax.ScaleByScheduleState):
            return node._replace(count=_filled(node.count, moments.step))
        return node

    is_state = lambda node: isinstance(node, (optax.FactoredState, optax.ScaleByScheduleState))  # noqa: E731
    if not any(isinstance(n, optax.FactoredState) for n in jax.tree.leaves(state.opt_state, is_leaf=is_state)):
        raise UserError(
            f"Run.init_optimizer: {run.init_from} holds Adafactor's state, but the run uses "
            f"{type(run.updates.optimizer).__name__}; set Updates.optimizer = @Adafactor()."
        )
    opt_state = jax.tree.map(visit, state.opt_state, is_leaf=is_state)
    return dataclasses.replace(state, step=_filled(state.step, moments.step), opt_state=opt_state), moments.step


def _carried(run: Run, moments: SecondMoments, slot: str, leaf: Leaf, value: jax.Array) -> jax.Array:
    """The slot of a parameter, its layers stacked as the model has them."""
    if value.shape[int(leaf.stacked) :] == _UNUSED and not any(slot in moments.slots.get(p, ()) for p in leaf.parts):
        return value
    missing = [part for part in leaf.parts if slot not in moments.slots.get(part, ())]
    arrays = [np.asarray(moments.slots[part][slot]) for part in leaf.parts if part not in missing]
    array = np.stack(arrays) if leaf.stacked and arrays else next(iter(arrays), np.zeros(()))
    if missing or array.shape != value.shape:
        found = f"is missing for {', '.join(missing)}" if missing else f"has shape {array.shape}"
        raise UserError(
            f"Run.init_optimizer: {slot} of {leaf.name} {found} in {run.init_from} and has shape {value.shape} in this "
            "run; use the optimizer settings it was trained with."
        )
    return jax.device_put(array.astype(value.dtype), value.sharding)


def _filled(counter: jax.Array, step: int) -> jax.Array:
    return jax.device_put(jnp.full(counter.shape, step, counter.dtype), counter.sharding)
