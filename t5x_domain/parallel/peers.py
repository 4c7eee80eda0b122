"""The other processes of a run: they are watched, and all end together."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from t5x_domain.errors import StorageError, UserError

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: start the same command again
DAY = 24 * 3600 * 1000  # milliseconds: as good as for ever, since a lost process ends all that wait for it
_ENDED, _GONE = "t5x_domain/ended", "t5x_domain/gone/"
_AGAIN = "the same command goes on from the last checkpoint"
_FAREWELL_SECONDS = 2.0  # for which process 0, which carries the messages, outlives what it says


class Peers:
    """Ends this process when another one is lost or fails, with a sentence that names it.

    A lost process is known to JAX's coordination service, which lives in process 0, when it has not been heard of for
    `heartbeat_seconds`; the others ask it a tenth of that apart. Process 0 takes the service with it, which JAX notices
    at once. What was trained up to the last checkpoint is on disk then, so the exit status is EXIT_PREEMPTED. Where a
    process failed and can say so, all end with its status: peers are the first to leave, and launchers judge by them.

    Attributes:
      client: of JAX's coordination service.
      index: this process.
      count: processes in all.
    """

    def __init__(self, client: Any, address: str, index: int, count: int, heartbeat_seconds: float) -> None:
        """Watches from now on; `address` is HOST:PORT of process 0."""
        self.client, self.index, self.count = client, index, count
        self._address, self._heartbeat = address, heartbeat_seconds
        self._ending = threading.RLock()  # held by the thread that ends the process
        if index:
            on_abort(self._explain_abort)
        watches = (self._watch_signs_of_life, self._watch_ends)
        self._threads = [threading.Thread(target=watch, daemon=True) for watch in watches]
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Waits until all processes have come so far, and takes leave of them."""
        self.client.wait_at_barrier("t5x_domain/finish", DAY)
        self._end_here()
        if self.index:
            self.client.key_value_set(f"{_GONE}{self.index}", "")
        else:
            deadline = time.monotonic() + self._heartbeat
            while len(self.client.key_value_dir_get(_GONE)) < self.count - 1 and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.5)  # between their last word and the end of their connections
        self._leave()

    def fail(self, error: BaseException) -> None:
        """Tells the other processes that this one ends with `error`, and why."""
        if not isinstance(error, (UserError, StorageError, KeyboardInterrupt, SystemExit)):
            self.rule_out_loss(error)
        self._end_here()
        told_to_stop = isinstance(error, (KeyboardInterrupt, SystemExit))
        status = 2 if isinstance(error, UserError) else EXIT_PREEMPTED if told_to_stop else 1
        end = {"process": self.index, "status": status, "reason": _one_line(error)}
        with contextlib.suppress(RuntimeError):  # another process has been faster, or the service is gone: they know
            self.client.key_value_set(_ENDED, json.dumps(end))
        if self.index == 0:
            time.sleep(_FAREWELL_SECONDS)
        self._leave()

    def rule_out_loss(self, error: BaseException) -> None:
        """Does not return if `error` comes of a lost process: what the others see first is that an exchange failed."""
        seconds = self._heartbeat * 1.1 + 5
        self._say(f"{_one_line(error)}; waiting {seconds:.0f} s to learn whether another process was lost")
        time.sleep(seconds)

    def _watch_signs_of_life(self) -> None:
        while True:
            time.sleep(self._heartbeat / 10)
            try:
                # Returns when all that are alive ask; they are few bytes and far between.
                lost = set(range(self.count)) - set(self.client.get_live_nodes(list(range(self.count))))
            except RuntimeError as error:
                return self._end(f"process 0 ({self._address}) does not answer: {_one_line(error)}; {_AGAIN}")
            if lost:
                names = ", ".join(map(str, sorted(lost)))
                return self._end(
                    f"process {names} was lost: nothing was heard of it for {self._heartbeat:g} s "
                    f"(--heartbeat_seconds); {_AGAIN}"
                )

    def _watch_ends(self) -> None:
        end = None
        while end is None:
            try:
                end = json.loads(self.client.blocking_key_value_get(_ENDED, DAY))
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):  # the connection is gone, which others deal with
                    return
        if end["process"] != self.index:
            again = "" if end["status"] == 2 else f"; {_AGAIN}"
            self._end(f"process {end['process']} ended: {end['reason']}{again}", end["status"])

    def _end(self, sentence: str, status: int = EXIT_PREEMPTED) -> None:
        if not self._begin_to_end():
            return
        self._say(sentence)
        if self.index == 0:
            time.sleep(_FAREWELL_SECONDS)
        sys.stdout.flush()
        os._exit(status)  # the main thread may wait for a device, for ever

    def _explain_abort(self) -> None:
        """JAX aborts the process when the service is gone. Whether that is why it was aborted, the port tells."""
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            self._end(f"process 0 ({self._address}), which the others need, was lost; {_AGAIN}")

    def _begin_to_end(self) -> bool:
        """Whether this thread, as the first that asks, is to end the process."""
        first = self._ending.acquire(blocking=False)
        if first:
            _delay_abort()
        return first

    def _end_here(self) -> None:
        """Returns if the main thread is to end the process; otherwise that is about to end."""
        if not self._begin_to_end():
            threading.Event().wait()

    def _leave(self) -> None:
        """Lets go of the service, and of the threads that listen to it, which would not survive the interpreter."""
        import jax

        jax.distributed.shutdown()
        for thread in self._threads:
            thread.join(timeout=5)

    def _say(self, sentence: str) -> None:
        print(f"t5x-domain: process {self.index}: {sentence}", file=sys.stderr, flush=True)


_HANDLERS: list[Any] = []  # C keeps a pointer to them


def on_abort(explain: Callable[[], None] | None) -> None:
    """From now on calls `explain`, if there is one, before the process aborts, which it does if that returns.

    JAX's answer to a lost service is abort(), on a thread of its own. Python's signal module could not say a word
    before the process is gone, since its handlers wait for the main thread, and another exit status is needed.
    """
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_int)
    handler = prototype(lambda _: explain()) if explain else prototype(signal.SIG_DFL.value)
    _HANDLERS.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def _delay_abort() -> None:
    """From now on a thread that aborts waits, while the one that has begun to end the process does so in its own way.

    The handler is C's sleep(), which takes the number of the signal for seconds, since Python may be gone by then.
    """
    c = ctypes.CDLL(None)
    c.signal(signal.SIGABRT, c.sleep)


def _one_line(error: BaseException) -> str:
    return f"{'' if isinstance(error, UserError) else type(error).__name__ + ': '}{' '.join(str(error).split())[:500]}"
