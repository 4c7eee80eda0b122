"""What a launch does: files it writes, commands it runs. `--dry_run` shows the same plan that is carried out."""

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from t5x_domain.errors import UserError
from t5x_domain.files import write_atomically


@dataclasses.dataclass(frozen=True)
class Plan:
    """Files by path with their text, then commands; neither depends on another.

    `advice` is what to do when a command has failed.
    """

    files: Mapping[str, str]
    commands: Sequence[Sequence[str]]
    advice: str = ""

    def show(self) -> str:
        """Exactly what `carry_out` does, in words that a shell understands."""
        written = [f"# {path}\n{text}" for path, text in self.files.items()]
        return "\n".join([*written, *(shlex.join(command) for command in self.commands)])

    def carry_out(self) -> int:
        """Writes the files, for this user alone, and runs the commands one after the other.

        Returns:
          The first exit status that is not 0, or 0. A SIGTERM or SIGINT is handed on to the command under way and is
          the last word: nothing is run after it.

        Raises:
          UserError: a program is not installed, or a file cannot be written.
        """
        for path, text in self.files.items():
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                with _for_this_user_alone():  # config.env may hold keys
                    write_atomically(Path(path), text.encode())
            except OSError as error:
                raise UserError(f"config.logs: {path} cannot be written: {error.strerror}.") from error
        statuses = [0]
        with _HandOn() as signals:
            for command in self.commands:
                if not signals.given:
                    statuses.append(signals.run(command))
                    if statuses[-1] and self.advice and not signals.given:
                        said = f"launch: {shlex.join(command[:4])} ended with status {statuses[-1]}. {self.advice}"
                        print(said, file=sys.stderr)
        return next((status for status in statuses if status), 0)


@contextlib.contextmanager
def _for_this_user_alone() -> Iterator[None]:
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


class _HandOn:
    """Hands SIGTERM and SIGINT on to the command under way."""

    def __enter__(self) -> "_HandOn":
        self.given = False
        self._process: subprocess.Popen | None = None
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, *_: int | FrameType | None) -> None:
        self.given = True
        if self._process is not None and self._process.poll() is None:
            self._end()

    def _end(self) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        os.killpg(self._process.pid, signal.SIGCONT)  # one that is stopped would not hear of it

    def run(self, command: Sequence[str]) -> int:
        """The command's exit status, as a shell has it."""
        try:
            # In a group of its own, which is told as a whole: a script has programs under way itself. And without a
            # terminal: one that has a question fails, where it would be stopped for ever.
            self._process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
        except FileNotFoundError as error:
            raise UserError(
                f"{command[0]} is not installed on this machine: launch where it is, or look with --dry_run."
            ) from error
        if self.given:
            self._end()
        status = self._process.wait()
        return status if status >= 0 else 128 - status
