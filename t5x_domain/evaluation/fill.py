"""What a model writes into the blanks of corrupted text: greedy decoding, set side by side with the original."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_domain.data.tasks import AS_TRAINED, Component
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.inference.decoding import Decoding
from t5x_domain.inference.generator import Generator
from t5x_domain.inference.opened import Opened, unrolled
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder
from t5x_domain.models.rtd import DetectingEncoderDecoder
from t5x_domain.objectives.prefix import NO_TOKENS, prefix_ids
from t5x_domain.objectives.span_corruption import spans, split_at_sentinels
from t5x_domain.training.state import Blueprint


@dataclasses.dataclass(frozen=True)
class Blank:
    """One corrupted span.

    Attributes:
      original: text that stood there, white space included.
      written: what the model wrote; "" if it skipped this blank.
      correct: putting it in place gives the original document.
    """

    original: str
    written: str
    correct: bool


@dataclasses.dataclass(frozen=True)
class Filled:
    """A document with blanks: `pieces[0] blanks[0] pieces[1] … blanks[-1] pieces[-1]`."""

    pieces: tuple[str, ...]
    blanks: tuple[Blank, ...]


def fill_spans(
    model_of: Blueprint,
    params: Any,
    examples: Sequence[Mapping[str, np.ndarray]],
    vocabulary: Vocabulary | ByteVocabulary,
    *,
    max_targets: int,
    component: Component | None = None,
    metadata: Mapping[str, Any] | None = None,
    mode: Any = AS_TRAINED,
) -> list[Filled]:
    """Lets the model fill the blanks of span-corrupted examples (Raffel et al. 2020, section 3.1.4), in one batch.

    Args:
      model_of: an encoder-decoder or decoder-only model.
      params: its parameters, placed by `model_of.shardings`.
      examples: {'inputs': int32 [i], 'targets': int32 [t]} as objectives make them, closed by EOS.
      vocabulary: the one of the examples.
      max_targets: tokens that the model may write for one example; it stops earlier at EOS.
      component: with which the model was trained; its mode token and metadata go where training put them. None for
        neither.
      metadata: {field: value} for the component's templates; None for no metadata.
      mode: a `Mode` instead of the component's own, or None for none.

    Raises:
      UserError: the model cannot write, `max_targets` leaves no room for an example's true targets, or the metadata
        do not suit the component.
    """
    if model_of.model_class not in (EncoderDecoder, DetectingEncoderDecoder, DecoderOnly):
        raise UserError(f"{model_of.model_class.__name__} has no decoder to fill blanks with; use EncoderDecoder.")
    longest = max((len(example["targets"]) for example in examples), default=0)
    if longest > max_targets:
        raise UserError(
            f"max_targets = {max_targets} is too short for targets of {longest} tokens; set it to {longest}."
        )
    if not examples:
        return []
    prefix = NO_TOKENS
    if component is not None:
        if metadata == "own":
            raise UserError("metadata='own': examples have none of their own here; give {field: value}.")
        asked = component.conditioned(metadata, mode)
        if asked.metadata is not None:
            asked.metadata.check_fields(set(), "")
        prefix = prefix_ids(vocabulary, metadata=asked.metadata, mode=asked.mode)
    # Examples have inputs, so a decoder alone was trained to see them whole.
    model = Opened("the model", *unrolled(model_of, params), vocabulary, {"prefix_lm": ["span corruption"]})
    generator = Generator(model, Decoding(max_tokens=max_targets), batch_size=len(examples))
    written = generator([np.concatenate([prefix, example["inputs"]]).astype(np.int32) for example in examples])
    return [
        compare(example["inputs"], example["targets"], outputs[0].tokens, vocabulary)
        for example, outputs in zip(examples, written, strict=True)
    ]


def compare(
    inputs: np.ndarray, targets: np.ndarray, written: np.ndarray, vocabulary: Vocabulary | ByteVocabulary
) -> Filled:
    """Puts true and written targets into the blanks of `inputs`; ids are int32 [n], `written` may lack its EOS.

    A span belongs to the sentinel before it, wherever that stands in `written`. Blanks without a span stay empty;
    repeated sentinels, sentinels that `inputs` has not, and tokens before the first one are left out.
    """
    head, *rest = split_at_sentinels(inputs[:-1], vocabulary)
    originals = spans(targets[:-1], vocabulary)
    num_written = np.flatnonzero(np.append(written, vocabulary.eos_id) == vocabulary.eos_id)[0]
    guesses = spans(written[:num_written], vocabulary)

    document = list(head[1])
    blanks_at = []  # (sentinel, first token, token after the last) in the document
    for sentinel, piece in rest:
        if sentinel in originals:
            start = len(document)
            document += originals.pop(sentinel)
            blanks_at.append((sentinel, start, len(document)))
        else:  # a document that contains the name of a sentinel
            document.append(sentinel)
        document += piece

    # Text is cut where the decoded tokens before the cut end: decoded alone, a token would lose the space before it.
    text, pieces, blanks, end = vocabulary.decode(document), [], [], 0
    for sentinel, start, stop in blanks_at:
        guess = guesses.get(sentinel, [])
        before, after = _decode_prefix(document[:start], vocabulary), _decode_prefix(document[:stop], vocabulary)
        pieces.append(text[end : len(before)])
        blanks.append(
            Blank(
                original=text[len(before) : len(after)],
                written=_decode_prefix(document[:start] + guess, vocabulary)[len(before) :],
                correct=vocabulary.decode(document[:start] + guess + document[stop:]) == text,
            )
        )
        end = len(after)
    return Filled((*pieces, text[end:]), tuple(blanks))


def _decode_prefix(tokens: Sequence[int], vocabulary: Vocabulary | ByteVocabulary) -> str:
    """Text of a document's first tokens; bytes that end within a character wait for the rest of it."""
    return vocabulary.decode(tokens).rstrip("\N{REPLACEMENT CHARACTER}")
