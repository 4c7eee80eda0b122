"""Objectives of labelled tasks: classes, tags, answer spans, and texts that belong together.

The device half is a loss for each kind. The host half is a class for each kind: `encode` makes rows of fixed length of
examples, `decode` makes predictions of a head's outputs. Heads are in `models.heads`, under the same names of kinds.
"""

import abc
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
import numpy as np

from t5x_domain.data.labelled import Labelled
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError

Batch = Mapping[str, jax.Array]
Sums = tuple[jax.Array, dict[str, jax.Array]]
_EXCLUDED = -1e9  # score of a text that is no candidate


# --- device half: loss(model, batch, rng) -> (the sum to differentiate, sums to report); rng None in evaluation ---


def classification_loss(model: Any, batch: Batch, rng: jax.Array | None) -> Sums:
    """Cross-entropy of `labels` [B, 1] int32, summed over rows by `label_weights` [B, 1] float32.

    Returns:
      The sum (float32 scalar), and the sums `weight`, `nll` (nats) and `correct`.
    """
    return _summed(_logits(model, batch, rng)[:, None], batch["labels"], batch["label_weights"])


def tagging_loss(model: Any, batch: Batch, rng: jax.Array | None) -> Sums:
    """As `classification_loss`, of `labels` [B, S]; `label_weights` [B, S] are 1 at each word's first piece only."""
    return _summed(_logits(model, batch, rng), batch["labels"], batch["label_weights"])


def spans_loss(model: Any, batch: Batch, rng: jax.Array | None) -> Sums:
    """Mean of the cross-entropies of first and last token (Devlin et al. 2019, section 4.2), summed over rows.

    `labels` [B, 2] are the two positions, (0, 0) for no answer; `label_weights` is [B, 1]. `correct` counts half a row
    for each end.
    """
    logits = jnp.swapaxes(_logits(model, batch, rng), 1, 2)
    return _summed(logits, batch["labels"], jnp.broadcast_to(batch["label_weights"] / 2, batch["labels"].shape))


@gin.configurable
def pairs_loss(
    model: Any, batch: Batch, rng: jax.Array | None, *, temperature: float = 0.05, symmetric: bool = True
) -> Sums:
    """Multiple-negatives ranking (Henderson et al. 2017, section 4.4): the other positives of the batch are negatives.

    The score of text i and positive j is their cosine / `temperature`. A positive that equals the right one, or whose
    own text equals text i, is no negative and is left out, as are rows of weight 0. The whole batch is compared
    whatever the mesh; with `accumulation_steps` each part of it by itself.

    Args:
      model: maps tokens to unit vectors [B, D].
      batch: `encoder_input_tokens`, `positive_input_tokens` and their `…_segment_ids`, [B, S] int32; `label_weights`
        [B, 1].
      rng: key for dropout.
      temperature: a twentieth is the usual scale of 20.
      symmetric: also find the text of each positive, and take the mean of both losses.

    Returns:
      As `classification_loss`; `correct` counts texts whose own positive scores best.
    """
    ours = [batch[name] for name in ("encoder_input_tokens", "encoder_segment_ids")]
    theirs = [batch[name] for name in ("positive_input_tokens", "positive_segment_ids")]
    vectors = model(*(jnp.concatenate(two) for two in zip(ours, theirs, strict=True)), rng=rng)
    texts, positives = jnp.split(vectors, 2)
    weights = batch["label_weights"]
    same = _same_rows(*ours) | _same_rows(*theirs)
    own = jnp.eye(len(texts), dtype=bool)
    excluded = (same | (weights[:, 0] == 0)) & ~own
    scores = jnp.where(excluded, _EXCLUDED, texts @ positives.T / temperature)
    labels = jnp.arange(len(texts))[:, None]
    value, sums = _summed(scores[:, None], labels, weights)
    if not symmetric:
        return value, sums
    backwards = jnp.where(excluded, _EXCLUDED, positives @ texts.T / temperature)
    value = (value + _summed(backwards[:, None], labels, weights)[0]) / 2
    return value, {**sums, "nll": value}


LOSSES: Mapping[str, Callable[..., Sums]] = {
    "classification": classification_loss,
    "tagging": tagging_loss,
    "spans": spans_loss,
    "pairs": pairs_loss,
}


def _logits(model: Any, batch: Batch, rng: jax.Array | None) -> jax.Array:
    return model(**{name: batch[name] for name in model.inputs}, rng=rng)


def _summed(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> Sums:
    """Logits [B, T, L], labels and weights [B, T]."""
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    total, correct = (nll * weights).sum(), ((logits.argmax(axis=-1) == labels) * weights).sum()
    return total, {"weight": weights.sum(), "nll": total, "correct": correct}


def _same_rows(tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """[B, B]: which rows hold the same text."""
    rows = jnp.where(segment_ids > 0, tokens, -1)
    return (rows[:, None] == rows).all(axis=-1)


# --- host half ---


class Rows(NamedTuple):
    """Examples as a head reads them.

    Attributes:
      features: [n, ...] arrays: what the model and the loss of the kind take.
      cut: ids of the examples whose text is longer than a row. What they lose of a target does not count.
    """

    features: dict[str, np.ndarray]
    cut: list[str]


@dataclasses.dataclass(frozen=True)
class LabelObjective(abc.ABC):
    """The host half of a kind.

    Attributes:
      vocabulary: the model's.
      length: tokens in a row, its EOS included.
    """

    vocabulary: Vocabulary | ByteVocabulary
    length: int

    @abc.abstractmethod
    def encode(self, examples: Sequence[Labelled]) -> Rows:
        """`encoder_input_tokens` and `encoder_segment_ids` [n, length] int32, `labels` int32, `label_weights` float32.

        A label that the task does not have, as may be in a test split, gets the weight 0.
        """

    @abc.abstractmethod
    def decode(self, outputs: np.ndarray, examples: Sequence[Labelled]) -> list[Any]:
        """Predictions, in the form of the examples' targets, of what the head gives for `encode(examples)`."""

    def _rows(self, ids: Sequence[np.ndarray], prefix: str = "encoder") -> dict[str, np.ndarray]:
        """Tokens without EOS, cut and closed by EOS."""
        tokens = np.zeros((len(ids), self.length), np.int32)
        segments = np.zeros_like(tokens)
        for i, row in enumerate(ids):
            kept = row[: self.length - 1]
            tokens[i, : len(kept)], tokens[i, len(kept)] = kept, self.vocabulary.eos_id
            segments[i, : len(kept) + 1] = 1
        return {f"{prefix}_input_tokens": tokens, f"{prefix}_segment_ids": segments}

    def _cut(self, ids: Sequence[np.ndarray], examples: Sequence[Labelled]) -> list[str]:
        return [example.id for row, example in zip(ids, examples, strict=True) if len(row) >= self.length]


@dataclasses.dataclass(frozen=True)
class Classification(LabelObjective):
    """A class for each text. Logits are [n, L]; `labels` and weights [n, 1]."""

    labels: Sequence[str]

    def encode(self, examples: Sequence[Labelled]) -> Rows:
        ids = [self.vocabulary.encode(example.inputs) for example in examples]
        numbers = {label: i for i, label in enumerate(self.labels)}
        labels = np.array([[numbers.get(example.target, -1)] for example in examples], np.int32)
        targets = {"labels": np.maximum(labels, 0), "label_weights": (labels >= 0).astype(np.float32)}
        return Rows({**self._rows(ids), **targets}, self._cut(ids, examples))

    def decode(self, outputs: np.ndarray, examples: Sequence[Labelled]) -> list[str]:
        return [self.labels[i] for i in outputs.argmax(axis=-1)]


@dataclasses.dataclass(frozen=True)
class Tagging(LabelObjective):
    """A tag for each word, read and predicted at its first piece. Logits are [n, length, L]; `labels` [n, length].

    Words that are cut off, or that the vocabulary's normalisation drops or joins to the word before, are tagged
    `outside`: "O" if the task has it, else its first tag.
    """

    labels: Sequence[str]

    @property
    def outside(self) -> str:
        return "O" if "O" in self.labels else self.labels[0]

    def encode(self, examples: Sequence[Labelled]) -> Rows:
        pieces = [Pieces(*self.vocabulary.encode_with_offsets(example.inputs)) for example in examples]
        labels = np.zeros((len(examples), self.length), np.int32)
        weights = np.zeros((len(examples), self.length), np.float32)
        numbers = {label: i for i, label in enumerate(self.labels)}
        for i, (example, its) in enumerate(zip(examples, pieces, strict=True)):
            for position, tag in zip(self._positions(example, its), example.target, strict=True):
                if position is not None and tag in numbers:
                    labels[i, position], weights[i, position] = numbers[tag], 1
        ids = [its.ids for its in pieces]
        features = {**self._rows(ids), "labels": labels, "label_weights": weights}
        return Rows(features, self._cut(ids, examples))

    def decode(self, outputs: np.ndarray, examples: Sequence[Labelled]) -> list[list[str]]:
        best = outputs.argmax(axis=-1)
        return [
            [
                self.outside if position is None else self.labels[row[position]]
                for position in self._positions(example, Pieces(*self.vocabulary.encode_with_offsets(example.inputs)))
            ]
            for row, example in zip(best, examples, strict=True)
        ]

    def _positions(self, example: Labelled, pieces: "Pieces") -> list[int | None]:
        """The first piece of each whitespace token; None if it has none of its own in the row."""
        positions: list[int | None] = []
        for word in re.finditer(r"\S+", example.inputs):
            first, _ = pieces.covering(*word.span())
            own = first is not None and first < self.length - 1 and first not in positions
            positions.append(first if own else None)
        return positions


@dataclasses.dataclass(frozen=True)
class Spans(LabelObjective):
    """The part of a text that answers. Logits are [n, length, 2]; `labels` [n, 2] are the first and last token.

    A row begins with an EOS, whose position 0 stands for "no answer". Of several answers the first is learnt, where it
    first occurs in the field `context_field`. An answer that is cut off does not count; texts are not split into
    windows.

    Attributes:
      context_field: the field that answers are quoted from; the inputs hold its text.
      max_answer_tokens: a predicted answer is not longer.
    """

    context_field: str = "text"
    max_answer_tokens: int = 30

    def encode(self, examples: Sequence[Labelled]) -> Rows:
        pieces = [Pieces(*self.vocabulary.encode_with_offsets(example.inputs)) for example in examples]
        labels = np.zeros((len(examples), 2), np.int32)
        weights = np.ones((len(examples), 1), np.float32)
        for i, (example, its) in enumerate(zip(examples, pieces, strict=True)):
            if example.target:
                first, last = its.covering(*self._offsets(example))
                if last is None or last + 2 >= self.length:
                    weights[i] = 0
                else:
                    labels[i] = first + 1, last + 1
        ids = [np.concatenate([[self.vocabulary.eos_id], its.ids]).astype(np.int32) for its in pieces]
        features = {**self._rows(ids), "labels": labels, "label_weights": weights}
        return Rows(features, self._cut(ids, examples))

    def decode(self, outputs: np.ndarray, examples: Sequence[Labelled]) -> list[str]:
        """The text of the best span, "" for none: where no span's two logits add up to more than position 0's."""
        return [self._answer(row, example.inputs) for row, example in zip(outputs, examples, strict=True)]

    def _answer(self, logits: np.ndarray, text: str) -> str:
        pieces = Pieces(*self.vocabulary.encode_with_offsets(text))
        count = min(len(pieces.ids), self.length - 2)
        starts, ends = logits[1 : count + 1].T
        allowed = np.tri(count, dtype=bool).T & np.tri(count, k=self.max_answer_tokens - 1, dtype=bool)
        totals = np.where(allowed, starts[:, None] + ends, -np.inf)
        if not count or totals.max() <= logits[0].sum():
            return ""
        first, last = np.unravel_index(totals.argmax(), totals.shape)
        return text[pieces.begins[first] : pieces.ends[last]].strip()

    def _offsets(self, example: Labelled) -> tuple[int, int]:
        """Characters of the answer in the inputs. Raises UserError if it is not there."""
        context = example.fields.get(self.context_field)
        start = example.inputs.rfind(context) if isinstance(context, str) else -1
        begin = example.inputs.find(example.target[0], start, start + len(context)) if start >= 0 else -1
        if begin < 0:
            raise UserError(
                f"example '{example.id}': its answer '{example.target[0]}' is not in its field '{self.context_field}', "
                "or that field is not in the inputs; mend the example or set Spans.context_field."
            )
        return begin, begin + len(example.target[0])


@dataclasses.dataclass(frozen=True)
class Pairs(LabelObjective):
    """Texts and what belongs to them. Outputs are unit vectors; weights are [n, 1], all 1."""

    def encode(self, examples: Sequence[Labelled]) -> Rows:
        texts = [self.vocabulary.encode(example.inputs) for example in examples]
        positives = [self.vocabulary.encode(example.target) for example in examples]
        features = {
            **self._rows(texts),
            **self._rows(positives, "positive"),
            "label_weights": np.ones((len(examples), 1), np.float32),
        }
        longer = [max(pair, key=len) for pair in zip(texts, positives, strict=True)]
        return Rows(features, self._cut(longer, examples))

    def decode(self, outputs: np.ndarray, examples: Sequence[Labelled]) -> list[str]:
        """For each text the positive of all the examples that is nearest.

        Args:
          outputs: [2, n, D], vectors of the texts and of the positives.
          examples: n examples.
        """
        texts, positives = outputs
        return [examples[i].target for i in (texts @ positives.T).argmax(axis=-1)]


OBJECTIVES: Mapping[str, type[LabelObjective]] = {
    "classification": Classification,
    "tagging": Tagging,
    "spans": Spans,
    "pairs": Pairs,
}


class Pieces(NamedTuple):
    """What `Vocabulary.encode_with_offsets` gives."""

    ids: np.ndarray
    begins: np.ndarray
    ends: np.ndarray

    def covering(self, begin: int, end: int) -> tuple[int, int] | tuple[None, None]:
        """First and last piece that stand for a character of [begin, end); None if there are none."""
        found = np.flatnonzero((self.begins < end) & (self.ends > begin))
        return (int(found[0]), int(found[-1])) if len(found) else (None, None)
