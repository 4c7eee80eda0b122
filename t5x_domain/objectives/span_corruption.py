"""T5's span corruption: random spans of the text become sentinels, and the model writes the spans back.

Raffel et al. 2020 (arXiv:1910.10683), section 3.1.4 and figure 2; the mask and the length arithmetic are those of
`random_spans_noise_mask` and `random_spans_helper` in google-research/text-to-text-transfer-transformer.
"""

import dataclasses
from collections.abc import Mapping

import gin
import numpy as np

from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.objectives.base import Objective


@gin.configurable
@dataclasses.dataclass(frozen=True)
class SpanCorruption(Objective):
    """`the cat sat on the mat` -> inputs `the <0> on the <1> EOS`, targets `<0> cat sat <1> mat EOS`.

    The number of noisy tokens and of spans depends on the number of raw tokens only; all ways to cut the noisy and the
    clean tokens into that many spans are equally likely. A text begins clean and ends noisy, so no sentinel closes the
    targets. A text of a single token stays clean.

    Attributes:
      noise_density: share of the raw tokens that is corrupted, in (0, 1).
      mean_span_length: mean number of tokens in a corrupted span, at least 1.
    """

    noise_density: float = 0.15
    mean_span_length: float = 3.0
    name: str = "span_corruption"

    def __post_init__(self) -> None:
        if not 0 < self.noise_density < 1:
            raise UserError(f"SpanCorruption.noise_density={self.noise_density} must lie between 0 and 1.")
        if self.mean_span_length < 1:
            raise UserError(f"SpanCorruption.mean_span_length={self.mean_span_length} must be at least 1.")

    def noise(self, num_raw: int) -> tuple[int, int]:
        """Number of noisy tokens and of noisy spans among `num_raw` tokens.

        `round` takes halves to the even number, as T5's Python helper and its TensorFlow mask do; rounding halves up
        would miss the published lengths (766 raw tokens for half of the text in spans of 3 at 512 inputs).
        """
        if num_raw < 2:
            return 0, 0
        tokens = min(max(round(num_raw * self.noise_density), 1), num_raw - 1)
        # More spans than clean tokens could not be kept apart.
        spans = min(max(round(tokens / self.mean_span_length), 1), num_raw - tokens)
        return tokens, spans

    def lengths(self, num_raw: int) -> tuple[int, int]:
        tokens, spans = self.noise(num_raw)
        return num_raw - tokens + spans + 1, tokens + spans + 1

    def raw_length(self, lengths: Mapping[str, int]) -> int:
        """The most raw tokens whose inputs fit, as T5's `random_spans_helper`: 568 for 512 inputs (targets: 114)."""
        if lengths["inputs"] < 4:
            raise UserError(f"{self.name}: the inputs length {lengths['inputs']} is too short; set it to 4 or more.")
        num_raw = lengths["inputs"] - 1
        while self.lengths(num_raw + 1)[0] <= lengths["inputs"]:
            num_raw += 1
        inputs, targets = self.lengths(num_raw)
        # At one half, rounding can make the targets one longer than the inputs; T5 gives up that token.
        return num_raw - 1 if self.noise_density == 0.5 and targets > inputs else num_raw

    def sentinels_needed(self, num_raw: int) -> int:
        return self.noise(num_raw)[1]

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
        num_raw = len(tokens)
        num_noise, num_spans = self.noise(num_raw)
        clean_ends = random_span_ends(rng, num_raw - num_noise, num_spans)
        noise_ends = random_span_ends(rng, num_noise, num_spans)
        clean_starts, noise_starts = clean_ends + noise_ends, clean_ends[1:] + noise_ends[:-1]
        # +1 where a noisy span begins, -1 where it ends: the running sum is 1 on the noise. One more place for EOS.
        steps = np.zeros(num_raw + 1, np.int8)
        steps[noise_starts] = 1
        steps[clean_starts[1:]] = -1
        in_targets = np.add.accumulate(steps, dtype=np.int8).view(bool)
        in_inputs = ~in_targets
        # A side takes its own tokens, EOS, and for every span of the other a sentinel in the place of its first token.
        in_inputs[noise_starts] = True
        in_targets[clean_starts[:-1]] = True
        in_targets[num_raw] = True
        inputs = np.empty(num_raw + 1, np.int32)
        inputs[:num_raw] = tokens
        inputs[num_raw] = vocabulary.eos_id
        targets = inputs.copy()
        inputs[noise_starts] = targets[clean_starts[:-1]] = vocabulary.sentinel_ids(num_spans)
        return {"inputs": inputs[in_inputs], "targets": targets[in_targets]}


def random_span_ends(rng: np.random.Generator, num_tokens: int, num_spans: int) -> np.ndarray:
    """Ends of a uniformly random cut of `num_tokens` into `num_spans` spans of at least one token; int64 [spans + 1].

    The ends begin with 0, so span j is [ends[j], ends[j + 1]).
    """
    ends = np.empty(num_spans + 1, np.int64)
    ends[0] = 0
    if num_spans > 1:
        cuts = rng.choice(num_tokens - 1, num_spans - 1, replace=False, shuffle=False)
        cuts.sort()
        np.add(cuts, 1, out=ends[1:-1])
    if num_spans:
        ends[num_spans] = num_tokens
    return ends


def split_at_sentinels(
    tokens: np.ndarray, vocabulary: Vocabulary | ByteVocabulary
) -> list[tuple[int | None, list[int]]]:
    """int32 [n] -> [(None, ids before the first sentinel), (sentinel, ids after it), …]."""
    first_sentinel = vocabulary.vocab_size - vocabulary.num_sentinels
    parts: list[tuple[int | None, list[int]]] = [(None, [])]
    for token in np.asarray(tokens).tolist():
        if token >= first_sentinel:
            parts.append((token, []))
        else:
            parts[-1][1].append(token)
    return parts


def spans(tokens: np.ndarray, vocabulary: Vocabulary | ByteVocabulary) -> dict[int | None, list[int]]:
    """What was written after each sentinel, int32 [n] -> {sentinel: ids}; None for what stands before the first."""
    # Backwards, so that the first of repeated sentinels stays.
    return dict(reversed(split_at_sentinels(tokens, vocabulary)))
