"""`python -m launch.supervise --processes=2 --logs=DIR -- python -m t5x_domain.train …`: processes as one.

Starts the command in as many processes as are asked for, each with a log file of its own, and starts all again when one
was preempted (exit status 75) or, up to a limit, has failed. A user's error (status 2) no restart mends. SIGTERM and
Ctrl-C are handed on; a process that does not end in time is killed.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.record import record

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: start the same command again
_OUR_SIGNALS = (-signal.SIGTERM, -signal.SIGKILL)
_POLL_SECONDS = 0.1
_AFTER_FAILURE_SECONDS = 10.0
_SHOWN_LINES, _SHOWN_BYTES = 20, 16384  # of the log of a process that has failed


@dataclasses.dataclass(frozen=True)
class Supervisor:
    """How to run a command.

    Attributes:
      command: of every process.
      processes: how many; they find each other by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
      devices: virtual CPU devices of each; 0 for the machine's accelerators, one for each process if there are several.
      logs: the folder of process-<i>.txt, appended to.
      max_restarts: after failures; those after status 75 do not count.
      restart_wait_seconds: between an end and the next start.
      notice_seconds: from SIGTERM until SIGKILL; ten at most if a process has failed.
      run_dir: where to keep the state for `launch.status`; None for nowhere.
      lock: a file that one supervisor holds at a time: an earlier one is told to stop, and waited for; None for none.
    """

    command: Sequence[str]
    processes: int = 1
    devices: int = 0
    logs: Path = Path("logs")
    max_restarts: int = 0
    restart_wait_seconds: float = 0.0
    notice_seconds: float = 120.0
    run_dir: str | None = None
    lock: Path | None = None

    def run(self) -> int:
        """The exit status of the last attempt: 0, 2, 75 if told to stop, or that of the first process to fail."""
        self.logs.mkdir(parents=True, exist_ok=True)
        _say(f"launch: logs in {self.logs}")
        failures = 0
        with _Stop() as stop, _alone(self.lock):
            while True:
                self._record(None)
                status = self._attempt(stop)
                self._record(status)
                failures += status not in (0, EXIT_PREEMPTED)
                if status in (0, EXIT_USER_ERROR) or stop.given or failures > self.max_restarts:
                    _say(f"launch: ended with status {status}")
                    return status
                counted = "" if status == EXIT_PREEMPTED else f" (failure {failures} of {self.max_restarts} allowed)"
                _say(f"launch: status {status}{counted}; starting again")
                stop.wait(self.restart_wait_seconds)

    def _record(self, status: int | None) -> None:
        if self.run_dir is not None:
            record(self.run_dir, status)

    def _attempt(self, stop: "_Stop") -> int:
        """Starts all processes and waits until all have ended; the first that fails ends the others."""
        if stop.given:
            return EXIT_PREEMPTED
        address = f"127.0.0.1:{_free_port()}"
        running = [self._start(index, address) for index in range(self.processes)]
        while True:
            statuses = [process.poll() for process in running]
            failed = [status for status in statuses if status]
            if failed or stop.given or None not in statuses:
                break
            time.sleep(_POLL_SECONDS)
        # Without a process that was lost the others cannot save; if all were told to stop they are about to.
        told = stop.given or EXIT_PREEMPTED in failed
        _end(running, self.notice_seconds if told else min(self.notice_seconds, _AFTER_FAILURE_SECONDS))
        # A crash may be slower to end than a peer that noticed it; but what our own signals do says nothing.
        ended = [process.returncode for process in running]
        statuses = failed + [status for status in ended if status not in _OUR_SIGNALS] or ended
        status = max((_shell_status(status) for status in statuses), key=_gravity)
        if status not in (0, EXIT_PREEMPTED):
            self._show_log(next(i for i, code in enumerate(ended) if _shell_status(code) == status))
        return status

    def _show_log(self, index: int) -> None:
        """Why a process has failed: the machine with its log may be gone when somebody asks."""
        path = self.logs / f"process-{index}.txt"
        with open(path, "rb") as log:
            log.seek(max(os.path.getsize(path) - _SHOWN_BYTES, 0))
            lines = log.read().decode(errors="replace").splitlines()
        _say("\n".join([f"launch: the last lines of {path}:", *lines[-_SHOWN_LINES:]]))

    def _start(self, index: int, address: str) -> subprocess.Popen:
        with open(self.logs / f"process-{index}.txt", "ab") as log:
            # A session of its own, so that Ctrl-C at the terminal reaches it once, as the SIGTERM that we hand on.
            return subprocess.Popen(
                self.command,
                env={**os.environ, **self._environment(index, address)},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _environment(self, index: int, address: str) -> dict[str, str]:
        variables = {}
        if self.devices:
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={self.devices}"
            variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
        elif self.processes > 1:
            variables["JAX_LOCAL_DEVICE_IDS"] = str(index)
        if self.processes > 1:
            variables["JAX_COORDINATOR_ADDRESS"] = address
            variables["JAX_NUM_PROCESSES"] = str(self.processes)
            variables["JAX_PROCESS_ID"] = str(index)
        return variables


def _end(running: Sequence[subprocess.Popen], notice_seconds: float) -> None:
    """Tells those that still run to stop, and kills what is left when the notice is over."""
    for process in running:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + notice_seconds
    for process in running:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class _Stop:
    """Whether SIGTERM or SIGINT came."""

    def __enter__(self) -> "_Stop":
        self.given = False
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, *_: object) -> None:
        self.given = True

    def wait(self, seconds: float) -> None:
        """Sleeps, but not after a signal."""
        deadline = time.monotonic() + seconds
        while not self.given and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _alone(lock: Path | None) -> Iterator[None]:
    """Holds the lock, which has the number of the process that holds it."""
    if lock is None:
        yield
        return
    with open(lock, "a+", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                if holder := file.read():
                    with contextlib.suppress(ProcessLookupError):  # it has just ended
                        os.kill(int(holder), signal.SIGTERM)
                time.sleep(_POLL_SECONDS)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _say(text: str) -> None:
    """Prints, or not: on a TPU host nobody may listen any more, and the run goes on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes there


def _shell_status(status: int) -> int:
    """As a shell has it: 128 + the signal's number for a process that a signal has ended."""
    return status if status >= 0 else 128 - status


def _gravity(status: int) -> int:
    """A user's error says most; a process that was lost says more than its peers, who noticed that it was."""
    return {0: 0, EXIT_PREEMPTED: 1, EXIT_USER_ERROR: 3}.get(status, 2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Parses flags and supervises."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m launch.supervise", allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=1, help="how many")
    parser.add_argument("--devices", type=int, default=0, help="virtual CPU devices of each; 0 for accelerators")
    parser.add_argument("--logs", type=Path, required=True, help="folder of the processes' logs")
    parser.add_argument("--max_restarts", type=int, default=0, help="after failures")
    parser.add_argument("--restart_wait_seconds", type=float, default=0.0, help="between an end and the next start")
    parser.add_argument("--notice_seconds", type=float, default=120.0, help="from SIGTERM until SIGKILL")
    parser.add_argument("--run_dir", help="where to keep the state for launch.status")
    parser.add_argument("--lock", type=Path, help="an earlier supervisor with the same file is told to stop")
    if "--" not in arguments:
        parser.error("the command to run stands after --")
    split = arguments.index("--")
    return Supervisor(command=arguments[split + 1 :], **vars(parser.parse_args(arguments[:split]))).run()


if __name__ == "__main__":
    sys.exit(main())
