import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary, train_sentencepiece
from t5x_domain.errors import UserError

WORDS = ["heart", "hearts", "liver", "lives", "kidney", "kidneys", "disease", "of", "the", "and", "chronic", "acute"]
TEXTS = [" ".join(np.random.default_rng(seed).choice(WORDS, 30)) for seed in range(60)]
PIECES = 280  # 3 special ids, 256 bytes, 21 pieces learnt


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("vocabulary") / "new_folder" / "words.model")
    train_sentencepiece(TEXTS, path, PIECES)
    return path


def test_ids_follow_t5(model_file):
    vocabulary = Vocabulary(model_file, extra_ids=7)
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    assert vocabulary.vocab_size == PIECES + 7
    assert [vocabulary.sentinel_id(k) for k in (0, 6)] == [PIECES + 6, PIECES]
    np.testing.assert_array_equal(vocabulary.sentinel_id(np.arange(3)), PIECES + 6 - np.arange(3))


def test_sentinels_encode_and_decode_as_their_names(model_file):
    vocabulary = Vocabulary(model_file, extra_ids=7)
    ids = np.concatenate([vocabulary.encode("heart"), [vocabulary.sentinel_id(0)], vocabulary.encode("liver"), [1, 0]])
    assert vocabulary.decode(ids) == "heart <extra_id_0> liver"
    assert vocabulary.sentinel_id(6) in vocabulary.encode("the <extra_id_6> and")


def test_missing_sentinel_is_an_error(model_file):
    for vocabulary in (Vocabulary(model_file, extra_ids=7), ByteVocabulary(extra_ids=7)):
        with pytest.raises(UserError, match="sentinel 7 is needed but .* extra_ids=7"):
            vocabulary.sentinel_id(np.arange(8))


def test_text_outside_the_training_text_falls_back_to_bytes(model_file):
    vocabulary = Vocabulary(model_file)
    ids = vocabulary.encode("Ünseen 日本")
    assert vocabulary.unk_id not in ids
    assert vocabulary.decode(ids) == "Ünseen 日本"
    assert ids.dtype == np.int32


def test_training_is_deterministic_and_depends_on_the_text(model_file, tmp_path):
    train_sentencepiece(iter(TEXTS), str(tmp_path / "same.model"), PIECES)
    train_sentencepiece([*TEXTS, "pancreas " * 50], str(tmp_path / "other.model"), PIECES)
    first, same, other = (
        Path(path).read_bytes() for path in (model_file, tmp_path / "same.model", tmp_path / "other.model")
    )
    assert first == same
    assert first != other
    assert {path.name for path in tmp_path.iterdir()} == {"same.model", "other.model"}


def test_long_documents_are_learnt_from(tmp_path):
    """SentencePiece leaves out lines above its limit of 4,192 bytes, so a one-line book would teach nothing."""
    train_sentencepiece(["zygote " * 5000], str(tmp_path / "long.model"), 270)
    assert len(Vocabulary(str(tmp_path / "long.model")).encode("zygote")) == 1


def test_identity_normalization_keeps_the_text(tmp_path):
    path = str(tmp_path / "identity.model")
    train_sentencepiece(TEXTS, path, PIECES, normalization="identity")
    text = "  heart\n\tﬁne  liver "
    assert Vocabulary(path).decode(Vocabulary(path).encode(text)) == text


def test_what_ids_stand_for(model_file):
    """pad, end, unknown | 256 single bytes | 21 pieces learnt | 7 sentinels."""
    vocabulary = Vocabulary(model_file, extra_ids=7)
    kinds = vocabulary.pieces
    assert kinds.text.tolist() == [False] * 3 + [True] * 277 + [False] * 7
    assert kinds.characters.tolist() == [False] * 259 + [True] * 21 + [False] * 7
    ids = vocabulary.encode("hearts, hearts é")
    begins = [vocabulary.decode([10, i])[1:].startswith(" ") for i in ids.tolist()]  # 10 is a byte of no word
    assert kinds.begins_word[ids].tolist() == begins and begins.count(True) == 3
    comma, *accent = vocabulary.encode(",é")[1:].tolist()
    assert not kinds.goes_on[comma] and kinds.goes_on[accent].all() and len(accent) == 2
    assert not kinds.goes_on[kinds.begins_word].any()


def test_what_bytes_stand_for():
    vocabulary = ByteVocabulary(extra_ids=7)
    kinds = vocabulary.pieces
    assert kinds.text.tolist() == kinds.characters.tolist() == [False] * 3 + [True] * 256 + [False] * 7
    ids = vocabulary.encode("a b\n9é-")
    assert kinds.begins_word[ids].astype(int).tolist() == [0, 1, 0, 1, 0, 0, 0, 0]
    assert kinds.goes_on[ids].astype(int).tolist() == [1, 0, 1, 0, 1, 1, 1, 0]


MODES = ["[R]", "[X]", "[S]"]
TEXTS_WITH_MODES = [*TEXTS, "[ R ] [ X ] [ S ] [R] [X] [S] " * 20]
PIECES_WITH_MODES = 290


@pytest.fixture(scope="module")
def with_modes(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("modes") / "modes.model")
    train_sentencepiece(TEXTS_WITH_MODES, path, PIECES_WITH_MODES, special_tokens=MODES)
    return path


def test_special_tokens_have_ids_of_their_own(with_modes):
    """They count among the pieces, behind pad, end and unknown; sentinels stay on top."""
    vocabulary = Vocabulary(with_modes, extra_ids=7)
    assert [vocabulary.special_id(token) for token in MODES] == [3, 4, 5]
    assert vocabulary.vocab_size == PIECES_WITH_MODES + 7
    assert [vocabulary.sentinel_id(k) for k in (0, 6)] == [PIECES_WITH_MODES + 6, PIECES_WITH_MODES]
    assert vocabulary.decode([vocabulary.sentinel_id(0)]) == "<extra_id_0>"
    clone = pickle.loads(pickle.dumps(vocabulary))
    assert [clone.special_id(token) for token in MODES] == [3, 4, 5]
    assert [Vocabulary(with_modes, extra_ids=0).special_id(token) for token in MODES] == [3, 4, 5]


@pytest.mark.parametrize("text", [*MODES, "[R]heart", "heart [X] liver", "▁[S]", "[R][X][S]", "[R] <extra_id_0> [S]"])
def test_no_text_is_encoded_as_a_special_token(with_modes, text):
    """Nor are the learnt pieces made of them: the training text has the tokens' letters often."""
    vocabulary = Vocabulary(with_modes, extra_ids=7)
    ids = vocabulary.encode(text)
    assert not set(ids.tolist()) & {0, 1, 2, 3, 4, 5}
    assert vocabulary.decode(ids) == text.replace("▁", "").strip()
    assert ids.tolist() == vocabulary.as_seqio().encode(text)


def test_special_tokens_change_the_vocabulary(with_modes, tmp_path):
    train_sentencepiece(TEXTS_WITH_MODES, str(tmp_path / "without.model"), PIECES_WITH_MODES)
    without = Vocabulary(str(tmp_path / "without.model"), extra_ids=7)
    vocabulary = Vocabulary(with_modes, extra_ids=7)
    assert vocabulary.fingerprint != without.fingerprint
    assert without.vocab_size == vocabulary.vocab_size
    text = "heart disease of the kidneys"
    assert vocabulary.decode([3, *vocabulary.encode(text), 1]) == without.decode(without.encode(text)) == text


def test_missing_special_token(model_file, with_modes):
    message = (
        r"mode token missing in the vocabulary: .* no id of its own for '\[R\]'; train a .*`prepare`.*mode_form='text'"
    )
    for vocabulary in (Vocabulary(model_file, 7), ByteVocabulary(7)):
        with pytest.raises(UserError, match=message):
            vocabulary.special_id("[R]")
    # Pieces of text, sentinels and T5's own ids are no mode tokens.
    for token in ("▁of", "a", "▁<extra_id_0>", "<pad>", "</s>", "<unk>", "<0x41>", "[r]", ""):
        with pytest.raises(UserError, match="mode token missing"):
            Vocabulary(with_modes, 7).special_id(token)


def test_impossible_sizes_name_the_possible_one(tmp_path):
    path = tmp_path / "words.model"
    with pytest.raises(UserError, match=r"vocabulary_size=5000 is too large .* at most (\d+) pieces") as error:
        train_sentencepiece(TEXTS, str(path), 5000)
    largest = int(str(error.value).split("at most ")[1].split()[0])
    with pytest.raises(UserError, match="too small.* at least 2"):  # 256 bytes and more
        train_sentencepiece(TEXTS, str(path), 100)
    assert not path.exists()
    train_sentencepiece(TEXTS, str(path), largest)
    assert Vocabulary(str(path), 0).vocab_size == largest


def test_no_text_and_bad_documents(tmp_path):
    def documents():
        yield from TEXTS
        raise UserError("corpus.jsonl, line 3")

    with pytest.raises(UserError, match="hold no text"):
        train_sentencepiece(["", " \n "], str(tmp_path / "x.model"), PIECES)
    with pytest.raises(UserError, match="^corpus.jsonl, line 3$"):
        train_sentencepiece(documents(), str(tmp_path / "x.model"), PIECES)
    assert not list(tmp_path.iterdir())


def test_unreadable_models(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"\xff not a model")
    with pytest.raises(UserError, match="missing.model: cannot read .*t5x_domain.prepare"):
        Vocabulary(str(tmp_path / "missing.model")).vocab_size  # noqa: B018
    with pytest.raises(UserError, match="bad.model: not a SentencePiece model"):
        Vocabulary(str(tmp_path / "bad.model")).encode("a")


def test_other_special_ids_are_refused(tmp_path):
    import sentencepiece

    prefix = str(tmp_path / "default")  # SentencePiece's own default: unk 0, bos 1, eos 2, no pad
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=prefix, vocab_size=40, minloglevel=2, hard_vocab_limit=False
    )
    with pytest.raises(UserError, match=r"have ids \(-1, 2, 0\) but T5 needs \(0, 1, 2\)"):
        Vocabulary(prefix + ".model").vocab_size  # noqa: B018


def test_fingerprint_and_pickle(model_file, tmp_path):
    vocabulary = Vocabulary(model_file, 7)
    copy = tmp_path / "moved.model"
    copy.write_bytes(Path(model_file).read_bytes())
    assert vocabulary.fingerprint == Vocabulary(str(copy), 7).fingerprint
    assert vocabulary.fingerprint != Vocabulary(model_file, 8).fingerprint
    assert ByteVocabulary(7).fingerprint != ByteVocabulary(8).fingerprint
    vocabulary.encode("loaded")
    clone = pickle.loads(pickle.dumps(vocabulary))
    assert clone == vocabulary
    np.testing.assert_array_equal(clone.encode(TEXTS[0]), vocabulary.encode(TEXTS[0]))


def test_bytes():
    vocabulary = ByteVocabulary(extra_ids=100)
    assert vocabulary.vocab_size == 3 + 256 + 100
    np.testing.assert_array_equal(vocabulary.encode("aé"), [97 + 3, 0xC3 + 3, 0xA9 + 3])
    assert vocabulary.decode([100, vocabulary.sentinel_id(1), 100, 1, 0]) == "a<extra_id_1>a"


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_keep_every_text(text):
    vocabulary = ByteVocabulary()
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_as_seqio_has_equal_ids(model_file):
    texts = [*TEXTS[:5], "Ünseen 日本", "a <extra_id_3> b", "", "two\nlines  and   spaces"]
    for ours in (Vocabulary(model_file, 7), ByteVocabulary(7)):
        theirs = ours.as_seqio()
        assert theirs.vocab_size == ours.vocab_size
        for text in texts:
            ids = ours.encode(text).tolist()
            assert ids == list(theirs.encode(text)) == theirs.encode_tf(text).numpy().tolist()
            assert ours.decode(ids) == theirs.decode(ids)
