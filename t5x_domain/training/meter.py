"""What a logged step says: losses by corpus and denoiser, text seen, how fast it went, memory."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from t5x_domain.data.tasks import Component
from t5x_domain.models.flops import train_step_flops
from t5x_domain.objectives.losses import ratios
from t5x_domain.parallel.chips import chip_of
from t5x_domain.training.feed import Feed
from t5x_domain.training.goodput import Ledger
from t5x_domain.training.run import Run
from t5x_domain.training.step_clock import StepClock

# What a line of metrics.jsonl says of the machine and the clock; all else is the same however often a run is resumed.
MACHINE_KEYS = ("tokens_per_second", "mfu", "step_seconds", "memory")


class Meter:
    """The numbers of a logged step.

    Besides losses and the text seen:
      tokens_per_second: padding left out, over all devices; in the seconds of updates and of waits for data since the
        last logged step, without compilation, evaluation and saving, which the ledger has.
      mfu: model FLOPs, without recomputation, in the same seconds against what the chips can do in bfloat16 (model
        FLOPs utilisation: Chowdhery et al. 2022, PaLM, appendix B); None where the chip is not known.
      step_seconds: p50, p90 and max on this process's devices, see `StepClock`.
      memory: bytes; device_peak, the largest of this process's devices since the start (None if they do not tell), and
        host, resident now, this process without its data workers.
    """

    def __init__(
        self,
        run: Run,
        feed: Feed,
        schedule: optax.Schedule,
        last_logged: int,
        start: int,
        *,
        ledger: Ledger,
        step_clock: StepClock,
    ) -> None:
        """Counts time from now on, and text from the last logged step before `start`, as if never interrupted."""
        self._run, self._feed, self._schedule = run, feed, schedule
        self._ledger, self._step_clock = ledger, step_clock
        self._step_flops = train_step_flops(run.model, run.config, run.batch_size, run.lengths)
        self._raw_tokens: dict[str, dict[str, int]] = {}
        for step in range(last_logged, start):
            self._add(step + 1, feed.batches.raw_tokens(step))
        self.seconds_per_step = 0.0
        self._tokens, self._steps, self._seconds_before = 0, 0, self._training_seconds()

    def _add(self, step: int, raw_tokens: Mapping[str, int]) -> None:
        phase = self._raw_tokens.setdefault(self._feed.batches.names[self._feed.batches.phase_of(step - 1)], {})
        for component, tokens in raw_tokens.items():
            phase[component] = phase.get(component, 0) + tokens

    def count(self, step: int, batch: Mapping[str, np.ndarray], raw_tokens: Mapping[str, int]) -> None:
        """Adds a batch's tokens, padding left out, and the raw tokens of its components."""
        self._add(step, raw_tokens)
        self._tokens += sum(np.count_nonzero(ids) for name, ids in batch.items() if name.endswith("segment_ids"))
        self._steps += 1

    def read(self, step: int, metrics: Mapping[str, jax.Array]) -> dict[str, Any]:
        """The line of metrics.jsonl for this step; waits until the device has done it."""
        values, step_seconds = jax.device_get(metrics), self._step_clock.percentiles()
        rate, mfu = self._rate()
        weight = max(float(values["weight"]), 1.0)
        raw_tokens, self._raw_tokens = _over_hosts(self._raw_tokens, self._feed.num_shares), {}
        return {
            "loss": float(values["loss"]),
            "accuracy": float(values["correct"]) / weight,
            "learning_rate": float(self._schedule(step - 1)),
            "grad_norm": float(values["grad_norm"]),
            "tokens_per_second": rate,
            "mfu": mfu,
            "step_seconds": step_seconds,
            "memory": {"device_peak": device_peak_bytes(), "host": resident_bytes()},
            "skipped": int(values["skipped"]),
            "corpus_loss": self._losses(values, lambda component: component.corpus.name),
            "denoiser_loss": self._losses(values, lambda component: component.objective.name),
            "raw_tokens": raw_tokens,
            **ratios(values),
        }

    def _training_seconds(self) -> float:
        seconds = self._ledger.seconds()
        return seconds["step"] + seconds["data_wait"]

    def _rate(self) -> tuple[float, float | None]:
        """Tokens per second and model FLOPs utilisation since the last call."""
        now = self._training_seconds()
        seconds, steps = now - self._seconds_before, self._steps
        tokens = self._tokens * self._feed.num_shares
        self.seconds_per_step = seconds / steps
        self._tokens, self._steps, self._seconds_before = 0, 0, now
        chip = chip_of(jax.devices()[0])
        peak = jax.device_count() * chip.flops if chip else None
        return tokens / seconds, peak and self._step_flops / self.seconds_per_step / peak

    def _losses(self, values: Mapping[str, np.ndarray], of: Callable[[Component], str]) -> dict[str, float | None]:
        """Loss by target of the components that `of` gives the same name; None for those without targets."""
        sums: dict[str, np.ndarray] = {}
        for component, *pair in zip(
            self._feed.components, values["component_nll"], values["component_weight"], strict=True
        ):
            sums[of(component)] = sums.get(of(component), 0) + np.array(pair, np.float64)
        return {name: float(nll / weight) if weight else None for name, (nll, weight) in sums.items()}


def device_peak_bytes() -> int | None:
    """The most memory that any of this process's devices has held; None if they do not tell."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max(each["peak_bytes_in_use"] for each in stats) if all(stats) else None


def resident_bytes() -> int | None:
    """Memory of this process in the machine; None where the system has no /proc."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None


def _over_hosts(counts: dict[str, dict[str, int]], num_shares: int) -> dict[str, dict[str, int]]:
    """Sums over the shares of a batch, of which as many processes read each; all have the same names in order."""
    if jax.process_count() == 1:
        return counts
    from jax.experimental.multihost_utils import process_allgather

    leaves, tree = jax.tree.flatten(counts)
    halves = np.array(leaves, np.int64).view(np.int32)  # JAX would make int32 of int64
    sums = np.ascontiguousarray(process_allgather(halves)).view(np.int64).sum(axis=0)
    return jax.tree.unflatten(tree, (sums * num_shares // jax.process_count()).tolist())
