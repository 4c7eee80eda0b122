"""Traces of some updates for TensorBoard's profiler, asked for in advance or by a signal."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from t5x_domain.training.step_clock import StepClock

UPDATES_ON_SIGNAL = 3


class TraceRequest:
    """Whether a trace was asked for by SIGUSR1, which would end a process that does not listen.

    Attributes:
      pending: asked for, and not begun yet.
    """

    def __init__(self) -> None:
        """Listens from now on; signals can only be caught in the main thread."""
        self.pending, self._before = False, None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR1, self._receive)

    def _receive(self, *_: Any) -> None:
        self.pending = True

    def close(self) -> None:
        """Stops listening."""
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)


class Profiler:
    """Traces the updates first … last, and the next three whenever one is requested.

    Each process writes its own, to FOLDER/process_0 and so on, where TensorBoard finds them. A trace begins and ends
    with the device at rest, so that it has whole updates and no others.
    """

    def __init__(
        self,
        folder: Path,
        steps: tuple[int, int] | None,
        request: TraceRequest,
        step_clock: StepClock,
        say: Callable[[str], None],
    ) -> None:
        """Has traced nothing yet."""
        self._folder = folder / f"process_{jax.process_index()}"
        self._first, self._last = steps or (0, 0)  # updates are counted from 1
        self._step_clock, self._say = step_clock, say
        self._request, self._until = request, None

    @contextlib.contextmanager
    def update(self, step: int) -> Iterator[None]:
        """The block dispatches update `step`."""
        if self._until is None:
            self._start(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if self._until == step:
            self._stop()

    def _start(self, step: int) -> None:
        if self._first <= step <= self._last:
            self._until = self._last
        elif self._request.pending:
            self._until = step + UPDATES_ON_SIGNAL - 1
        else:
            return
        self._request.pending = False
        with self._step_clock.pause("profile"):
            jax.profiler.start_trace(self._folder)
        self._say(f"tracing updates {step:,} to {self._until:,}")

    def _stop(self) -> None:
        self._until = None
        with self._step_clock.pause("profile"):
            jax.profiler.stop_trace()
        self._say(f"trace written: tensorboard --logdir {self._folder}")

    def close(self) -> None:
        """Writes a trace that was not over yet."""
        if self._until is not None:
            self._stop()
