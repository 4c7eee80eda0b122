"""What every objective's host half has in common: raw tokens in, `inputs` and `targets` out, with lengths known ahead.

An objective is a frozen value without state: the same tokens and the same random generator give the same example, so an
example is a function of where it stands in the corpus and of the run's seed, and of nothing else.
"""

import abc
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from t5x_domain.data.vocabulary import Vocabulary
from t5x_domain.errors import UserError


class Objective(abc.ABC):
    """Turns raw token ids into one example. Subclasses are frozen, gin-configurable dataclasses.

    Lengths below count tokens and include the EOS that closes `inputs` and `targets`.

    Attributes:
      target_side: where the targets are predicted: "decoder", which writes them after the inputs, or "encoder", in the
        places of the inputs.
    """

    name: str
    target_side: ClassVar[str] = "decoder"

    @abc.abstractmethod
    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
        """{'inputs': int32 [i], 'targets': int32 [t]}, each closed by EOS, from int32 `tokens` [n], n >= 1.

        On the encoder's side i = t, and {'chosen': bool [t]} says which targets are to be predicted.
        """

    @abc.abstractmethod
    def lengths(self, num_raw: int) -> tuple[int, int]:
        """Longest (inputs, targets) that `num_raw` raw tokens give; exact unless `random_lengths`."""

    @property
    def random_lengths(self) -> bool:
        """Whether lengths depend on the random generator, not on the number of raw tokens alone."""
        return False

    def drawn_lengths(self, num_raw: int, rng: np.random.Generator) -> tuple[int, int]:
        """(inputs, targets) of the example that `num_raw` raw tokens and a generator in this state give."""
        return self.lengths(num_raw)

    def mean_lengths(self, num_raw: int) -> tuple[float, float]:
        """Expected (inputs, targets) of `num_raw` raw tokens."""
        return self.lengths(num_raw)

    @abc.abstractmethod
    def raw_length(self, lengths: Mapping[str, int]) -> int:
        """Raw tokens whose example fills `lengths` ({'inputs': …, 'targets': …}) and never overruns `inputs`."""

    def joined_length(self, num_raw: int) -> int:
        """Exact length of inputs and targets together, for decoder-only models."""
        return sum(self.lengths(num_raw))

    def sentinels_needed(self, num_raw: int) -> int:
        """Distinct sentinels in an example of `num_raw` raw tokens."""
        return 0

    def check(self, lengths: Mapping[str, int], vocabulary: Vocabulary) -> None:
        """Refuses lengths and vocabularies that this objective would overrun.

        Raises:
          UserError: `targets` is too short for what `inputs` takes in, or the vocabulary does not serve.
        """
        num_raw = self.raw_length(lengths)
        targets = self.lengths(num_raw)[1]
        if targets > lengths["targets"]:
            raise UserError(
                f"{self.name}: the targets length {lengths['targets']} is too short: inputs of {lengths['inputs']} "
                f"tokens come with targets of {targets}; set targets to {targets} or more."
            )
        self.check_vocabulary(num_raw, vocabulary)

    def check_vocabulary(self, num_raw: int, vocabulary: Vocabulary) -> None:
        """Raises UserError if examples of `num_raw` raw tokens need more sentinels than the vocabulary has, or anything
        else that it lacks."""
        needed = self.sentinels_needed(num_raw)
        if needed > vocabulary.num_sentinels:
            raise UserError(
                f"{self.name}: examples of {num_raw} tokens need {needed} sentinels but the vocabulary has only "
                f"{vocabulary.num_sentinels}; set {type(vocabulary).__name__}.extra_ids to {needed} or more and "
                "prepare again."
            )
