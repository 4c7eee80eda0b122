"""The state a run starts with: its own newest checkpoint, else parameters of another model, else fresh ones."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax

from t5x_domain.conversion.checkpoint import Checkpoint, SecondMoments
from t5x_domain.conversion.formats import open_checkpoint
from t5x_domain.conversion.layout import Leaf, leaves
from t5x_domain.conversion.placing import place
from t5x_domain.errors import UserError
from t5x_domain.models.names import path_name
from t5x_domain.training.checkpoint import Checkpoints
from t5x_domain.training.run import Run
from t5x_domain.training.state import Blueprint, TrainState

_EMBEDDINGS = ("embedding/embedding", "embedding/output")
# What two configurations of one model may differ in.
_FREE = ("vocab_size", "dtype", "remat", "scan_layers", "dropout_rate")


def starting_state(
    run: Run, blueprint: Blueprint, transform: optax.GradientTransformation, checkpoints: Checkpoints
) -> tuple[TrainState, int]:
    """The run's newest checkpoint; else the parameters of `run.init_from`; else fresh ones. And the step.

    Raises:
      UserError: what `run.init_from` holds does not fit the run.
    """
    latest = checkpoints.latest_step
    if latest is not None:
        state, _ = checkpoints.restore(blueprint.abstract_state(transform), latest)
        return state, latest
    if run.init_from is None:
        return blueprint.init_state(blueprint.init(run.seed), transform), 0
    checkpoint = open_checkpoint(run.init_from, flag="--init_from")
    found, left = restore_params(
        checkpoint, blueprint, vocabulary=run.vocabulary, init_embedding=run.init_embedding, seed=run.seed
    )
    if left:
        print(f"not in {run.init_from}, freshly initialised: {', '.join(left)}")
    fresh = blueprint.init(run.seed) if left else blueprint.shapes
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: found.get(path_name(path), leaf), fresh)
    state = blueprint.init_state(params, transform)
    return _with_second_moments(run, state, checkpoint.second_moments) if run.init_optimizer else (state, 0)


@gin.configurable(allowlist=["include", "strict"])
def restore_params(
    checkpoint: Checkpoint,
    blueprint: Blueprint,
    *,
    vocabulary: Any = None,
    init_embedding: str | None = None,
    seed: int = 0,
    include: Sequence[str] = (".*",),
    strict: bool = True,
) -> tuple[dict[str, jax.Array], list[str]]:
    """Parameters of another model, each device's share where it belongs.

    Args:
      checkpoint: a model in any format.
      blueprint: the model wanted.
      vocabulary: its vocabulary; None for that of `checkpoint`.
      init_embedding: how rows of tokens that `checkpoint` has not are made, see `adaptation.transplant`.
      seed: of rows that are made at random.
      include: regular expressions of the names wanted.
      strict: every wanted name must be in the checkpoint with its shape and, if all are wanted, the configurations
        must mean the same; otherwise names that do not fit are reported and left.

    Returns:
      The parameters by name (see `models.names.path_name`), and the names that were left.

    Raises:
      UserError: another vocabulary without `init_embedding`; nothing that fits; or, if strict, anything that does not.
    """
    chosen, left = [], []
    for leaf in leaves(blueprint.model_class, blueprint.config):
        (chosen if any(re.search(pattern, leaf.name) for pattern in include) else left).append(leaf)
    if vocabulary is not None and any(leaf.name in _EMBEDDINGS for leaf in chosen):
        checkpoint = _for_vocabulary(checkpoint, vocabulary, blueprint.config.vocab_size, init_embedding, seed)
    if strict and not left:
        _require_same_meaning(checkpoint, blueprint)
    fitting = []
    for leaf in chosen:
        if all(part in checkpoint.tensors and checkpoint.tensors[part].shape == leaf.part_shape for part in leaf.parts):
            fitting.append(leaf)
        elif strict:
            raise UserError(_misfit(checkpoint, leaf))
        else:
            left.append(leaf)
    if not fitting:
        raise UserError(f"--init_from={checkpoint.origin}: none of the checkpoint's parameters fit {list(include)}.")
    targets = {path_name(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(blueprint.abstract_params)[0]}
    placed = {leaf.name: place(leaf, checkpoint.tensors, targets[leaf.name]) for leaf in fitting}
    return placed, [leaf.name for leaf in left]


def _for_vocabulary(
    checkpoint: Checkpoint, vocabulary: Any, num_rows: int, init_embedding: str | None, seed: int
) -> Checkpoint:
    """The checkpoint with a row for every token of `vocabulary`, and `num_rows` in all."""
    rows, known = checkpoint.config.vocab_size, checkpoint.vocabulary
    if known is None and rows == num_rows:
        print(f"{checkpoint.origin} does not say its vocabulary; it is taken to be the run's")
        return checkpoint
    if known is not None and (known.fingerprint, rows) == (vocabulary.fingerprint, num_rows):
        return checkpoint
    if known is not None and init_embedding is None:
        raise UserError(
            f"--init_from={checkpoint.origin}: its vocabulary has {known.vocab_size} ids in {rows} rows and the run's "
            f"{vocabulary.vocab_size} in {num_rows}, or they have other pieces. Use its vocabulary "
            "(Vocabulary.model_file, Vocabulary.extra_ids, ModelConfig.vocab_size), or have the rows of new pieces "
            "made from the old ones' with --gin.Run.init_embedding=\"'mean'\"."
        )
    changed = checkpoint.with_vocabulary(vocabulary, num_rows, init=init_embedding or "mean", seed=seed)
    for note in changed.facts.get("notes", ()):
        print(note)
    return changed


def _require_same_meaning(checkpoint: Checkpoint, blueprint: Blueprint) -> None:
    theirs, ours = (dataclasses.asdict(config) for config in (checkpoint.config, blueprint.config))
    for key in ("mlp_activations", "layer_pattern"):
        theirs[key], ours[key] = tuple(theirs[key]), tuple(ours[key])
    for config in (theirs, ours):
        config["num_kv_heads"] = config["num_kv_heads"] or config["num_heads"]
    differing = [key for key in ours if key not in _FREE and theirs[key] != ours[key]]
    if differing:
        said = "; ".join(
            f"ModelConfig.{key} is {theirs[key]!r} there and {ours[key]!r} in this run" for key in differing
        )
        raise UserError(
            f"--init_from={checkpoint.origin}: a model of another configuration: {said}. Use its configuration, or "
            "restore what fits with --gin.restore_params.strict=False."
        )


def _misfit(checkpoint: Checkpoint, leaf: Leaf) -> str:
    shapes = {part: checkpoint.tensors[part].shape if part in checkpoint.tensors else None for part in leaf.parts}
    part, shape = next((part, shape) for part, shape in shapes.items() if shape != leaf.part_shape)
    return (
        f"--init_from={checkpoint.origin}: parameter {part} has shape {leaf.part_shape} in this model and "
        f"{shape or 'is missing'} in the checkpoint; use its model configuration, or restore what fits with "
        "--gin.restore_params.strict=False."
    )


def _with_second_moments(run: Run, state: TrainState, moments: SecondMoments | None) -> tuple[TrainState, int]:
    """The state of a run that goes on from the step and with the second moments of Adafactor of another program."""
    if moments is None:
        raise UserError(
            f"Run.init_optimizer: {run.init_from} holds no optimizer state of another program; set it to False."
        )
    if moments.step >= run.total_steps:
        raise UserError(
            f"Run.init_optimizer: {run.init_from} is at step {moments.step}; set TRAIN_STEPS, which counts from the "
            "very beginning, to more."
        )
    by_name = {leaf.name: leaf for leaf in leaves(run.model, run.config)}
    num_found = 0

    def carried(slot: str, path: tuple[Any, ...], value: jax.Array) -> jax.Array:
        leaf = by_name[path_name(path)]
        if not all(slot in moments.slots.get(part, ()) for part in leaf.parts):
            return value  # the placeholder of a slot that this parameter does not use
        arrays = [np.asarray(moments.slots[part][slot]) for part in leaf.parts]
        array = np.stack(arrays) if leaf.stacked else arrays[0]
        if array.shape != value.shape:
            raise UserError(
                f"Run.init_optimizer: {slot} of {leaf.name} has shape {array.shape} in {run.init_from} and "
                f"{value.shape} in this run; use the optimizer settings it was trained with."
            )
        return jax.device_put(array.astype(value.dtype), value.sharding)

    def visit(node: Any) -> Any:
        nonlocal num_found
        if isinstance(node, optax.FactoredState):
            num_found += 1
            slots = {
                slot: jax.tree_util.tree_map_with_path(lambda path, value, s=slot: carried(s, path, value), tree)
                for slot, tree in (("v_row", node.v_row), ("v_col", node.v_col), ("v", node.v))
            }
            return node._replace(count=_filled(node.count, moments.step), **slots)
        if isinstance(node, optax.ScaleByScheduleState):
            return node._replace(count=_filled(node.count, moments.step))
        return node

    is_state = lambda node: isinstance(node, (optax.FactoredState, optax.ScaleByScheduleState))  # noqa: E731
    opt_state = jax.tree.map(visit, state.opt_state, is_leaf=is_state)
    if not num_found:
        raise UserError(
            f"Run.init_optimizer: {run.init_from} holds Adafactor's state, but the run uses "
            f"{type(run.updates.optimizer).__name__}; set Updates.optimizer = @Adafactor()."
        )
    return dataclasses.replace(state, step=_filled(state.step, moments.step), opt_state=opt_state), moments.step


def _filled(counter: jax.Array, step: int) -> jax.Array:
    return jax.device_put(jnp.full(counter.shape, step, counter.dtype), counter.sharding)
