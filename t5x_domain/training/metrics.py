"""What a person and a later program see of a run: metrics.jsonl, TensorBoard and wandb, a progress bar."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath
from tqdm import tqdm

from t5x_domain.errors import UserError
from t5x_domain.files import Growing
from t5x_domain.training.tensorboard import TensorBoard
from t5x_domain.training.weights_and_biases import WeightsAndBiases

_PUBLISH_SECONDS = 60.0  # between uploads of the files of a run in a bucket


class JsonLines:
    """A file of JSON objects, one a line, each with a `step`; whole lines only, whatever interrupts the writer."""

    def __init__(self, path: Path, keep_until: int, before: epath.Path | None = None) -> None:
        """Opens `path` to append, after dropping lines of steps beyond `keep_until` and a torn last line.

        A run that goes on from a checkpoint repeats the steps since then, so what was written of them goes.
        The lines so far are those of `before`, if it is given.

        Raises:
          UserError: it cannot be written; so do all methods.
        """
        self._path = path
        kept = [line for line in read_json_lines(before or path) if line["step"] <= keep_until]
        temporary = path.with_suffix(".partial")
        with explained(path):
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(temporary, path)
            self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one object and flushes it."""
        with explained(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with explained(self._path):
            self._file.close()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Around what writes a file of the run directory. Raises UserError if the disk is full, or fails."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; make room, or see that it can be written, then start the same command again: "
            "it goes on from the last checkpoint."
        ) from error


def read_json_lines(path: Path | epath.Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may end in the middle of one; [] if there is no file."""
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


class MetricsWriter:
    """Writes each logged step to metrics.jsonl, each evaluation to evaluations.jsonl, and both to TensorBoard.

    What TensorBoard gets, `wandb` gets as well, if there is one.

    In a bucket, whose objects cannot grow, these files are replaced by longer ones at each evaluation, before each
    checkpoint (`publish`), and once a minute between. A process that is lost loses the lines since then; the steps
    since the last checkpoint are repeated in any case.
    """

    def __init__(
        self, records: Growing, start_step: int, *, begins: bool, wandb: WeightsAndBiases | None = None
    ) -> None:
        """Continues the files of a run directory's run that goes on from `start_step`, or begins there.

        `last_logged` is the last step of metrics.jsonl, or that at which the run began.
        """
        self._records, self._published = records, time.monotonic()
        local, home = records.local, records.home
        self._metrics = JsonLines(local / "metrics.jsonl", start_step, home / "metrics.jsonl")
        # The evaluation of a checkpoint's step was written before it was saved, hence stays; that with which the run
        # began, which no checkpoint has, is made again.
        self._evaluations = JsonLines(local / "evaluations.jsonl", start_step - begins, home / "evaluations.jsonl")
        written = read_json_lines(local / "metrics.jsonl") or read_json_lines(local / "evaluations.jsonl")[:1]
        self.last_logged = written[-1]["step"] if written else start_step
        with explained(local / "tensorboard"):
            self._tensorboard = TensorBoard(local / "tensorboard", purge_step=start_step + 1)
        self._wandb = wandb

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One training step: numbers, or one level of {corpus: number}."""
        self._metrics.write({"step": step, **metrics})
        self.show("train", step, metrics)
        if time.monotonic() - self._published > _PUBLISH_SECONDS:
            self.publish()

    def evaluated(self, step: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Held-out scores of each corpus."""
        self._evaluations.write({"step": step, "corpora": scores})
        for corpus, values in scores.items():
            self.show(f"held_out/{corpus}", step, values)
        self.publish()

    def publish(self) -> None:
        """Brings what was written to where others see it: a checkpoint must not know more than its run's files."""
        with explained(self._records.local / "tensorboard"):
            self._tensorboard.flush()
        self._records.publish()
        self._published = time.monotonic()

    def show(self, prefix: str, step: int, values: Mapping[str, Any]) -> None:
        """Numbers, or nested {name: number}, for TensorBoard and wandb alone."""
        scalars = dict(_flat(prefix, values))
        with explained(self._records.local / "tensorboard"):
            self._tensorboard.log(step, scalars)
        if self._wandb is not None:
            self._wandb.log(step, scalars)

    def close(self) -> None:
        """Closes all files."""
        self._metrics.close()
        self._evaluations.close()
        with explained(self._records.local / "tensorboard"):
            self._tensorboard.close()
        self._records.publish()


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """("prefix/name/name", number) of all that are numbers."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}/{name}", value)
        elif value is not None:
            yield f"{prefix}/{name}", value


class Silent:
    """In place of `MetricsWriter` and `Progress` in processes that do not write: takes every call and does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Every method."""
        return lambda *args, **kwargs: None


class Progress:
    """A bar with loss, tokens/s and time left on a terminal; a plain line for each logged step elsewhere."""

    def __init__(self, start: int, total: int) -> None:
        """Steps run from `start` to `total`."""
        self._total, self._start = total, start
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if sys.stdout.isatty() else None

    def step(self) -> None:
        """One more step is under way."""
        if self._bar is not None:
            self._bar.update()

    def logged(self, step: int, metrics: Mapping[str, Any], seconds_per_step: float) -> None:
        """Shows a logged step."""
        shown = f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tokens/s"
        if metrics["mfu"] is not None:
            shown += f"  MFU {metrics['mfu']:.1%}"
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
        else:
            print(
                f"step {step:,}/{self._total:,}  {shown}  {_clock((self._total - step) * seconds_per_step)} left",
                flush=True,
            )

    def say(self, text: str) -> None:
        """A line that does not disturb the bar."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
