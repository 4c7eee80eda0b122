"""The state a run starts with: its own newest checkpoint, else parameters of another model, else fresh ones."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import gin
import jax
import optax

from t5x_domain.adaptation.transplant import Transplant
from t5x_domain.conversion.checkpoint import Checkpoint, SecondMoments
from t5x_domain.conversion.formats import open_checkpoint
from t5x_domain.conversion.layout import EMBEDDINGS, POSITIONS, Leaf, leaves
from t5x_domain.conversion.placing import place
from t5x_domain.conversion.rtd import as_begin_of
from t5x_domain.errors import UserError
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.names import path_name
from t5x_domain.parallel.processes import is_first
from t5x_domain.training.checkpoint import Checkpoints
from t5x_domain.training.run import Run
from t5x_domain.training.second_moments import with_second_moments
from t5x_domain.training.state import Blueprint, TrainState

# What a run may decide for itself.
_FREE = ("vocab_size", "dropout_rate", *ModelConfig.HOW)
# What else it may with Run.init_longer: which part of a longer text the same parameters see.
_LONGER = (
    *("max_positions", "layer_pattern", "local_window"),
    *("global_tokens", "global_blocks", "global_block_size"),
)


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
    checkpoint = open_checkpoint(run.init_from, flag="--init_from", t5x=_t5x_options(run))
    restored = restore_params(
        checkpoint,
        blueprint,
        vocabulary=run.vocabulary,
        init_embedding=run.init_embedding,
        init_longer=run.init_longer,
        seed=run.seed,
    )
    if restored.left:
        _say(f"not in {run.init_from}, freshly initialised: {', '.join(restored.left)}")
    fresh = blueprint.init(run.seed) if restored.left else blueprint.shapes
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: restored.params.get(path_name(path), leaf), fresh)
    state = blueprint.init_state(params, transform)
    if not run.init_optimizer:
        return state, 0
    state, step = with_second_moments(run, state, restored.second_moments)
    _say(f"goes on from step {step:,} of {run.init_from} with Adafactor's second moments")
    return state, step


class Restored(NamedTuple):
    """What `restore_params` took from a checkpoint.

    Attributes:
      params: parameters by name (see `models.names.path_name`).
      left: names that were left.
      second_moments: of the optimizer, if they fit the parameters.
    """

    params: dict[str, jax.Array]
    left: list[str]
    second_moments: SecondMoments | None


@gin.configurable(allowlist=["include", "strict"])
def restore_params(
    checkpoint: Checkpoint,
    blueprint: Blueprint,
    *,
    vocabulary: Any = None,
    init_embedding: str | None = None,
    init_longer: bool = False,
    seed: int = 0,
    include: Sequence[str] = (".*",),
    strict: bool = True,
) -> Restored:
    """Parameters of another model, each device's share where it belongs.

    Args:
      checkpoint: a model in any format.
      blueprint: the model wanted.
      vocabulary: its vocabulary; None for that of `checkpoint`.
      init_embedding: how rows of tokens that `checkpoint` has not are made, see `adaptation.transplant`.
      init_longer: the model wanted is for longer texts: what its layers see may differ (`_LONGER`), and the rows of
        learned positions are repeated where `checkpoint` has fewer.
      seed: of rows that are made at random.
      include: regular expressions of the names wanted.
      strict: every wanted name must be in the checkpoint with its shape and, if all are wanted, the configurations
        must mean the same; otherwise names that do not fit are reported and left.

    Raises:
      UserError: another vocabulary without `init_embedding`; nothing that fits; or, if strict, anything that does not.
    """
    if blueprint.model_class is not checkpoint.model:
        checkpoint = as_begin_of(checkpoint, blueprint.model_class, blueprint.config)
    chosen, left = [], []
    for leaf in leaves(blueprint.model_class, blueprint.config):
        (chosen if any(re.search(pattern, leaf.name) for pattern in include) else left).append(leaf)
    if vocabulary is not None and any(leaf.name in EMBEDDINGS for leaf in chosen):
        checkpoint = _for_vocabulary(checkpoint, vocabulary, blueprint.config.vocab_size, init_embedding, seed)
    if init_longer and checkpoint.config.longest is not None:
        checkpoint = _with_positions(checkpoint, blueprint.config.max_positions)
    if strict and not left:
        _require_same_meaning(checkpoint, blueprint, (*_FREE, *_LONGER) if init_longer else _FREE)
    fitting = []
    for leaf in chosen:
        if all(part in checkpoint.tensors and checkpoint.tensors[part].shape == leaf.part_shape for part in leaf.parts):
            fitting.append(leaf)
        elif strict:
            raise UserError(_misfit(checkpoint, leaf))
        else:
            left.append(leaf)
    if not fitting:
        raise UserError(f"{checkpoint.origin}: none of the checkpoint's parameters fit {list(include)}.")
    targets = {path_name(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(blueprint.abstract_params)[0]}
    placed = {leaf.name: place(leaf, checkpoint.tensors, targets[leaf.name]) for leaf in fitting}
    return Restored(placed, [leaf.name for leaf in left], checkpoint.second_moments)


def _for_vocabulary(
    checkpoint: Checkpoint, vocabulary: Any, num_rows: int, init_embedding: str | None, seed: int
) -> Checkpoint:
    """The checkpoint with a row for every token of `vocabulary`, and `num_rows` in all."""
    rows, known = checkpoint.config.vocab_size, checkpoint.vocabulary
    if known is None:
        if rows != num_rows or init_embedding is not None:
            raise UserError(
                f"{checkpoint.origin}: does not say its vocabulary, so its {rows} rows cannot be fitted to the run's "
                f"{vocabulary.vocab_size} ids in {num_rows} rows; convert it first, naming its --vocabulary."
            )
        _say(f"{checkpoint.origin} does not say its vocabulary; it is taken to be the run's")
        return checkpoint
    same = known.fingerprint == vocabulary.fingerprint or Transplant.plan(known, vocabulary).unchanged
    if same and rows == num_rows:
        return checkpoint
    if init_embedding is None:
        raise UserError(
            f"{checkpoint.origin}: its vocabulary has {known.vocab_size} ids in {rows} rows and the run's "
            f"{vocabulary.vocab_size} in {num_rows}, or they have other pieces. Use its vocabulary "
            "(Vocabulary.model_file, Vocabulary.extra_ids, ModelConfig.vocab_size), or have the rows of new pieces "
            "made from the old ones' with --gin.Run.init_embedding=\"'mean'\"."
        )
    changed = checkpoint.with_vocabulary(vocabulary, num_rows, init=init_embedding, seed=seed)
    _say(changed.facts["notes"][-1])
    return changed


def _with_positions(checkpoint: Checkpoint, rows: int) -> Checkpoint:
    """The checkpoint with `rows` learned positions, in its generator, too, if it has one."""
    known = checkpoint.config.longest
    if known > rows:
        raise UserError(
            f"{checkpoint.origin}: has {known} positions, more than ModelConfig.max_positions = {rows}, which "
            "Run.init_longer does not cut; give the run as many or more."
        )
    if known < rows:
        _say(f"the {known} positions of {checkpoint.origin} are repeated for {rows}")
    tensors = {
        name: tensor.repeated(rows) if name.endswith(POSITIONS) else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    return dataclasses.replace(
        checkpoint, config=dataclasses.replace(checkpoint.config, max_positions=rows), tensors=tensors
    )


def _t5x_options(run: Run) -> dict[str, Any]:
    """What T5X's checkpoints do not say, the run says; their optimizer state is read only if it is wanted."""
    unsaid = ("mlp_activations", "norm_epsilon", "relative_bias_max_distance", "dropout_rate")
    return {
        "defaults": {key: getattr(run.config, key) for key in unsaid},
        "optimizer": run.init_optimizer,
    }


def _say(text: str) -> None:
    if is_first():
        print(text)


def _require_same_meaning(checkpoint: Checkpoint, blueprint: Blueprint, free: Sequence[str]) -> None:
    if checkpoint.model is not blueprint.model_class:
        raise UserError(
            f"{checkpoint.origin}: its model is {checkpoint.model.__name__}, this run's "
            f"{blueprint.model_class.__name__}; set MODEL, or take the parts that both have with "
            "--gin.restore_params.strict=False."
        )
    theirs, ours = (dataclasses.asdict(config) for config in (checkpoint.config, blueprint.config))
    for key in ("mlp_activations", "layer_pattern", "decoder_layer_pattern"):
        theirs[key], ours[key] = (tuple(value[key] or ()) for value in (theirs, ours))
    for config in (theirs, ours):
        config["num_kv_heads"] = config["num_kv_heads"] or config["num_heads"]
    differing = [key for key in ours if key not in free and theirs[key] != ours[key]]
    if differing:
        said = "; ".join(
            f"ModelConfig.{key} is {theirs[key]!r} there and {ours[key]!r} in this run" for key in differing
        )
        mend = "Use its configuration"
        if set(differing) <= set(_LONGER):
            mend += ", or go on with longer texts with --gin.Run.init_longer=True"
        raise UserError(f"{checkpoint.origin}: a model of another configuration: {said}. {mend}.")


def _misfit(checkpoint: Checkpoint, leaf: Leaf) -> str:
    shapes = {part: checkpoint.tensors[part].shape if part in checkpoint.tensors else None for part in leaf.parts}
    part, shape = next((part, shape) for part, shape in shapes.items() if shape != leaf.part_shape)
    return (
        f"{checkpoint.origin}: parameter {part} has shape {leaf.part_shape} in this model and "
        f"{shape or 'is missing'} in the checkpoint; use its model configuration, or restore what fits with "
        "--gin.restore_params.strict=False."
    )
