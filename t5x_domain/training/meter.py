"""What a logged step says: losses by corpus and denoiser, text seen, tokens per second."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from t5x_domain.data.tasks import Component
from t5x_domain.objectives.losses import ratios
from t5x_domain.training.feed import Feed
from t5x_domain.training.run import Run


class Meter:
    """Tokens per second, and the numbers of a logged step."""

    def __init__(self, run: Run, feed: Feed, schedule: optax.Schedule, last_logged: int, start: int) -> None:
        """Counts time from `restart`, and text from the last logged step before `start` on, as if never interrupted."""
        self._run, self._feed, self._schedule = run, feed, schedule
        self._raw_tokens: dict[str, dict[str, int]] = {}
        for step in range(last_logged, start):
            self._add(step + 1, feed.batches.raw_tokens(step))
        self.seconds_per_step = 0.0
        self.restart()

    def restart(self) -> None:
        """Starts the clock anew, after something that is no training."""
        self._clock, self._tokens, self._steps = time.perf_counter(), 0, 0

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
        values = jax.device_get(metrics)
        seconds = time.perf_counter() - self._clock
        self.seconds_per_step = seconds / max(self._steps, 1)
        rate = self._tokens * self._feed.num_shares / seconds
        self.restart()
        weight = max(float(values["weight"]), 1.0)
        raw_tokens, self._raw_tokens = _over_hosts(self._raw_tokens, self._feed.num_shares), {}
        return {
            "loss": float(values["loss"]),
            "accuracy": float(values["correct"]) / weight,
            "learning_rate": float(self._schedule(step - 1)),
            "grad_norm": float(values["grad_norm"]),
            "tokens_per_second": rate,
            "skipped": int(values["skipped"]),
            "corpus_loss": self._losses(values, lambda component: component.corpus.name),
            "denoiser_loss": self._losses(values, lambda component: component.objective.name),
            "raw_tokens": raw_tokens,
            **ratios(values),
        }

    def _losses(self, values: Mapping[str, np.ndarray], of: Callable[[Component], str]) -> dict[str, float | None]:
        """Loss by target of the components that `of` gives the same name; None for those without targets."""
        sums: dict[str, np.ndarray] = {}
        for component, *pair in zip(
            self._feed.components, values["component_nll"], values["component_weight"], strict=True
        ):
            sums[of(component)] = sums.get(of(component), 0) + np.array(pair, np.float64)
        return {name: float(nll / weight) if weight else None for name, (nll, weight) in sums.items()}


def _over_hosts(counts: dict[str, dict[str, int]], num_shares: int) -> dict[str, dict[str, int]]:
    """Sums over the shares of a batch, of which as many processes read each; all have the same names in order."""
    if jax.process_count() == 1:
        return counts
    from jax.experimental.multihost_utils import process_allgather

    leaves, tree = jax.tree.flatten(counts)
    sums = process_allgather(np.array(leaves)).sum(axis=0)
    return jax.tree.unflatten(tree, (sums * num_shares // jax.process_count()).tolist())
