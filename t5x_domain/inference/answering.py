"""Answers in text to a labelled task: chosen among its labels if it is a classification, else written."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from t5x_domain.inference.decoding import Decoding
from t5x_domain.inference.generator import Generator
from t5x_domain.inference.opened import Opened
from t5x_domain.inference.scoring import Scorer


class Answerer:
    """Asks one model, whatever the task; what is compiled for it is kept."""

    def __init__(self, model: Opened, decoding: Decoding, *, batch_size: int = 8) -> None:
        """Compiles nothing yet."""
        self.model, self._decoding, self._batch_size = model, decoding, batch_size

    @functools.cached_property
    def scorer(self) -> Scorer:
        """Scores of given targets. Raises UserError if the model has no decoder."""
        return Scorer(self.model, batch_size=self._batch_size)

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator(self.model, self._decoding, batch_size=self._batch_size)

    def __call__(self, task: Any, inputs: Sequence[np.ndarray], *, params: Any = None) -> list[str]:
        """An answer to each input.

        Args:
          task: a `data.labelled.Task`. For a classification it is the label of the largest log-probability by token.
          inputs: ids as `Opened.inputs` makes them, int32 [n] each.
          params: instead of the model's own, in its shapes.

        Raises:
          UserError: the model has no decoder.
        """
        if task.kind == "classification":
            likeliest = self.scorer.choose(inputs, task.labels, params=params).argmax(axis=1)
            return [task.labels[best] for best in likeliest]
        return [best.text for best, *_ in self._generator(inputs, params=params)]
