"""Updates that are not finite: skipped by the step, counted here."""

import io
from collections.abc import Mapping

import jax
import numpy as np

from t5x_domain import files
from t5x_domain.errors import UserError
from t5x_domain.parallel.processes import wait_for_all
from t5x_domain.training.feed import Feed
from t5x_domain.training.run import Run


class Guard:
    """Ends a run whose updates are not finite any more, and keeps the batch for inspection, every process its rows."""

    def __init__(self, run: Run, feed: Feed) -> None:
        """`run.max_skipped_in_a_row` such updates end the run."""
        self._run, self._feed = run, feed
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None

    def watch(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Looks at the update before this one, so that the device always has one to work on."""
        self.settle()
        self._pending = (step, metrics)

    def settle(self) -> None:
        """Looks at the last update.

        Raises:
          UserError: it was one too many that was not finite.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        skipped = int(metrics["skipped_in_a_row"])
        if skipped >= self._run.max_skipped_in_a_row:
            part = f"_rows_of_process_{jax.process_index()}" if jax.process_count() > 1 else ""
            path = files.path(self._run.run_dir) / f"nonfinite_batch_{step}{part}.npz"
            np.savez(content := io.BytesIO(), **self._feed.batches[step - 1])
            files.write_atomically(path, content.getvalue())
            wait_for_all(f"non-finite batch {step}")  # the first to fail ends the others
            raise UserError(
                f"the last {skipped} updates up to step {step} were not finite and were skipped; the batch of the last "
                f"is in {path}. Lower the learning rate or set Updates.clip_global_norm, "
                "and go on from the last checkpoint."
            )
