"""Checkpoints: parameters, optimizer, step and data position as one atomic unit, written by Orbax in the background."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gin
import orbax.checkpoint as ocp

from t5x_domain.conversion.stores import absolute
from t5x_domain.errors import StorageError, UserError
from t5x_domain.parallel.processes import peers
from t5x_domain.training.mirror import Mirror
from t5x_domain.training.state import TrainState


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
    """The checkpoints of one run directory, of this machine, gs:// (Orbax's own way) or s3:// (see `Mirror`)."""

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
        self.directory = absolute(directory)
        self._mirror = Mirror(self.directory) if str(self.directory).startswith("s3://") else None
        self._manager = _Manager(
            self.directory if self._mirror is None else self._mirror.local,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(rules),
                best_fn=_held_out_loss,  # Orbax keeps metrics beside a checkpoint only if there is one
                best_mode="min",
                enable_async_checkpointing=self._mirror is None,
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
            if self._mirror is not None:
                self._mirror.wait()
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
            if self._mirror is not None:
                self._mirror.push()

    def wait(self) -> None:
        """Blocks until the last save is complete.

        Raises:
          UserError: it could not be written.
        """
        with self._explained("the last checkpoint"):
            self._manager.wait_until_finished()
            if self._mirror is not None:
                self._mirror.wait()

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
            if self._mirror is not None:
                self._mirror.close()

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turns a failed write into a sentence. Complete checkpoints stay: Orbax renames one only when it is whole."""
        try:
            yield
        except (StorageError, UserError):  # which say it better
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds, full disks among them
            if others := peers():
                others.rule_out_loss(error)
            raise UserError(
                f"{what} could not be written to {self.directory}: {' '.join(str(error).split())[:300]}. "
                f"The newest complete checkpoint is of step {self._manager.latest_step()}; "
                "make room or set another --run_dir, then start the same command again."
            ) from error


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """The loop asks JAX, which wants every process to count the same steps."""
        return False


def _held_out_loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def _rest(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "params"}
