"""Where a run's wall time goes, across restarts: the share in updates that counted, and the causes of the rest."""

import contextlib
import itertools
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from t5x_domain.errors import StorageError, UserError
from t5x_domain.files import Growing, write_atomically
from t5x_domain.parallel.processes import is_first
from t5x_domain.training.metrics import JsonLines, explained, read_json_lines

CAUSES = (
    "start_up",  # until the first batch is asked for: imports, caches, restoring a checkpoint
    "compile",  # tracing and compiling, wherever it happens
    "data_wait",  # the devices had nothing to do because the next batch was not there
    "step",  # updates that counted: the device at work, with what the host does meanwhile and between
    "evaluation",
    "checkpoint",  # until the arrays were safe; the rest is written in the background, while updates go on
    "profile",
    "export",
    "repeated",  # updates that were done again after a restart from an older checkpoint
    "restart",  # from the last sign of life of one start to the beginning of the next
)
_SECONDS_BETWEEN_SUMMARIES = 30.0


class Ledger:
    """Wall time of a run by cause, every moment under exactly one, so that the causes sum to the wall time.

    At any time there is one thing that the main thread is about (`enter`, `spending`). Devices work asynchronously, so
    what only they know, that they were waiting for data, is told afterwards (`shift`, by `StepClock`); so is the
    compiler's time, which JAX reports itself.

    goodput.jsonl, beside metrics.jsonl, has a line for each start, each logged update and each checkpoint; they survive
    whatever kills the process. The seconds between the last line and the kill are "restart": what was done in them was
    lost. goodput.json is what they come to, written at most every half a minute and at the end. Of several processes
    the first one writes what it has seen itself.
    """

    def __init__(self, began: float | None = None, clock: Callable[[], float] = time.time) -> None:
        """`began`: when the program was started, seconds since 1970; now by default."""
        self._clock = clock
        self._began = self._since = clock() if began is None else began
        self._cause, self._seconds = "start_up", Counter[str]()
        self._compiled_spans: list[tuple[float, float]] = []
        self._lines: JsonLines | None = None
        self._last_summary = -math.inf
        jax.monitoring.register_event_time_span_listener(self._compiled)

    def open(self, records: Growing, step: int, total_steps: int) -> None:
        """Goes on with the account of a run directory, from a checkpoint of `step`."""
        earlier = read_json_lines(records.home / "goodput.jsonl")
        self._earlier = account(earlier, step, self._began)
        self._starts = 1 + sum("started" in line for line in earlier)
        self._first_steps = [line["first_step_seconds"] for line in earlier if "first_step_seconds" in line]
        self._records, self._start, self._step, self._total_steps = records, step, step, total_steps

    def enter(self, cause: str) -> None:
        """What the main thread is about from now on."""
        now = self._clock()
        self._seconds[self._cause] += now - self._since
        self._cause, self._since = cause, now

    @contextlib.contextmanager
    def spending(self, cause: str) -> Iterator[None]:
        """What it is about within the block."""
        before = self._cause
        self.enter(cause)
        try:
            yield
        finally:
            self.enter(before)

    def shift(self, cause: str, seconds: float) -> None:
        """Of the time that has passed under the present cause, so much belongs to another."""
        self._seconds[cause] += seconds
        self._seconds[self._cause] -= seconds

    def seconds(self) -> Mapping[str, float]:
        """Seconds of this start by cause, up to now."""
        self.enter(self._cause)
        return self._seconds

    def first_step(self, step: int) -> str:
        """Notes that this start has done its first update; a sentence about how long that took."""
        compiling = self.seconds()["compile"]
        self._first_steps.append(self._since - self._began)
        self.record(step, first_step_seconds=self._first_steps[-1])
        return f"first update {self._first_steps[-1]:.1f} s after the start, {compiling:.1f} s of them compiling"

    def record(self, step: int, **facts: Any) -> dict[str, Any]:
        """Writes down what has passed until now, after `step` updates; returns the whole run's share and seconds."""
        seconds, total = dict(self.seconds()), self._total()
        self._step = step
        if is_first():
            self._write({"step": step, "seconds": seconds, **facts})
            if self._since - self._last_summary >= _SECONDS_BETWEEN_SUMMARIES:
                self._write_summary(total)
        return total

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Closes it; what cannot be written then is less than the error that has ended the run, if there is one."""
        with contextlib.suppress(*(() if kind is None else (UserError, StorageError))):
            self.close()

    def close(self) -> None:
        """Ends this start. The time until the next, if all updates are done, is no part of the run."""
        jax.monitoring.unregister_event_time_span_listener(self._compiled)
        if self._lines is not None:  # nothing was trained, nothing is to be said
            self._write_summary(self.record(self._step, finished=self._step >= self._total_steps))
            self._lines.close()
            self._records.publish()

    def _total(self) -> dict[str, Any]:
        seconds = {cause: self._earlier[cause] + self._seconds[cause] for cause in CAUSES}
        wall = sum(seconds.values())
        return {"goodput": seconds["step"] / wall if wall else 0.0, "wall_seconds": wall, "seconds": seconds}

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._lines is None:
            local, home = (folder / "goodput.jsonl" for folder in (self._records.local, self._records.home))
            self._lines = JsonLines(local, math.inf, home)
            self._lines.write({"step": self._start, "started": self._began})
        self._lines.write(line)

    def _write_summary(self, total: Mapping[str, Any]) -> None:
        self._last_summary = self._since
        summary = {**total, "starts": self._starts, "first_step_seconds": self._first_steps}
        path = self._records.local / "goodput.json"
        with explained(path):
            write_atomically(path, json.dumps(summary, indent=1).encode())

    def _compiled(self, event: str, start: float, end: float, **_: Any) -> None:
        """JAX has traced, lowered or compiled something; while tracing it may have compiled something else."""
        if not event.startswith("/jax/core/compile/") or threading.current_thread() is not threading.main_thread():
            return
        within = [span for span in self._compiled_spans if span[0] >= start]
        self._compiled_spans = [span for span in self._compiled_spans if span[0] < start] + [(start, end)]
        self.shift("compile", end - start - sum(stop - begin for begin, stop in within))


def account(lines: Sequence[Mapping[str, Any]], step: int, now: float) -> Counter[str]:
    """Seconds by cause of all starts of a run before one that begins `now` and goes on from `step`.

    Updates beyond the step from which a later start went on did not count, whichever start did them.
    """
    total, goes_on_from, next_began = Counter[str](), step, now
    for head, records in reversed(_starts(lines)):
        seconds = Counter(records[-1]["seconds"]) if records else Counter[str]()
        counted = [record["seconds"].get("step", 0.0) for record in records if record["step"] <= goes_on_from]
        repeated = seconds["step"] - (counted[-1] if counted else 0.0)
        for cause, amount in seconds.items():
            total[cause] += amount
        total["step"] -= repeated
        total["repeated"] += repeated
        if not (records and records[-1].get("finished")):
            total["restart"] += next_began - head["started"] - sum(seconds.values())
        goes_on_from, next_began = min(goes_on_from, head["step"]), head["started"]
    return total


def _starts(lines: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], list[Mapping[str, Any]]]]:
    """The first line of each start, and its others."""
    heads = [index for index, line in enumerate(lines) if "started" in line]
    return [(lines[a], list(lines[a + 1 : b])) for a, b in itertools.pairwise([*heads, len(lines)])]
