"""How likely given texts are under a model: their log-probabilities, and the choice among answers by them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5x_domain.data import packing
from t5x_domain.errors import UserError
from t5x_domain.inference.generator import row_length
from t5x_domain.inference.opened import Opened
from t5x_domain.objectives.losses import token_scores
from t5x_domain.parallel.sharding import batch_sharding, use_mesh
from t5x_domain.training.feed import LAYOUTS


class Scorer:
    """Scores targets given inputs; compiles once for each of few shapes."""

    def __init__(self, model: Opened, *, batch_size: int = 8) -> None:
        """Compiles nothing yet.

        Raises:
          UserError: the model has no decoder.
        """
        if model.blueprint.model_class not in LAYOUTS:
            raise UserError(
                f"{model.origin}: {model.blueprint.model_class.__name__} has no decoder to score text with."
            )
        self._model, self._batch_size = model, batch_size
        self._layout = LAYOUTS[model.blueprint.model_class]
        whole = NamedSharding(model.blueprint.mesh, PartitionSpec())
        self._nll = jax.jit(self._batch_nll, in_shardings=(model.blueprint.shardings, None), out_shardings=whole)

    def __call__(self, inputs: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> np.ndarray:
        """(log-probability in nats, tokens) of each target given its input, [n, 2] float64.

        Args:
          inputs: ids as `Opened.inputs` makes them, int32 [n] each.
          targets: ids as `Opened.targets` makes them, int32 [t] each.

        Raises:
          UserError: a target is empty.
        """
        if any(not len(target) for target in targets):
            raise UserError("a target to score has no token; close it by EOS.")
        scores = np.zeros((len(inputs), 2))
        order = sorted(range(len(inputs)), key=lambda i: (len(inputs[i]), len(targets[i])))
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            batch = self._batch([inputs[i] for i in chosen], [targets[i] for i in chosen])
            nll = np.asarray(self._nll(self._model.params, batch))
            scores[chosen, 0] = -nll[: len(chosen)]
            scores[chosen, 1] = [len(targets[i]) for i in chosen]
        return scores

    def choose(self, inputs: Sequence[np.ndarray], choices: Sequence[str], *, normalize: bool = True) -> np.ndarray:
        """Scores of every choice as the answer to every input (rank classification: Brown et al. 2020, section 2.4).

        Args:
          inputs: ids as `Opened.inputs` makes them.
          choices: answers.
          normalize: log-probability by token instead of in all, so that long answers are not at a disadvantage.

        Returns:
          [len(inputs), len(choices)] float64, nats.
        """
        answers = [self._model.targets(choice) for choice in choices]
        scores = self([i for i in inputs for _ in answers], answers * len(inputs))
        scores = scores[:, 0] / (scores[:, 1] if normalize else 1.0)
        return scores.reshape(len(inputs), len(choices))

    def _batch(self, inputs: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> dict[str, jax.Array]:
        lengths = {"inputs": row_length(inputs), "targets": row_length(targets)}
        if self._model.reads_whole_inputs:
            rows = [[packing.Example(i, t, 0)] for i, t in zip(inputs, targets, strict=True)]
        else:  # a causal model reads them as what stands before
            nothing = np.zeros(0, np.int32)
            rows = [[packing.Example(nothing, t, 0, i)] for i, t in zip(inputs, targets, strict=True)]
        rows += [[]] * (self._batch_size - len(rows))
        batch = self._layout.batch(rows, lengths)
        places = batch_sharding(self._model.blueprint.mesh, batch)
        return {name: jax.device_put(value, places[name]) for name, value in batch.items()}

    def _batch_nll(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        """Negative log-probability of the targets of each row, [B] float32."""
        blueprint = self._model.blueprint
        with use_mesh(blueprint.mesh):
            scores = token_scores(blueprint.merge(params), batch)[1]
        return (scores.nll * batch["decoder_loss_weights"]).sum(axis=-1)


def score_targets(
    model: Opened, inputs: Sequence[np.ndarray], targets: Sequence[np.ndarray], *, batch_size: int = 8
) -> np.ndarray:
    """`Scorer` for one call: (log-probability in nats, tokens) of each target given its input, [n, 2] float64."""
    return Scorer(model, batch_size=batch_size)(inputs, targets)


def choose(
    model: Opened,
    inputs: Sequence[np.ndarray],
    choices: Sequence[str],
    *,
    batch_size: int = 8,
    normalize: bool = True,
) -> np.ndarray:
    """`Scorer.choose` for one call."""
    return Scorer(model, batch_size=batch_size).choose(inputs, choices, normalize=normalize)
