"""Which tokens are chosen and what becomes of them, from counts and probabilities worked out by hand.

Bounds on frequencies are six standard deviations of the binomial distribution.
"""

import dataclasses
import itertools
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary, train_sentencepiece
from t5x_domain.errors import UserError
from t5x_domain.objectives.masking import Lexicon, Paired, Spans, Uniform, WholeWord, corrupted

BYTES = ByteVocabulary(extra_ids=10)  # text is 3 … 258, sentinels are 268, 267, …
WORDS = ["heart", "hearts", "liver", "lung", "lungs", "plunge", "cancer", "of", "the", "chronic", "kidney's"]
MASKINGS = [Uniform(), WholeWord(), Spans(), Paired(), Lexicon(["lung cancer", "heart"])]
every_masking = pytest.mark.parametrize("masking", MASKINGS, ids=lambda masking: type(masking).__name__)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("masking") / "words.model")
    texts = [" ".join(np.random.default_rng(seed).choice(WORDS, 30)) + "." for seed in range(60)]
    train_sentencepiece(texts, path, 285)
    return Vocabulary(path, extra_ids=10)


def rng(seed=0):
    return np.random.default_rng(seed)


def text(num_tokens, seed=0):
    return rng(seed).integers(3, 259, num_tokens).astype(np.int32)


def runs(chosen):
    """Lengths of the stretches of neighbours that are chosen."""
    return [len(list(group)) for taken, group in itertools.groupby(chosen.tolist()) if taken]


def within(count, draws, probability):
    return abs(count - draws * probability) < 6 * math.sqrt(draws * probability * (1 - probability))


# --- All of them.


@every_masking
def test_the_same_generator_gives_the_same_positions(masking, pieces):
    tokens = pieces.encode(" ".join(WORDS * 30))
    first, again, other = (masking.positions(tokens, rng(seed), pieces) for seed in (1, 1, 2))
    assert first.dtype == bool and first.shape == tokens.shape
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    copy, vocabulary = pickle.loads(pickle.dumps((masking, pieces)))
    np.testing.assert_array_equal(copy.positions(tokens, rng(1), vocabulary), first)


@every_masking
def test_what_is_no_text_is_never_chosen(masking, pieces):
    """Padding, EOS between documents, the unknown piece and sentinels; a rate of nearly 1 chooses almost all else."""
    masking = dataclasses.replace(masking, rate=0.99)
    for vocabulary in (BYTES, pieces):
        tokens = vocabulary.encode("heart of the lung cancer " * 40)
        special = [0, 1, 2, vocabulary.sentinel_id(0), vocabulary.sentinel_id(9)]
        mixed = np.insert(tokens, rng().integers(0, len(tokens), 100), rng().choice(special, 100)).astype(np.int32)
        chosen = masking.positions(mixed, rng(), vocabulary)
        assert not chosen[np.isin(mixed, special)].any()
        assert chosen.sum() > 100
    assert not masking.positions(np.array(special, np.int32), rng(), vocabulary).any()
    assert masking.positions(np.array([], np.int32), rng(), vocabulary).shape == (0,)


# --- Uniform.


@pytest.mark.parametrize("rate, num_tokens, count", [(0.15, 100, 15), (0.15, 3, 1), (0.15, 1, 1), (0.25, 511, 128)])
def test_uniform_has_an_exact_count(rate, num_tokens, count):
    """round(n r): 127.75 -> 128, 0.45 -> the one that there is at least."""
    for seed in range(20):
        assert Uniform(rate).positions(text(num_tokens), rng(seed), BYTES).sum() == count


def test_uniform_counts_text_only():
    """100 tokens of text and 100 EOS: 15."""
    tokens = np.where(np.arange(200) % 2, 1, 50).astype(np.int32)
    assert Uniform(0.15).positions(tokens, rng(), BYTES).sum() == 15


def test_uniform_prefers_no_position():
    draws = 4000
    generator = rng()
    counts = sum(Uniform(0.15).positions(text(20), generator, BYTES).astype(int) for _ in range(draws))
    assert counts.sum() == 3 * draws
    assert all(within(count, draws, 0.15) for count in counts)


# --- Whole words.


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*WORDS, "日本", "x"]), min_size=1, max_size=60), st.integers(0, 2**32), st.booleans())
def test_whole_words_are_never_cut(pieces, words, seed, as_bytes):
    """Pieces of a word are those that the word has by itself, as SentencePiece never joins words."""
    vocabulary = BYTES if as_bytes else pieces
    parts = [vocabulary.encode((" " if as_bytes and i else "") + word) for i, word in enumerate(words)]
    tokens = np.concatenate(parts)
    np.testing.assert_array_equal(tokens, vocabulary.encode(" ".join(words)))
    chosen = WholeWord(0.3).positions(tokens, rng(seed), vocabulary)
    by_word = [set(part.tolist()) for part in np.split(chosen, np.cumsum([len(part) for part in parts])[:-1])]
    assert all(len(taken) == 1 for taken in by_word)
    assert sum(taken == {True} for taken in by_word) == max(1, round(0.3 * len(words)))


def test_whole_words_of_any_length_are_as_likely(pieces):
    """3 of 20 words in every draw; the piece of a word is chosen with probability 0.15, long word or short."""
    tokens, draws, generator = pieces.encode("of xylem " * 10), 4000, rng()
    assert len(pieces.encode("of")) < len(pieces.encode("xylem"))
    counts = sum(WholeWord(0.15).positions(tokens, generator, pieces).astype(int) for _ in range(draws))
    assert all(within(count, draws, 0.15) for count in counts)


def test_punctuation_belongs_to_the_word_before_it(pieces):
    tokens = pieces.encode("lungs. heart")
    for seed in range(10):
        chosen = WholeWord(0.5).positions(tokens, rng(seed), pieces)
        taken = pieces.decode(tokens[chosen])
        assert taken in ("lungs.", "heart")


# --- Spans.


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 300), st.sampled_from([0.1, 0.15, 0.5, 0.9]), st.sampled_from([1, 3, 8]), st.integers(0, 2**32))
def test_spans_have_exact_counts(num_tokens, rate, mean_length, seed):
    """round(n r) tokens in round(that / mean) spans, as far as a clean token stands between any two."""
    lengths = runs(Spans(rate, mean_length).positions(text(num_tokens), rng(seed), BYTES))
    masked = max(1, round(num_tokens * rate))
    assert sum(lengths) == masked
    assert len(lengths) == min(max(1, round(masked / mean_length)), num_tokens - masked + 1)


def test_mean_length_of_spans():
    """500 tokens: 75 in 25 spans, hence 3.0 on average; lengths differ."""
    lengths = runs(Spans(0.15, 3.0).positions(text(500), rng(), BYTES))
    assert np.mean(lengths) == 3.0 and len(lengths) == 25
    assert len(set(lengths)) > 3


def test_spans_are_placed_evenly():
    """Two spans of one token among five: 6 ways, the ends included, each with probability 1/6."""
    draws, generator = 6000, rng()
    masking, tokens = Spans(0.4, 1.0), text(5)
    found = [tuple(np.flatnonzero(masking.positions(tokens, generator, BYTES))) for _ in range(draws)]
    ways = [(a, b) for a in range(5) for b in range(a + 2, 5)]
    assert set(found) == set(ways) and len(ways) == 6
    assert all(within(found.count(way), draws, 1 / 6) for way in ways)


# --- Pairs.


class Drawn:
    """A generator that draws the given numbers."""

    def __init__(self, numbers):
        self.numbers = numbers

    def random(self, count):
        assert count == len(self.numbers)
        return np.array(self.numbers, float)


def test_pairs_by_hand():
    """Alone stand 0, 3, 8 and 12; 0 goes to 2, beside 3, and 8 to 11, beside 12."""
    before = [1, 0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 0, 1, 0, 0]
    after = [0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0]
    chosen = Paired(0.5).positions(text(15), Drawn(1.0 - np.array(before)), BYTES)
    assert chosen.astype(int).tolist() == after
    odd = Paired(0.5).positions(text(7), Drawn(1.0 - np.array([1, 0, 1, 0, 1, 0, 0])), BYTES)
    assert odd.astype(int).tolist() == [0, 1, 1, 0, 1, 0, 0]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=80))
def test_none_stands_alone_but_of_an_odd_number(before):
    chosen = Paired(0.5).positions(text(len(before)), Drawn(1.0 - np.array(before)), BYTES)
    assert chosen.sum() == sum(before)
    assert runs(chosen).count(1) == runs(np.array(before)).count(1) % 2


def test_rate_of_pairs():
    assert within(Paired(0.2).positions(text(20_000), rng(), BYTES).sum(), 20_000, 0.2)


# --- A lexicon.

LUNGS = "lung of the lung cancer, lungs sublung plunge lung. Lung lung"


@pytest.mark.parametrize("as_bytes", [True, False])
def test_terms_are_found_as_whole_words(pieces, as_bytes):
    """The longest term first; not inside other words, nor with another case."""
    vocabulary = BYTES if as_bytes else pieces
    lexicon, tokens = Lexicon(["lung", "lung cancer"]), vocabulary.encode(LUNGS)
    found = lexicon.occurrences(tokens, vocabulary)
    assert [vocabulary.decode(tokens[start:stop]) for start, stop in found] == ["lung", "lung cancer", "lung", "lung"]


def test_terms_are_chosen_more_often_and_whole(pieces):
    """600 of each term, once with p = 0.5; of what is not a term every token with p = 0.1."""
    lexicon = Lexicon(["lung cancer", "plunge"], rate=0.5, rate_elsewhere=0.1)
    tokens = pieces.encode("the lung cancer of plunge lungs " * 600)
    found = lexicon.occurrences(tokens, pieces)
    assert len(found) == 1200
    chosen = lexicon.positions(tokens, rng(), pieces)
    inside = np.zeros(len(tokens), bool)
    for start, stop in found:
        inside[start:stop] = True
        assert len(set(chosen[start:stop].tolist())) == 1
    assert within(sum(chosen[start] for start, _ in found), 1200, 0.5)
    assert within(chosen[~inside].sum(), (~inside).sum(), 0.1)


def test_lexicon_from_a_file(tmp_path, pieces):
    path = tmp_path / "terms.txt"
    path.write_text("lung cancer\n\n  heart \nheart\n", encoding="utf-8")
    lexicon = Lexicon(file=str(path))
    assert lexicon.words == ("lung cancer", "heart")
    assert Lexicon(["liver"], file=str(path)).words == ("liver", "lung cancer", "heart")
    tokens = pieces.encode(LUNGS)
    assert lexicon.occurrences(tokens, pieces) == Lexicon(["lung cancer", "heart"]).occurrences(tokens, pieces)
    before = repr(lexicon)
    assert Lexicon(file=str(path)) == lexicon and repr(Lexicon(file=str(path))) == before
    path.write_text("lung\n", encoding="utf-8")
    assert Lexicon(file=str(path)) != lexicon and repr(Lexicon(file=str(path))) != before, "another list, another run"


def test_a_lexicon_that_finds_nothing(tmp_path, pieces):
    """The vocabulary has no piece for Japanese, only bytes; one word that it has is enough."""
    path = tmp_path / "terms.txt"
    path.write_text("日本\n肺\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"terms.txt: none of its 2 words \(日本, 肺\) can be written with the pieces"):
        Lexicon(file=str(path)).check(pieces)
    Lexicon(["heart"], file=str(path)).check(pieces)
    Lexicon(file=str(path)).check(BYTES)
    path.write_text("\n \n", encoding="utf-8")
    with pytest.raises(UserError, match=r"Lexicon.file=.*terms.txt has no word"):
        Lexicon(file=str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"Lexicon.file=.*terms.txt: cannot be read as UTF-8"):
        Lexicon(file=str(path))
    with pytest.raises(UserError, match=r"absent.txt: no such file .* mend Lexicon.file"):
        Lexicon(file=str(tmp_path / "absent.txt"))
    with pytest.raises(UserError, match="Lexicon.words has no word"):
        Lexicon()
    with pytest.raises(UserError, match="Lexicon.words='heart' must be a list"):
        Lexicon("heart")


# --- What becomes of the chosen tokens.


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.1), (0.85, 0.0, 0.15), (0.0, 1.0, 0.0)])
def test_shares(shares):
    """A random one of 256 bytes is the token itself once in 256 times, so p(kept) = kept + random / 256."""
    count = 100_000
    tokens = text(2 * count)
    chosen = np.arange(2 * count) % 2 == 0
    result = corrupted(tokens, chosen, shares, rng(1), BYTES)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result[~chosen], tokens[~chosen])
    masked, same = result[chosen] == BYTES.sentinel_id(0), result[chosen] == tokens[chosen]
    mask, random, kept = shares
    assert within(masked.sum(), count, mask) or masked.sum() == mask == 0
    assert within(same.sum(), count, kept + random / 256)
    replaced = result[chosen][~masked & ~same]
    if random:
        # 10,000 draws of 256 bytes: each comes 39 times on average, and is missing with probability e^-39.
        assert set(replaced.tolist()) == set(range(3, 259))
    else:
        assert not len(replaced)


def test_random_tokens_are_whole_pieces(pieces):
    """285 pieces less pad, EOS, unknown and 256 bytes are 26; sentinels stand above them."""
    tokens = np.full(20_000, 5, np.int32)
    result = corrupted(tokens, np.ones(20_000, bool), (0.0, 1.0, 0.0), rng(), pieces)
    assert sorted(set(result.tolist())) == list(range(259, 285))


def test_mask_token(pieces, tmp_path):
    """The first sentinel, the last id of all; a [MASK] of the vocabulary's own goes before it."""
    assert (BYTES.mask_id, pieces.mask_id) == (268, 294)
    assert pieces.decode([pieces.mask_id]) == "<extra_id_0>"
    path = str(tmp_path / "own.model")
    train_sentencepiece(["heart of the lungs"] * 5, path, 274, special_tokens=["[MASK]"])
    own = Vocabulary(path, extra_ids=0)
    assert own.mask_id == own.special_id("[MASK]") == 3
    assert not own.pieces.text[3] and own.pieces.text[4:].all()
    with pytest.raises(UserError, match="raise ByteVocabulary.extra_ids"):
        _ = ByteVocabulary(extra_ids=0).mask_id


# --- Mistakes.


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Uniform(0), "Uniform.rate=0 must be above 0 and at most 1"),
        (lambda: WholeWord(1.5), "WholeWord.rate=1.5 must be above 0"),
        (lambda: Spans(0.15, 0.5), "Spans.mean_length=0.5 must be at least 1"),
        (lambda: Spans(float("nan")), "Spans.rate=nan must be above 0"),
        (lambda: Paired(-0.1), "Paired.rate=-0.1"),
        (lambda: Lexicon(["a"], rate=0.1, rate_elsewhere=0.2), "Lexicon.rate_elsewhere=0.2 .* Lexicon.rate=0.1"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message):
        make()
