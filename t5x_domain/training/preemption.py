"""A notice that the machine is about to be taken away."""

import signal
import threading
from typing import Any


class PreemptionNotice:
    """Whether the process was told to stop (SIGTERM), so that it can save first."""

    def __init__(self) -> None:
        """Listens from now on; signals can only be caught in the main thread."""
        self.given = False
        self._before = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_: Any) -> None:
        self.given = True

    def close(self) -> None:
        """Stops listening."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
