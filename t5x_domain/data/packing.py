"""Layouts: how examples (`inputs`, `targets`) become the rows of features that a model reads.

Feature names and values are SeqIO's (`EncDecFeatureConverter`, `PrefixLMFeatureConverter` with pack=True), but padding
is told from text by position, so a text token with id 0 keeps its segment and its loss.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.objectives.base import Objective
from t5x_domain.objectives.prefix import NO_TOKENS


class Example(NamedTuple):
    """One example and where it came from."""

    inputs: np.ndarray  # int32 [i]
    targets: np.ndarray  # int32 [t]
    component_id: int
    prefix: np.ndarray = NO_TOKENS  # int32 [p]: metadata and mode token, see objectives/prefix.py
    chosen: np.ndarray = NO_TOKENS  # bool [t]: the targets that an encoder predicts; empty for a decoder's


Batch = dict[str, np.ndarray]


class Layout(abc.ABC):
    """Knows how much of a row an example takes, and writes examples into rows.

    A row has room in two sequences, (encoder, decoder); `lengths` is {'inputs': …, 'targets': …} as in SeqIO.
    """

    # Room in (encoder, decoder) that a token of an example's prefix takes.
    prefix_cost: tuple[int, int]
    # Where targets are predicted, as `Objective.target_side`.
    target_side: str

    @abc.abstractmethod
    def capacity(self, lengths: Mapping[str, int]) -> tuple[int, int]:
        """Length of a row's (encoder, decoder) sequence."""

    @abc.abstractmethod
    def cost(self, objective: Objective, num_raw: int) -> tuple[int, int]:
        """Room in (encoder, decoder) that the example of `num_raw` raw tokens takes at most, its prefix left out."""

    @abc.abstractmethod
    def mean_cost(self, objective: Objective, num_raw: int) -> tuple[float, float]:
        """Room that it takes on average."""

    @abc.abstractmethod
    def random_cost(self, objective: Objective) -> bool:
        """Whether the room depends on the random generator; then `Objective.drawn_lengths` is what is taken."""

    @abc.abstractmethod
    def raw_length(self, objective: Objective, lengths: Mapping[str, int]) -> int:
        """Raw tokens whose one example, without prefix, fills a row."""

    @abc.abstractmethod
    def check(self, objective: Objective, lengths: Mapping[str, int], vocabulary: Vocabulary) -> None:
        """Raises UserError if one example cannot fill a row of these lengths without overrunning it."""

    def check_side(self, objective: Objective) -> None:
        """Raises UserError if the objective's targets are not predicted where a model of this layout predicts."""
        if objective.target_side == self.target_side:
            return
        if self.target_side == "encoder":
            raise UserError(
                f"Run.model is an encoder alone, which cannot write the targets of '{objective.name}'; "
                "set MODEL = @EncoderDecoder or @DecoderOnly, or learn MaskedLM (gin/mixtures/mlm.gin)."
            )
        raise UserError(
            f"Run.model = {type(self).__name__} predicts with its decoder, but '{objective.name}' predicts tokens "
            "where they stand in an encoder; set MODEL = @EncoderOnly or @ReplacedTokenDetection, or learn denoisers "
            "(gin/mixtures/denoisers.gin)."
        )

    @abc.abstractmethod
    def batch(self, rows: Sequence[Sequence[Example]], lengths: Mapping[str, int]) -> Batch:
        """Features [len(rows), length] of rows of examples; segments are numbered from 1 in the order given.

        int32, but weights are float32. A row without examples is all zeros.
        """


@dataclasses.dataclass(frozen=True)
class EncoderDecoder(Layout):
    """`encoder_*` holds prefix and inputs, `decoder_*` the targets, `decoder_input_tokens` the targets shifted right by
    one inside each segment with 0 at its start. `component_ids` says which component each target came from. An example
    of causal LM without prefix has nothing in the encoder."""

    prefix_cost = (1, 0)
    target_side = "decoder"

    def capacity(self, lengths: Mapping[str, int]) -> tuple[int, int]:
        return lengths["inputs"], lengths["targets"]

    def cost(self, objective: Objective, num_raw: int) -> tuple[int, int]:
        return objective.lengths(num_raw)

    def mean_cost(self, objective: Objective, num_raw: int) -> tuple[float, float]:
        return objective.mean_lengths(num_raw)

    def random_cost(self, objective: Objective) -> bool:
        return objective.random_lengths

    def raw_length(self, objective: Objective, lengths: Mapping[str, int]) -> int:
        return objective.raw_length(lengths)

    def check(self, objective: Objective, lengths: Mapping[str, int], vocabulary: Vocabulary) -> None:
        objective.check(lengths, vocabulary)

    def batch(self, rows: Sequence[Sequence[Example]], lengths: Mapping[str, int]) -> Batch:
        encoder = _Sequences(len(rows), lengths["inputs"])
        decoder = _Sequences(len(rows), lengths["targets"])
        component_ids = np.zeros_like(decoder.tokens)
        for row, examples in enumerate(rows):
            encoder_start = decoder_start = 0
            for segment, example in enumerate(examples, start=1):
                encoder_start = encoder.write(
                    row, encoder_start, segment, np.concatenate([example.prefix, example.inputs])
                )
                decoder_stop = decoder.write(row, decoder_start, segment, example.targets)
                component_ids[row, decoder_start:decoder_stop] = example.component_id
                decoder_start = decoder_stop
        return {
            "encoder_input_tokens": encoder.tokens,
            "encoder_segment_ids": encoder.segment_ids,
            "encoder_positions": encoder.positions,
            **_decoder_features(decoder),
            "decoder_loss_weights": (decoder.segment_ids > 0).astype(np.float32),
            "component_ids": component_ids,
        }


@dataclasses.dataclass(frozen=True)
class DetectingEncoderDecoder(EncoderDecoder):
    """As `EncoderDecoder`, with `encoder_token_weights`, 1 on text of the inputs, 0 on prefix, sentinels, EOS, padding.

    Attributes:
      vocabulary: says which ids are text.
    """

    vocabulary: Vocabulary | ByteVocabulary

    def batch(self, rows: Sequence[Sequence[Example]], lengths: Mapping[str, int]) -> Batch:
        features = super().batch(rows, lengths)
        text = self.vocabulary.pieces.text[features["encoder_input_tokens"]] & (features["encoder_segment_ids"] > 0)
        for row, examples in enumerate(rows):
            start = 0
            for example in examples:
                text[row, start : start + len(example.prefix)] = False
                start += len(example.prefix) + len(example.inputs)
        return {**features, "encoder_token_weights": text.astype(np.float32)}


@dataclasses.dataclass(frozen=True)
class DecoderOnly(Layout):
    """Prefix, inputs and targets joined, `[prefix][inputs EOS][targets EOS]`, in one sequence of their two lengths.

    The inputs keep their EOS, which tells the model where the targets begin (as in SeqIO's PrefixLMFeatureConverter),
    and both are joined before they are packed (U-PaLM, section 2.2). The loss is on targets only. `decoder_prefix` is
    SeqIO's `decoder_causal_attention`: 1 on the keys that every position of the segment may see. Because the decoder's
    input is shifted right, these are one more than prefix and inputs: the start token and all of them. An example
    without inputs, of causal LM, stays causal, its prefix included (MeCo, section 2).
    """

    prefix_cost = (0, 1)
    target_side = "decoder"

    def capacity(self, lengths: Mapping[str, int]) -> tuple[int, int]:
        return 0, lengths["inputs"] + lengths["targets"]

    def cost(self, objective: Objective, num_raw: int) -> tuple[int, int]:
        return 0, objective.joined_length(num_raw)

    def mean_cost(self, objective: Objective, num_raw: int) -> tuple[float, float]:
        return self.cost(objective, num_raw)

    def random_cost(self, objective: Objective) -> bool:
        return False

    def raw_length(self, objective: Objective, lengths: Mapping[str, int]) -> int:
        length = self.capacity(lengths)[1]
        num_raw = 1
        while objective.joined_length(num_raw + 1) <= length:
            num_raw += 1
        return num_raw

    def check(self, objective: Objective, lengths: Mapping[str, int], vocabulary: Vocabulary) -> None:
        if objective.joined_length(2) > sum(self.capacity(lengths)):
            raise UserError(f"{objective.name}: sequences of {dict(lengths)} are too short for two tokens of text.")
        objective.check_vocabulary(self.raw_length(objective, lengths), vocabulary)

    def batch(self, rows: Sequence[Sequence[Example]], lengths: Mapping[str, int]) -> Batch:
        decoder = _Sequences(len(rows), self.capacity(lengths)[1])
        component_ids = np.zeros_like(decoder.tokens)
        prefix = np.zeros_like(decoder.tokens)
        loss_weights = np.zeros(decoder.tokens.shape, np.float32)
        for row, examples in enumerate(rows):
            start = 0
            for segment, example in enumerate(examples, start=1):
                targets_start = start + len(example.prefix) + len(example.inputs)
                stop = decoder.write(
                    row, start, segment, np.concatenate([example.prefix, example.inputs, example.targets])
                )
                component_ids[row, start:stop] = example.component_id
                prefix[row, start : (targets_start if len(example.inputs) else start) + 1] = 1
                loss_weights[row, targets_start:stop] = 1
                start = stop
        return {
            **_decoder_features(decoder),
            "decoder_loss_weights": loss_weights,
            "decoder_prefix": prefix,
            "component_ids": component_ids,
        }


@dataclasses.dataclass(frozen=True)
class EncoderOnly(Layout):
    """Prefix and corrupted text, `[prefix][text EOS]`, in one sequence of the inputs length; a targets length is of no
    use.

    `encoder_target_tokens` are the tokens as they were, `encoder_loss_weights` 1 where one is to be predicted, whatever
    stands there, and `encoder_token_weights` 1 on the text and its EOS: neither counts the prefix.
    """

    prefix_cost = (1, 0)
    target_side = "encoder"

    def capacity(self, lengths: Mapping[str, int]) -> tuple[int, int]:
        return lengths["inputs"], 0

    def cost(self, objective: Objective, num_raw: int) -> tuple[int, int]:
        return objective.lengths(num_raw)[0], 0

    def mean_cost(self, objective: Objective, num_raw: int) -> tuple[float, float]:
        return self.cost(objective, num_raw)

    def random_cost(self, objective: Objective) -> bool:
        return False

    def raw_length(self, objective: Objective, lengths: Mapping[str, int]) -> int:
        return objective.raw_length(lengths)

    def check(self, objective: Objective, lengths: Mapping[str, int], vocabulary: Vocabulary) -> None:
        objective.check_vocabulary(self.raw_length(objective, lengths), vocabulary)

    def batch(self, rows: Sequence[Sequence[Example]], lengths: Mapping[str, int]) -> Batch:
        encoder = _Sequences(len(rows), lengths["inputs"])
        targets, component_ids = np.zeros((2, *encoder.tokens.shape), np.int32)
        loss_weights, token_weights = np.zeros((2, *encoder.tokens.shape), np.float32)
        for row, examples in enumerate(rows):
            start = 0
            for segment, example in enumerate(examples, start=1):
                text = start + len(example.prefix)
                stop = encoder.write(row, start, segment, np.concatenate([example.prefix, example.inputs]))
                targets[row, start:text] = example.prefix
                targets[row, text:stop] = example.targets
                loss_weights[row, text:stop] = example.chosen
                token_weights[row, text:stop] = 1
                component_ids[row, start:stop] = example.component_id
                start = stop
        return {
            "encoder_input_tokens": encoder.tokens,
            "encoder_segment_ids": encoder.segment_ids,
            "encoder_positions": encoder.positions,
            "encoder_target_tokens": targets,
            "encoder_loss_weights": loss_weights,
            "encoder_token_weights": token_weights,
            "component_ids": component_ids,
        }


class _Sequences:
    """Token ids, segment ids (0 is padding) and positions within the segment, int32 [rows, length]."""

    def __init__(self, rows: int, length: int):
        self.tokens, self.segment_ids, self.positions = np.zeros((3, rows, length), np.int32)
        self._count = np.arange(length, dtype=np.int32)

    def write(self, row: int, start: int, segment: int, tokens: np.ndarray) -> int:
        """Puts a segment at `start` and returns where it stops."""
        stop = start + len(tokens)
        self.tokens[row, start:stop] = tokens
        self.segment_ids[row, start:stop] = segment
        self.positions[row, start:stop] = self._count[: len(tokens)]
        return stop


def _decoder_features(decoder: _Sequences) -> Batch:
    shifted = np.zeros_like(decoder.tokens)
    shifted[:, 1:] = decoder.tokens[:, :-1]
    shifted[decoder.positions == 0] = 0  # The start of a segment, or padding.
    return {
        "decoder_input_tokens": shifted,
        "decoder_target_tokens": decoder.tokens,
        "decoder_segment_ids": decoder.segment_ids,
        "decoder_positions": decoder.positions,
    }
