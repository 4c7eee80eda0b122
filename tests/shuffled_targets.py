"""The control of test_demo.py: an objective with nothing to learn from the words around a blank."""

import dataclasses

import gin

from t5x_domain.objectives.span_corruption import SpanCorruption


@gin.configurable
@dataclasses.dataclass(frozen=True)
class ShuffledTargets(SpanCorruption):
    """Span corruption whose blanks are filled with random words of the same text: the control."""

    name: str = "shuffled_targets"

    def __call__(self, tokens, rng, vocabulary):
        """As SpanCorruption, but for the words in the targets."""
        example = super().__call__(tokens, rng, vocabulary)
        targets = example["targets"].copy()
        first_sentinel = vocabulary.vocab_size - vocabulary.num_sentinels
        words = (targets < first_sentinel) & (targets != vocabulary.eos_id)
        targets[words] = rng.choice(tokens, words.sum())
        return {**example, "targets": targets}
