"""Checkpoints: parameters, optimizer, step and data position as one atomic unit, written by Orbax in the background.

Where a run starts from, in this order: the newest complete checkpoint of its own run directory; else `init_from`,
parameters only; else fresh parameters.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gin
import jax
import orbax.checkpoint as ocp
from etils import epath

from t5x_domain.errors import UserError
from t5x_domain.training.optimizer import path_name
from t5x_domain.training.state import TrainState

Tree = Any


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept; whatever one rule keeps, stays.

    Attributes:
      last: the newest.
      every: those at multiples of this many steps; None for no such rule.
      best: those with the smallest held-out loss at the time; 0 for no such rule.
    """

    last: int = 2
    every: int | None = None
    best: int = 0


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: str | Path, retention: Retention | None = None) -> None:
        """Opens `directory`, creates it if needed, and removes what an interrupted save has left."""
        retention = retention or Retention()
        policies = ocp.checkpoint_managers
        rules = [policies.LatestN(retention.last)]
        if retention.every:
            rules.append(policies.EveryNSteps(retention.every))
        if retention.best:
            rules.append(
                policies.BestN(
                    get_metric_fn=_held_out_loss, reverse=True, n=retention.best, keep_checkpoints_without_metrics=False
                )
            )
        self.directory = epath.Path(directory).resolve()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(rules),
                best_fn=_held_out_loss,  # Orbax keeps metrics beside a checkpoint only if there is one
                best_mode="min",
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
            item_names=("params", "rest", "data", "metrics"),
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(
        self, state: TrainState, step: int, data: dict[str, Any], held_out: dict[str, float] | None = None
    ) -> None:
        """Starts writing in the background; returns once the arrays are safe from the next update.

        Args:
          state: what to save.
          step: its step.
          data: the data position, plain JSON.
          held_out: {"loss": ...} for `Retention.best`.

        Raises:
          UserError: this save, or the one before it, could not be written.
        """
        with self._explained(f"the checkpoint of step {step}, or the one before,"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    rest=ocp.args.StandardSave(_rest(state)),
                    data=ocp.args.JsonSave(data),
                ),
                metrics=held_out,
                force=True,
            )

    def wait(self) -> None:
        """Blocks until the last save is complete.

        Raises:
          UserError: it could not be written.
        """
        with self._explained("the last checkpoint"):
            self._manager.wait_until_finished()

    def restore(self, target: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """The state and data position of `step`; `target` holds shapes and shardings (`Blueprint.abstract_state`)."""
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(target.params),
                rest=ocp.args.StandardRestore(_rest(target)),
                data=ocp.args.JsonRestore(),
            ),
        )
        return TrainState(params=restored["params"], **restored["rest"]), restored["data"]

    def close(self) -> None:
        """Waits for the last save and lets go of the directory.

        Raises:
          UserError: it could not be written.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turns a failed write into a sentence. Complete checkpoints stay: Orbax renames one only when it is whole."""
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds, full disks among them
            raise UserError(
                f"{what} could not be written to {self.directory}: {' '.join(str(error).split())[:300]}. "
                f"The newest complete checkpoint is of step {self._manager.latest_step()}; "
                "make room or set another --run_dir, then start the same command again."
            ) from error


def _held_out_loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def _rest(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "params"}


def find_params(path: str) -> epath.Path:
    """The folder of parameters that `path` means: a run directory, its checkpoints/, or one step of them.

    Raises:
      UserError: there is no complete checkpoint.
    """
    root = epath.Path(path).resolve()  # Orbax finds nothing under a relative path
    for folder in (root, root / "checkpoints"):
        if (folder / "params").exists():
            return folder / "params"
        steps = [int(child.name) for child in folder.iterdir() if child.name.isdigit()] if folder.is_dir() else []
        if steps:
            return folder / str(max(steps)) / "params"
    raise UserError(
        f"--init_from={path}: no complete checkpoint there; give a run directory or one of its checkpoints."
    )


@gin.configurable(allowlist=["include", "strict"])
def restore_params(
    path: str, target: Tree, *, include: Sequence[str] = (".*",), strict: bool = True
) -> tuple[dict[str, jax.Array], list[str]]:
    """Parameters of another run, by name.

    Args:
      path: see `find_params`.
      target: nested dict of shapes with shardings (`Blueprint.abstract_params`).
      include: regular expressions of the names wanted.
      strict: every wanted name must be in the checkpoint with the shape of `target`; otherwise those that are not are
        reported and left.

    Returns:
      The restored arrays by name (see `optimizer.path_name`), and the names in `target` that were left.

    Raises:
      UserError: no checkpoint; or, if strict, names or shapes that do not fit.
    """
    folder = find_params(path)
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder).item_metadata.tree
        shapes = {path_name(p): tuple(leaf.shape) for p, leaf in jax.tree_util.tree_flatten_with_path(saved)[0]}
        wanted, left = {}, []
        for key_path, leaf in jax.tree_util.tree_flatten_with_path(target)[0]:
            name = path_name(key_path)
            chosen = any(re.search(pattern, name) for pattern in include)
            if chosen and shapes.get(name) == leaf.shape:
                wanted[name] = leaf
            else:
                left.append(name)
                if chosen and strict:
                    raise UserError(
                        f"--init_from={path}: parameter {name} has shape {leaf.shape} in this model and "
                        f"{shapes.get(name, 'is missing')} in the checkpoint; use its model configuration, or restore "
                        "what fits with --gin.restore_params.strict=False."
                    )
        if not wanted:
            raise UserError(f"--init_from={path}: none of the checkpoint's parameters fit {list(include)}.")
        tree = _unflatten(wanted)
        restored = checkpointer.restore(
            folder,
            args=ocp.args.PyTreeRestore(
                item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
            ),
        )
    return {path_name(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(restored)[0]}, left


def _unflatten(named: dict[str, Any]) -> Tree:
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
