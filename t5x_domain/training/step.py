"""One jitted update: gradients, perhaps in several parts of the batch, and a guard against non-finite ones."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_domain.objectives.losses import weight_totals
from t5x_domain.parallel.sharding import use_mesh
from t5x_domain.training.state import Blueprint, TrainState

Batch = Mapping[str, jax.Array]
Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def make_train_step(
    blueprint: Blueprint,
    loss: Loss,
    transform: optax.GradientTransformation,
    *,
    seed: int,
    accumulation_steps: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The update as a jitted function of state and batch; it consumes the state it is given.

    Args:
      blueprint: the model and its mesh.
      loss: (model, batch, rng) -> (sum to differentiate, sums to report with `weight` among them). The gradient
        is that of the sum over the whole batch divided by `weight`, however many parts it is computed in. Each part
        brings the sums of the whole batch's weights, see `objectives.losses.total`, and `step`, the updates so far.
      transform: from `Updates.build`.
      seed: dropout at a step is a function of (seed, step).
      accumulation_steps: parts of the batch handled one after the other; divides the batch size.

    Returns:
      step(state, batch) -> (state, metrics): the sums, with `loss` (per target), `grad_norm`, `skipped`.
    """

    def gradients(params: Any, batch: Batch, rng: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        def objective(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            value, sums = loss(blueprint.merge(params), batch, rng)
            return value, {**sums, "loss": value}

        return jax.grad(objective, has_aux=True)(params)

    def accumulated(params: Any, batch: Batch, step: jax.Array, rng: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        if accumulation_steps == 1:
            return gradients(params, {**batch, "step": step}, rng)
        # Part i takes every n-th row, so that each device keeps the rows it has.
        parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulation_steps, *x.shape[1:]), 1, 0), dict(batch))
        totals = weight_totals(batch) | {"step": step}
        total = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(gradients, params, jax.tree.map(lambda x: x[0], parts) | totals, rng),
        )

        def body(total: Any, part: Any) -> tuple[Any, None]:
            index, rows = part
            return jax.tree.map(jnp.add, total, gradients(params, rows | totals, jax.random.fold_in(rng, index))), None

        return jax.lax.scan(body, total, (jnp.arange(accumulation_steps), parts))[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        with use_mesh(blueprint.mesh):
            rng = jax.random.fold_in(jax.random.key(seed), state.step)
            grads, sums = accumulated(state.params, batch, state.step, rng)
        weight = jnp.maximum(sums["weight"], 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums["loss"])
        keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        skipped = (~finite).astype(jnp.int32)
        new = TrainState(
            step=state.step + 1,
            params=jax.tree.map(keep, params, state.params),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            skipped=state.skipped + skipped,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
        )
        report = {"loss": sums.pop("loss") / weight, "grad_norm": grad_norm}
        return new, {**sums, **report, "skipped": new.skipped, "skipped_in_a_row": new.skipped_in_a_row}

    shardings = blueprint.state_shardings(transform)
    return jax.jit(step, donate_argnums=0, in_shardings=(shardings, None), out_shardings=(shardings, None))


def make_eval_step(blueprint: Blueprint, loss: Loss) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """eval_step(params, batch) -> the loss's sums, without dropout."""

    def step(params: Any, batch: Batch) -> dict[str, jax.Array]:
        with use_mesh(blueprint.mesh):
            return loss(blueprint.merge(params), batch, None)[1]

    return jax.jit(step, in_shardings=(blueprint.shardings, None))
