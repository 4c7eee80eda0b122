"""Held-out perplexity and bits per byte, by corpus."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

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
      `loss` (nats per target), `perplexity` (its exponential), `bits_per_byte` (of the text that the targets stand
      for, at the corpus's average bytes per token), `accuracy` (share of targets with the largest logit), `targets`,
      and the loss's own ratios.

    Raises:
      UserError: there is no target.
    """
    # Launch everything before reading anything, so that the device never waits for the host.
    results = jax.device_get([eval_step(params, batch) for batch in batches])
    add = lambda *values: np.sum(values, axis=0, dtype=np.float64)  # noqa: E731
    sums = jax.tree.map(add, *results) if results else {"weight": 0}
    if sums["weight"] == 0:
        raise UserError("the held-out batches have no target to score; set Run.eval_split to a split with documents.")
    loss = float(sums["nll"] / sums["weight"])
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "accuracy": float(sums["correct"] / sums["weight"]),
        "targets": int(sums["weight"]),
        **ratios(sums),
    }
