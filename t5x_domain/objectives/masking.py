"""Which tokens of a text a masked language model predicts, and what stands in their places.

Devlin et al. 2019, "BERT" (arXiv:1810.04805), section 3.1, and its variants: whole words, spans (Joshi et al. 2020,
"SpanBERT", arXiv:1907.10529), pairs (Liu et al. 2021, "CrossNER", arXiv:2012.04373) and a lexicon (Zhai et al. 2024,
"Chinese MentalBERT", arXiv:2402.09151).
"""

import abc
import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import gin
import numpy as np

from t5x_domain import files
from t5x_domain.data.sources import resolve_files
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.objectives.span_corruption import random_span_ends

AnyVocabulary = Vocabulary | ByteVocabulary

# Shares of the chosen tokens that become [MASK], become a random token, and stay.
BERT_SHARES = (0.8, 0.1, 0.1)


class Masking(abc.ABC):
    """Chooses tokens of a text. Subclasses are frozen, gin-configurable dataclasses.

    EOS between documents, sentinels and other ids that are no text are never chosen; the rules below count the rest.
    """

    def positions(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: AnyVocabulary) -> np.ndarray:
        """Which of the tokens (int32 [n]) are chosen, bool [n]; the same for a generator in the same state."""
        text = vocabulary.pieces.text[tokens]
        chosen = np.zeros(len(tokens), bool)
        if text.any():
            chosen[text] = self._of_text(tokens[text], rng, vocabulary)
        return chosen

    @abc.abstractmethod
    def _of_text(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: AnyVocabulary) -> np.ndarray:
        """The same for tokens that are all text, n >= 1."""

    def check(self, vocabulary: AnyVocabulary) -> None:
        """Raises UserError if nothing could be chosen in texts of this vocabulary."""
        del vocabulary


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Uniform(Masking):
    """Single tokens, all alike: round(n * rate) of them, one at least, without replacement (BERT).

    ELECTRA's code draws as many positions with replacement: 15 % of a long text are then 13.9 % distinct tokens
    (1 - exp(-0.15)), and a token drawn twice counts twice in its loss.
    """

    rate: float = 0.15

    def __post_init__(self) -> None:
        _check_rate(self)

    def _of_text(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: AnyVocabulary) -> np.ndarray:
        return _some(len(tokens), self.rate, rng)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class WholeWord(Masking):
    """Words with all their pieces: round(words * rate) of them, one at least, without replacement.

    Every word is as likely as any other, so the share of tokens is `rate` on average. A word begins at SentencePiece's
    mark '▁', or with bytes at the space before it, and takes in the punctuation after it.
    """

    rate: float = 0.15

    def __post_init__(self) -> None:
        _check_rate(self)

    def _of_text(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: AnyVocabulary) -> np.ndarray:
        begins = vocabulary.pieces.begins_word[tokens]
        begins[0] = True
        word = np.cumsum(begins) - 1
        return _some(int(word[-1]) + 1, self.rate, rng)[word]


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Spans(Masking):
    """round(n * rate) tokens, one at least, in round(tokens / mean_length) spans, one at least, that do not touch.

    All ways to cut the tokens into spans and to place these are equally likely, as in T5's span corruption; but a text
    may begin with a span and need not end with one. SpanBERT draws lengths from a cut geometric distribution.
    """

    rate: float = 0.15
    mean_length: float = 3.0

    def __post_init__(self) -> None:
        _check_rate(self)
        if not self.mean_length >= 1:
            raise UserError(f"Spans.mean_length={self.mean_length} must be at least 1.")

    def _of_text(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: AnyVocabulary) -> np.ndarray:
        num_tokens = len(tokens)
        masked = max(round(num_tokens * self.rate), 1)
        clean = num_tokens - masked
        spans = min(max(round(masked / self.mean_length), 1), clean + 1)  # a clean token between any two
        lengths = np.diff(random_span_ends(rng, masked, spans))
        gaps = np.diff(random_span_ends(rng, clean + 2, spans + 1))
        gaps[[0, -1]] -= 1  # those at the ends may be empty
        of_span = np.zeros(2 * spans + 1, bool)
        of_span[1::2] = True
        both = np.empty(2 * spans + 1, np.int64)
        both[::2], both[1::2] = gaps, lengths
        return np.repeat(of_span, both)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Paired(Masking):
    """Every token by itself with probability `rate`; then the first of each two isolated ones moves next to the second.

    So of all chosen tokens at most one stands alone: the span-level masking of CrossNER, as its code has it. None may
    be chosen of a short text.
    """

    rate: float = 0.2

    def __post_init__(self) -> None:
        _check_rate(self)

    def _of_text(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: AnyVocabulary) -> np.ndarray:
        chosen = rng.random(len(tokens)) < self.rate
        beside = np.zeros(len(chosen) + 2, bool)
        beside[1:-1] = chosen
        isolated = np.flatnonzero(chosen & ~beside[:-2] & ~beside[2:])
        second = isolated[1::2]
        chosen[isolated[::2][: len(second)]] = False
        chosen[second - 1] = True
        return chosen


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Lexicon(Masking):
    """Terms of a list more often than other tokens; a term is chosen with all its tokens or not at all.

    A term is found by the tokens that the vocabulary writes it with after a space, where no letter or digit goes on
    with it; of several the longest counts. Case matters. None may be chosen of a short text.

    Attributes:
      words: the terms, each of one or more words.
      file: a text file (UTF-8) of more of them, one a line.
      rate: probability of each occurrence of a term.
      rate_elsewhere: of each token outside them.
      digest: of the list, so that a run knows its own again.
    """

    words: Sequence[str] = dataclasses.field(default=(), compare=False, repr=False)
    file: str | None = None
    rate: float = 0.5
    rate_elsewhere: float = 0.1
    digest: str = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Reads the file. Raises UserError if it cannot be read, there is no term, or the rates do not fit."""
        _check_rate(self)
        if not 0 <= self.rate_elsewhere <= self.rate:
            raise UserError(
                f"Lexicon.rate_elsewhere={self.rate_elsewhere} must lie between 0 and Lexicon.rate={self.rate}."
            )
        if isinstance(self.words, str):
            raise UserError(f"Lexicon.words={self.words!r} must be a list; name a file in Lexicon.file.")
        terms = [*self.words, *(_terms_of(self.file) if self.file is not None else ())]
        terms = tuple(dict.fromkeys(term.strip() for term in terms if term.strip()))
        if not terms:
            raise UserError(f"{self._place} has no word; give at least one, in a file one a line.")
        object.__setattr__(self, "words", terms)
        object.__setattr__(self, "digest", hashlib.sha256("\n".join(terms).encode()).hexdigest()[:16])

    @property
    def _place(self) -> str:
        return "Lexicon.words" if self.file is None else f"Lexicon.file={self.file}"

    def check(self, vocabulary: AnyVocabulary) -> None:
        """Raises UserError if the vocabulary has pieces for no term."""
        pieces = vocabulary.pieces.characters
        if not any(pieces[ids].all() for ids in map(vocabulary.encode, self.words) if len(ids)):
            some = ", ".join(self.words[:3])
            raise UserError(
                f"{self._place}: none of its {len(self.words)} words ({some}{', …' * (len(self.words) > 3)}) can be "
                "written with the pieces of the vocabulary; give words of its language."
            )

    def _of_text(self, tokens: np.ndarray, rng: np.random.Generator, vocabulary: AnyVocabulary) -> np.ndarray:
        chosen = rng.random(len(tokens)) < self.rate_elsewhere
        found = self.occurrences(tokens, vocabulary)
        for (start, stop), take in zip(found, rng.random(len(found)) < self.rate, strict=True):
            chosen[start:stop] = take
        return chosen

    def occurrences(self, tokens: np.ndarray, vocabulary: AnyVocabulary) -> list[tuple[int, int]]:
        """(start, stop) of the terms among tokens (int32 [n]), from left to right, none overlapping."""
        begins, terms = _term_ids(self, vocabulary)
        kinds, ids = vocabulary.pieces, tokens.tolist()
        goes_on = [*kinds.goes_on[tokens].tolist(), False]
        result, end = [], 0
        for start in np.flatnonzero(begins[tokens]).tolist():
            inside = start > 0 and goes_on[start - 1] and not kinds.begins_word[ids[start]]
            if start < end or inside:
                continue
            for term in terms[ids[start]]:
                end = start + len(term)
                if ids[start:end] == term and not goes_on[end]:
                    result.append((start, end))
                    break
            else:
                end = start
        return result


@functools.lru_cache(maxsize=16)
def _term_ids(lexicon: Lexicon, vocabulary: AnyVocabulary) -> tuple[np.ndarray, dict[int, list[list[int]]]]:
    """Which ids begin a term, bool [vocab_size], and the terms' ids by their first, the longest first."""
    begins, terms = np.zeros(vocabulary.vocab_size, bool), {}
    written = [ids.tolist() for ids in map(vocabulary.encode, lexicon.words) if vocabulary.pieces.text[ids].all()]
    for ids in sorted(filter(None, written), key=len, reverse=True):
        begins[ids[0]] = True
        terms.setdefault(ids[0], []).append(ids)
    return begins, terms


def _terms_of(file: str) -> list[str]:
    path = resolve_files(file, "Lexicon.file")[0]
    try:
        return files.path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Lexicon.file={file}: cannot be read as UTF-8 text ({error}).") from error


def corrupted(
    tokens: np.ndarray,
    chosen: np.ndarray,
    shares: Sequence[float],
    rng: np.random.Generator,
    vocabulary: AnyVocabulary,
) -> np.ndarray:
    """The text with something else in the chosen places, int32 [n].

    Args:
      tokens: int32 [n].
      chosen: bool [n].
      shares: probabilities that a chosen token becomes `vocabulary.mask_id`, becomes a random token, or stays. A random
        token is any piece of text alike, by chance the token itself.
      rng: draws.
      vocabulary: of the tokens.
    """
    places = np.flatnonzero(chosen)
    draw = rng.random(len(places))
    masked, random = draw < shares[0], (draw >= shares[0]) & (draw < shares[0] + shares[1])
    result = tokens.copy()
    result[places[masked]] = vocabulary.mask_id
    if random.any():
        result[places[random]] = rng.choice(_random_ids(vocabulary), int(random.sum()))
    return result


@functools.lru_cache(maxsize=16)
def _random_ids(vocabulary: AnyVocabulary) -> np.ndarray:
    return np.flatnonzero(vocabulary.pieces.characters).astype(np.int32)


def _some(count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """round(count * rate) of `count` things, one at least, all choices alike; bool [count]."""
    chosen = np.zeros(count, bool)
    chosen[rng.choice(count, max(round(count * rate), 1), replace=False, shuffle=False)] = True
    return chosen


def _check_rate(masking: Masking) -> None:
    if not 0 < masking.rate <= 1:
        raise UserError(f"{type(masking).__name__}.rate={masking.rate} must be above 0 and at most 1.")
