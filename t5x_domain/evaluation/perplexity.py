"""Held-out scores by corpus: perplexity and bits per byte of predicted tokens, the loss of anything else."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from t5x_domain.errors import UserError
from t5x_domain.objectives.losses import ratios


def held_out_scores(
    eval_step: Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]],
    params: Any,
    batches: Iterable[Mapping[str, jax.Array]],
    *,
    bytes_per_token: float,
) -> dict[str, float]:
    """Scores of the targets that the objective asks for in held-out text.

    Args:
      eval_step: from `training.step.make_eval_step`.
      params: nested dict of parameters.
      batches: features of one corpus, on the mesh.
      bytes_per_token: UTF-8 bytes of the corpus by its tokens.

    Returns:
      `loss` (nats per target), `accuracy` (share of targets that are right), `targets`, and the loss's own ratios. Of
      a loss that predicts tokens, which reports `nll`, also `perplexity` (the loss's exponential) and `bits_per_byte`
      (of the text that the targets stand for, at the corpus's average bytes per token); one that makes binary decisions
      reports `binary_nll`, whose exponential says nothing about text.

    Raises:
      UserError: there is no target.
    """
    # Launch everything before reading anything, so that the device never waits for the host.
    results = jax.device_get([eval_step(params, batch) for batch in batches])
    add = lambda *values: np.sum(values, axis=0, dtype=np.float64)  # noqa: E731
    sums = jax.tree.map(add, *results) if results else {"weight": 0}
    if sums["weight"] == 0:
        raise UserError("the held-out batches have no target to score; set Run.eval_split to a split with documents.")
    of_tokens = "nll" in sums
    loss = float(sums["nll" if of_tokens else "binary_nll"] / sums["weight"])
    scores = {"loss": loss, "accuracy": float(sums["correct"] / sums["weight"]), "targets": int(sums["weight"])}
    if of_tokens:
        scores |= {"perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": loss / math.log(2) / bytes_per_token}
    return scores | ratios(sums)


class Measure(NamedTuple):
    """A figure among held-out scores: its key, its name, and how it is written."""

    key: str
    name: str
    form: str


PERPLEXITY = Measure("perplexity", "perplexity", ".2f")
BITS_PER_BYTE = Measure("bits_per_byte", "bits per byte", ".3f")
BINARY = Measure("loss", "binary cross-entropy", ".4f")


def measures(scores: Mapping[str, float]) -> list[Measure]:
    """What `held_out_scores` has to say of text, the headline first."""
    return [PERPLEXITY, BITS_PER_BYTE] if PERPLEXITY.key in scores else [BINARY]


def headline(scores: Mapping[str, float]) -> tuple[str, str]:
    """Name and value of what to show of a corpus's scores if there is room for one."""
    measure = measures(scores)[0]
    return measure.name, format(scores[measure.key], measure.form)
