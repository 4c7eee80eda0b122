"""Masked language modeling: an encoder predicts chosen tokens where they stand (Devlin et al. 2019, BERT, 3.1)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import gin
import numpy as np

from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.objectives.base import Objective
from t5x_domain.objectives.masking import BERT_SHARES, Masking, Uniform, corrupted


@gin.configurable
@dataclasses.dataclass(frozen=True)
class MaskedLM(Objective):
    """`the cat sat` -> inputs `the [MASK] sat EOS`, targets `the cat sat EOS`, chosen 0 1 0 0.

    The mask token is the vocabulary's `[MASK]` if it has one, else its first sentinel, `<extra_id_0>`: it is what T5's
    vocabularies have for text that is missing. EOS is never chosen.

    Attributes:
      masking: chooses the tokens.
      shares: of the chosen tokens, which become the mask token, become a random one, and stay, drawn one by one. BERT
        has (0.8, 0.1, 0.1), ELECTRA (0.85, 0, 0.15). All of them are predicted.
    """

    masking: Masking = Uniform()
    shares: Sequence[float] = BERT_SHARES
    name: str = "mlm"
    target_side: ClassVar[str] = "encoder"

    def __post_init__(self) -> None:
        shares = tuple(self.shares)
        if len(shares) != 3 or not all(0 <= share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
            raise UserError(
                f"MaskedLM.shares={shares} must be three numbers, of masked, random and kept tokens, that sum to 1."
            )
        object.__setattr__(self, "shares", shares)

    def lengths(self, num_raw: int) -> tuple[int, int]:
        return num_raw + 1, num_raw + 1

    def raw_length(self, lengths: Mapping[str, int]) -> int:
        if lengths["inputs"] < 3:
            raise UserError(f"{self.name}: the inputs length {lengths['inputs']} is too short; set it to 3 or more.")
        return lengths["inputs"] - 1

    def check_vocabulary(self, num_raw: int, vocabulary: Vocabulary | ByteVocabulary) -> None:
        """Raises UserError if the vocabulary has no mask token, or the masking finds nothing in it."""
        del num_raw
        _ = vocabulary.mask_id  # raises if there is none
        self.masking.check(vocabulary)

    def __call__(
        self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary | ByteVocabulary
    ) -> dict[str, np.ndarray]:
        chosen = self.masking.positions(tokens, rng, vocabulary)
        inputs = corrupted(tokens, chosen, self.shares, rng, vocabulary)
        eos = np.array([vocabulary.eos_id], np.int32)
        return {
            "inputs": np.concatenate([inputs, eos]),
            "targets": np.concatenate([tokens, eos]),
            "chosen": np.append(chosen, False),
        }
