"""Scalars for TensorBoard, written where they are told.

tensorboardX's own `SummaryWriter` has a thread for that, which ends when the disk is full; then whoever tells it more
waits for ever.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class TensorBoard:
    """One more event file in a folder. All methods raise OSError if it cannot be written."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        """Hides what is there of `purge_step` and later steps, which are about to be repeated."""
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._write(purge_step, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name; on disk after `flush`."""
        for name, value in values.items():
            self._write(step, summary=scalar(name, value))

    def flush(self) -> None:
        """Writes what is left."""
        self._writer.flush()

    def close(self) -> None:
        """Writes what is left and closes the file."""
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(Event(step=step, wall_time=time.time(), **content))
