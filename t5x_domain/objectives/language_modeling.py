"""Left-to-right objectives: prefix language modeling (UL2's S-denoiser) and causal language modeling."""

import dataclasses
from collections.abc import Mapping

import gin
import numpy as np

from t5x_domain.data.vocabulary import Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.objectives.base import Objective

_SPLITS = ("uniform", "suffix")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class PrefixLM(Objective):
    """The text is cut once: inputs `prefix EOS`, targets `suffix EOS` (Raffel et al. 2020, 3.2.3; UL2, 3.1).

    Attributes:
      split: 'uniform' draws the cut uniformly, as T5's and the released UL2 preprocessors do (half of the text is
        predicted on average). 'suffix' always predicts the last `mean_suffix` of the text, which is what the UL2
        paper's S-denoiser comes to: one span of mean length L/4 at a rate of 25 %, and T5's mask ends noisy.
      mean_suffix: share of the text that 'suffix' predicts, in (0, 1).
    """

    split: str = "uniform"
    mean_suffix: float = 0.25
    name: str = "prefix_lm"

    def __post_init__(self) -> None:
        if self.split not in _SPLITS:
            raise UserError(f"PrefixLM.split={self.split!r} is not one of {', '.join(_SPLITS)}.")
        if not 0 < self.mean_suffix < 1:
            raise UserError(f"PrefixLM.mean_suffix={self.mean_suffix} must lie between 0 and 1.")

    def _suffix(self, num_raw: int) -> int:
        return max(min(round(num_raw * self.mean_suffix), num_raw - 1), 1)

    def lengths(self, num_raw: int) -> tuple[int, int]:
        if self.split == "uniform":  # Either side may have all tokens but one.
            return max(num_raw, 1), max(num_raw, 2)
        suffix = self._suffix(num_raw)
        return num_raw - suffix + 1, suffix + 1

    @property
    def random_lengths(self) -> bool:
        return self.split == "uniform"

    def drawn_lengths(self, num_raw: int, rng: np.random.Generator) -> tuple[int, int]:
        cut = self._cut(num_raw, rng)
        return cut + 1, num_raw - cut + 1

    def mean_lengths(self, num_raw: int) -> tuple[float, float]:
        return (num_raw / 2 + 1, num_raw / 2 + 1) if self.split == "uniform" else self.lengths(num_raw)

    def _cut(self, num_raw: int, rng: np.random.Generator) -> int:
        if num_raw < 2:
            return 0
        return int(rng.integers(1, num_raw)) if self.split == "uniform" else num_raw - self._suffix(num_raw)

    def joined_length(self, num_raw: int) -> int:
        return num_raw + 2

    def raw_length(self, lengths: Mapping[str, int]) -> int:
        """The most raw tokens whose inputs and targets both fit, wherever the cut falls."""
        if min(lengths["inputs"], lengths["targets"]) < 2:
            raise UserError(f"{self.name}: inputs and targets must each be 2 or longer, not {dict(lengths)}.")
        if self.split == "uniform":
            return min(lengths["inputs"], lengths["targets"])
        num_raw = 1
        while True:
            inputs, targets = self.lengths(num_raw + 1)
            if inputs > lengths["inputs"] or targets > lengths["targets"]:
                return num_raw
            num_raw += 1

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
        cut = self._cut(len(tokens), rng)
        return {
            "inputs": _closed(tokens[:cut], vocabulary.eos_id),
            "targets": _closed(tokens[cut:], vocabulary.eos_id),
        }


@gin.configurable
@dataclasses.dataclass(frozen=True)
class CausalLM(Objective):
    """Every token is predicted from those before it: no inputs, targets `text EOS`. For decoder-only models."""

    name: str = "causal_lm"

    def lengths(self, num_raw: int) -> tuple[int, int]:
        return 0, num_raw + 1

    def raw_length(self, lengths: Mapping[str, int]) -> int:
        if lengths["targets"] < 2:
            raise UserError(f"{self.name}: the targets length {lengths['targets']} is too short; set it to 2 or more.")
        return lengths["targets"] - 1

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
        return {"inputs": np.empty(0, np.int32), "targets": _closed(tokens, vocabulary.eos_id)}


def _closed(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    result = np.empty(len(tokens) + 1, np.int32)
    result[:-1] = tokens
    result[-1] = eos_id
    return result
