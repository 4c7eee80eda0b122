"""Which of several processes keeps the others waiting: every process's step times, and a line about the slow one."""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from t5x_domain.files import Growing
from t5x_domain.parallel.processes import is_first, peers
from t5x_domain.training.metrics import JsonLines

_SLOWER = 1.5  # times the median of the others
_SHARE = 0.1  # of a step: what is less than that keeps nobody waiting
_ENOUGH = 5  # steps for a median that says something
_STEPS = "t5x_domain/steps/"


class Stragglers:
    """Step times of all processes, in hosts.jsonl, at every logged step.

    An update ends in all processes at once, since they exchange gradients; so a slow one does not show in its own
    step time but in everybody's. What is compared is therefore the time that a process was busy itself, reading data
    and the rest, and did not wait for its devices. Nothing waits for the numbers: they travel beside the training, and
    process 0 writes at a logged step what was sent at the one before.
    """

    def __init__(
        self,
        records: Growing,
        start: int,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Continues the file of a run that goes on from step `start`; `say` shows a line; `clock` tells seconds."""
        self._peers, self._say, self._clock = peers(), say, clock
        self._times: list[tuple[float, float, float]] = []  # (step, data, devices), seconds
        self._data = self._device = 0.0
        self._began = clock()
        self._reported: int | None = None
        self._lines = None
        if self._peers and is_first():
            self._lines = JsonLines(records.local / "hosts.jsonl", start, records.home / "hosts.jsonl")

    def of_data[T](self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches, and the time until each comes; a step begins when the loop asks for its batch."""
        batches = iter(batches)
        while True:
            self._began = self._clock()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._data, self._device = self._clock() - self._began, 0.0
            yield batch

    @contextlib.contextmanager
    def waiting_for_device(self) -> Iterator[None]:
        """Around what waits for the devices."""
        began = self._clock()
        yield
        self._device += self._clock() - began

    def step(self) -> None:
        """Ends a step; evaluations and checkpoints come after."""
        self._times.append((self._clock() - self._began, self._data, self._device))

    def report(self, step: int) -> None:
        """Sends this process's times since the last report, and in process 0 writes those that were sent then."""
        times, self._times = self._times, []
        if self._peers is None:
            return
        self._write_reported()
        key = f"{_STEPS}{step}/{self._peers.index:06}"
        self._peers.client.key_value_set(key, json.dumps(summary(times)))
        self._reported = step

    def _write_reported(self) -> None:
        if self._lines is None or self._reported is None:
            return
        sent = self._peers.client.key_value_dir_get(f"{_STEPS}{self._reported}/")
        hosts = [json.loads(value) for _, value in sorted(sent)]
        self._peers.client.key_value_delete(f"{_STEPS}{self._reported}/")
        self._lines.write({"step": self._reported, "hosts": hosts})
        for line in slow(hosts):
            self._say(f"step {self._reported:,}: {line}")

    def close(self) -> None:
        """Writes what was sent last."""
        self._write_reported()
        if self._lines is not None:
            self._lines.close()


def summary(times: list[tuple[float, float, float]]) -> dict[str, Any]:
    """One process's line: percentiles of seconds a step, and medians of its parts."""
    import jax

    steps, data, devices = np.array(times).T
    return {
        "host": f"process {jax.process_index()} on {socket.gethostname()}",
        "steps": len(times),
        "p50": float(np.median(steps)),
        "p90": float(np.percentile(steps, 90)),
        "max": float(steps.max()),
        "busy": float(np.median(steps - devices)),
        "data": float(np.median(data)),
    }


def slow(hosts: list[Mapping[str, Any]]) -> list[str]:
    """A sentence about every process that keeps the others waiting: busy longer than they, and for long enough."""
    if len(hosts) < 2:
        return []
    lines = []
    usual = (medians_of_others(np.array([host[part] for host in hosts])) for part in ("busy", "data"))
    for host, busy, data in zip(hosts, *usual, strict=True):
        extra = host["busy"] - busy
        if host["steps"] < _ENOUGH or host["busy"] < _SLOWER * busy or extra < _SHARE * host["p50"]:
            continue
        cause = "waiting for data" if host["data"] - data > extra / 2 else "not waiting for data"
        lines.append(
            f"{host['host']} keeps the others waiting: busy {host['busy']:.3g} s a step against {busy:.3g} s, "
            f"{cause} ({host['data']:.3g} s against {data:.3g} s)"
        )
    return lines


def medians_of_others(values: np.ndarray) -> np.ndarray:
    """[n]: the median of all of `values` [n] but this one, n > 1; sorted once, since a run may have thousands."""
    order = np.argsort(values)
    ranks = np.argsort(order)
    middle = np.array([[(len(values) - 2) // 2], [(len(values) - 1) // 2]])  # of the others, in their order
    return values[order][middle + (middle >= ranks)].mean(axis=0)
