"""All that observes a run while it trains, and changes nothing of what it computes."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax

from t5x_domain.evaluation.perplexity import headline
from t5x_domain.files import Growing
from t5x_domain.parallel.processes import first_does, is_first
from t5x_domain.training.feed import Feed
from t5x_domain.training.goodput import Ledger
from t5x_domain.training.meter import Meter
from t5x_domain.training.metrics import MetricsWriter, Progress, Silent
from t5x_domain.training.profiling import Profiler, TraceRequest
from t5x_domain.training.run import Run
from t5x_domain.training.step_clock import StepClock
from t5x_domain.training.stragglers import Stragglers
from t5x_domain.training.weights_and_biases import WeightsAndBiases

Numbered = tuple[int, Mapping[str, np.ndarray], Mapping[str, int]]  # step, batch, raw tokens by component


class Watch:
    """Metrics, console, goodput, step times of all processes and profiles; the loop tells it what happens, in order.

    Of several processes the first one writes what is written once.
    """

    def __init__(
        self,
        run: Run,
        feed: Feed,
        schedule: optax.Schedule,
        records: Growing,
        ledger: Ledger,
        trace_request: TraceRequest,
        start: int,
        *,
        begins: bool,
    ) -> None:
        """Watches from step `start` on, at which the run begins or goes on; `records` is its directory."""
        self._run, self._feed, self._ledger, self._start = run, feed, ledger, start
        ledger.open(records, start, run.total_steps)
        with contextlib.ExitStack() as opened:  # what is open is closed, too, should the rest fail to open

            def opens[T](made: T) -> T:
                return opened.enter_context(contextlib.closing(made))

            wandb = None
            if run.wandb_project is not None and is_first():
                wandb = opens(WeightsAndBiases(run.wandb_project, records, run.identity(feed.batches.starts)))
            self._writer = opens(MetricsWriter(records, start, begins=begins, wandb=wandb) if is_first() else Silent())
            self._progress = opens(Progress(start, run.total_steps) if is_first() else Silent())
            self.say = self._progress.say
            self._stragglers = opens(Stragglers(records, start, self.say))
            self._step_clock = opens(StepClock(ledger))
            profiles = records.local / "profile"
            self._profiler = opens(Profiler(profiles, run.profile_steps, trace_request, self._step_clock, self.say))
            last_logged = first_does(lambda: self._writer.last_logged)
            self._meter = Meter(run, feed, schedule, last_logged, start, ledger=ledger, step_clock=self._step_clock)
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Closes what is open, the last first. The run has then only to wait until its checkpoint is whole."""
        self._ledger.enter("checkpoint")
        self._opened.close()

    def batches(self, batches: Iterable[Numbered]) -> Iterator[Numbered]:
        """The same batches; a phase that begins is announced."""
        self._ledger.enter("step")
        phases = self._feed.batches
        for step, batch, raw_tokens in self._stragglers.of_data(self._step_clock.timed(batches)):
            if len(self._run.phases) > 1 and (step - 1 in phases.starts or step == self._start + 1):
                self.say(f"step {step:,}: {phases.names[phases.phase_of(step - 1)]}")
            yield step, batch, raw_tokens

    def update[S](
        self, step: int, train_step: Callable[[S, Any], tuple[S, Any]], state: S, batch: Any
    ) -> tuple[S, Any]:
        """What `train_step` returns for state and batch, which is on its way then."""
        with self._profiler.update(step):
            state, metrics = train_step(state, batch)
            self._step_clock.dispatched(metrics)
        return state, metrics

    def waiting_for_device(self) -> contextlib.AbstractContextManager[None]:
        """Around what waits for an update."""
        return self._stragglers.waiting_for_device()

    def updated(self, step: int, batch: Mapping[str, np.ndarray], raw_tokens: Mapping[str, int]) -> None:
        """The host has done what there is to do for a step."""
        self._meter.count(step, batch, raw_tokens)
        self._progress.step()
        self._stragglers.step()
        if step == self._start + 1:
            self._step_clock.settle()
            self.say(self._ledger.first_step(step))

    def log(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Writes and shows a step's line; waits until the device has done it."""
        self._stragglers.report(step)
        line = self._meter.read(step, metrics)
        self._writer.log(step, line)
        self._writer.show("goodput", step, self._ledger.record(step))
        self._progress.logged(step, line, self._meter.seconds_per_step)

    def evaluated(self, step: int, find: Callable[[], Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
        """Writes and shows the held-out scores that `find` returns; their mean "loss"."""
        with self._step_clock.pause("evaluation"):
            scores = find()
            self._writer.evaluated(step, scores)
        headlines = {corpus: headline(score) for corpus, score in scores.items()}
        measure = next(name for name, _ in headlines.values())
        shown = "  ".join(f"{corpus} {value}" for corpus, (_, value) in headlines.items())
        self.say(f"step {step:,}/{self._run.total_steps:,}  held-out {measure}  {shown}")
        return {"loss": float(np.mean([score["loss"] for score in scores.values()]))}

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Around the saving of a checkpoint, which must not know more than the run's files."""
        with self._step_clock.pause("checkpoint"):
            self._writer.publish()
            self._ledger.record(step)
            yield
