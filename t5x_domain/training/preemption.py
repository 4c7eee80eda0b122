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

    def __init__(self) -> None:
        """Listens from now on; signals can only be caught in the main thread."""
        self._received, self._asked, self._before = False, 0, None
        if peers() is None and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)

    def poll(self) -> bool:
        """Whether to stop after this step; to be asked once in every step, in all processes."""
        # Not the run's steps: where one is told before its first, JAX takes it to be about to ask for number 1.
        self._asked += 1
        return self._received or reached_preemption_sync_point(self._asked)

    def _receive(self, *_: Any) -> None:
        self._received = True

    def close(self) -> None:
        """Stops listening."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
