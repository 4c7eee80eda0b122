"""What held-out documents cost a finished model, so that two models can be compared document by document.

An encoder-decoder fills blanks, a decoder alone writes the document from its start. Models that share a vocabulary get
the same blanks by T5's span corruption, and the cost is by token. A cost by token says nothing across vocabularies:
there the same words are hidden, and the cost is in bits for each UTF-8 byte of what is hidden; what sentinels and EOS
cost counts as well.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.inference.opened import Opened
from t5x_domain.inference.scoring import Scorer
from t5x_domain.models.assemblies import EncoderDecoder
from t5x_domain.objectives.language_modeling import CausalLM
from t5x_domain.objectives.span_corruption import SpanCorruption

NATS_PER_TOKEN, BITS_PER_BYTE = "nats_per_token", "bits_per_byte"

_BLOCK, _SPAN = 14, 2  # of every 14 words 2 in a row are hidden, T5's share of 15 %
FEWEST_WORDS = _BLOCK  # of a document, so that something is hidden


class Asked(NamedTuple):
    """A document as a model is asked for it: ids (int32 [n], [t]), and the UTF-8 bytes of what it has to write."""

    inputs: np.ndarray
    targets: np.ndarray
    num_bytes: int


def document_costs(
    model: Opened, scorer: Scorer, texts: Sequence[str], measure: str, *, seed: int
) -> list[tuple[float, float]]:
    """Of each text its cost and what it is divided by.

    Args:
      model: an encoder-decoder or decoder-only model.
      scorer: the model's.
      texts: documents, each of `FEWEST_WORDS` words or more.
      measure: NATS_PER_TOKEN (the models to be compared share a vocabulary) or BITS_PER_BYTE.
      seed: what is hidden is a function of it, the document's number and its text.

    Returns:
      (nats, target tokens) or (bits, UTF-8 bytes) of each text.
    """
    if model.blueprint.model_class is not EncoderDecoder:
        asked = [written_on(text, model.vocabulary) for text in texts]
    elif measure == NATS_PER_TOKEN:
        asked = [corrupted(text, model.vocabulary, [seed, number]) for number, text in enumerate(texts)]
    else:
        asked = [hidden_words(text, model.vocabulary, [seed, number]) for number, text in enumerate(texts)]
    scores = scorer([one.inputs for one in asked], [one.targets for one in asked])
    if measure == NATS_PER_TOKEN:
        return [(float(-nats), int(tokens)) for nats, tokens in scores]
    return [(float(-nats) / math.log(2), one.num_bytes) for (nats, _), one in zip(scores, asked, strict=True)]


def written_on(text: str, vocabulary: Vocabulary | ByteVocabulary) -> Asked:
    """The whole text, from nothing."""
    example = CausalLM()(vocabulary.encode(text), np.random.default_rng(0), vocabulary)
    return Asked(example["inputs"], example["targets"], len(text.encode()))


def corrupted(text: str, vocabulary: Vocabulary | ByteVocabulary, seed: Sequence[int]) -> Asked:
    """Spans of tokens hidden as in T5's pretraining."""
    example = SpanCorruption()(vocabulary.encode(text), np.random.default_rng(seed), vocabulary)
    hidden = example["targets"][example["targets"] < vocabulary.vocab_size - vocabulary.num_sentinels]
    return Asked(example["inputs"], example["targets"], len(vocabulary.decode(hidden).encode()))


def hidden_words(text: str, vocabulary: Vocabulary | ByteVocabulary, seed: Sequence[int]) -> Asked:
    """Words hidden, the same ones whatever the vocabulary."""
    random, words, num_bytes = np.random.default_rng(seed), text.split(), 0
    # SentencePiece writes the space before a word by itself, bytes have to.
    space = " " if isinstance(vocabulary, ByteVocabulary) else ""
    encode = lambda part: vocabulary.encode(space + " ".join(part) if part else "")  # noqa: E731
    inputs, targets = [], []
    for k, start in enumerate(range(0, len(words), _BLOCK)):
        block = words[start : start + _BLOCK]
        if len(block) <= _SPAN:
            inputs.append(encode(block))
            continue
        cut = random.integers(1, len(block) - _SPAN + 1)  # a clean word stands first, so spans keep apart
        hidden = block[cut : cut + _SPAN]
        sentinel = [vocabulary.sentinel_id(k)]
        inputs += [encode(block[:cut]), sentinel, encode(block[cut + _SPAN :])]
        targets += [sentinel, encode(hidden)]
        num_bytes += len(f" {' '.join(hidden)}".encode())
    end = [vocabulary.eos_id]
    return Asked(*(np.concatenate([*parts, end]).astype(np.int32) for parts in (inputs, targets)), num_bytes)
