"""A notice that the machine is about to be taken away."""

import signal
import threading
from typing import Any

from jax.experimental.multihost_utils import reached_preemption_sync_point

from t5x_domain.parallel.processes import peers


class PreemptionNotice:
    """Whether the run was told to stop (SIGTERM), so that it can save first.

    Of several processes it is enough that one is told: JAX, which listens from `processes.start` on, has them agree on
    a step that none of them has done yet.
    """

    def __init__(self, start: int) -> None:
        """Listens from now on, before step `start` + 1; signals can only be caught in the main thread."""
        self._start, self._given, self._before = start, False, None
        if peers() is None and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)

    def stops_after(self, step: int) -> bool:
        """Whether to save `step` and stop; to be asked after every step, in all processes."""
        # Counted from the start: of a process that was told before its first step JAX takes the count to be 0.
        return self._given or reached_preemption_sync_point(step - self._start)

    def _receive(self, *_: Any) -> None:
        self._given = True

    def close(self) -> None:
        """Stops listening."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
