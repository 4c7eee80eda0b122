"""How long each update takes on the device, and when the device had none to do; told without ever stopping it."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from t5x_domain.training.goodput import Ledger


class _Dispatched(NamedTuple):
    begun: float
    metrics: Mapping[str, jax.Array]


class StepClock:
    """A thread waits for each update's result and notes the time, while the main thread prepares the next ones.

    An update's seconds run from the end of the one before it, or, if its batch came later than that, from there: what
    the device was at work, with the transfer of the batch. The device waited for data from the end of the last update
    that was dispatched to the arrival of the next batch.
    """

    def __init__(self, ledger: Ledger, clock: Callable[[], float] = time.time) -> None:
        """Tells `ledger` of the waits for data; `clock` is the ledger's."""
        self._ledger, self._clock = ledger, clock
        self._dispatched: queue.Queue[_Dispatched | None] = queue.Queue()
        self._finished_at = 0.0  # of the last update that is done
        self._durations: list[float] = []
        self._thread = threading.Thread(target=self._watch, name="step clock", daemon=True)
        self._thread.start()

    def timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, and how long the device waited for each."""
        remaining = iter(batches)
        while True:
            asked = self._clock()
            batch = next(remaining, None)
            self._arrived = self._clock()
            if self._dispatched.unfinished_tasks == 0:
                self._ledger.shift("data_wait", self._arrived - max(asked, self._finished_at))
            if batch is None:
                return
            self._compiled_before = self._ledger.seconds()["compile"]
            yield batch

    def dispatched(self, metrics: Mapping[str, jax.Array]) -> None:
        """The update of the last batch is on its way; `metrics` are what it will return."""
        compiled = self._ledger.seconds()["compile"] - self._compiled_before
        self._dispatched.put(_Dispatched(self._arrived + compiled, metrics))

    def settle(self) -> None:
        """Waits until the device has done all updates."""
        self._dispatched.join()

    @contextlib.contextmanager
    def pause(self, cause: str) -> Iterator[None]:
        """Something else than updates, which begins when the device has done all of them."""
        self.settle()
        with self._ledger.spending(cause):
            yield

    def percentiles(self) -> dict[str, float]:
        """p50, p90 and max of the seconds of the updates since the last call, of which there must be some.

        Waits for those on their way.
        """
        self.settle()
        durations, self._durations = self._durations, []
        return dict(zip(("p50", "p90", "max"), np.percentile(durations, (50, 90, 100)).tolist(), strict=True))

    def close(self) -> None:
        """Ends the thread."""
        self._dispatched.put(None)

    def _watch(self) -> None:
        while (update := self._dispatched.get()) is not None:
            # What fails on the device is raised in the main thread, which looks at the same arrays.
            with contextlib.suppress(Exception):
                jax.block_until_ready(update.metrics)
            now = self._clock()
            self._durations.append(now - max(update.begun, self._finished_at))
            self._finished_at = now
            self._dispatched.task_done()
