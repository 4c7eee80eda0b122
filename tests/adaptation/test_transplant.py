import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from t5x_domain.adaptation.transplant import Transplant, add_special_tokens, padded_size
from t5x_domain.conversion.checkpoint import Checkpoint, SecondMoments
from t5x_domain.conversion.tensors import Tensor
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary, train_sentencepiece
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import EncoderDecoder
from t5x_domain.models.config import ModelConfig

WORDS = ["heart", "hearts", "liver", "lives", "kidney", "kidneys", "disease", "of", "the", "and", "chronic", "acute"]
TEXTS = [" ".join(np.random.default_rng(seed).choice(WORDS, 30)) for seed in range(60)]
MODES = ["[R]", "[X]", "[S]"]

Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
# Ids 3, 4, …; every text has just one way to be written with them.
OLD = ["▁", "▁heart", "card", "itis", "a", "▁the", "[", "R", "]"]
NEW = ["▁the", "itis", "carditis", "▁carditis", "▁heart", "cardheart", "▁heartitis", "日"]


def written(path, pieces, *, bytes_too=False, dummy_prefix=True):
    """A SentencePiece model of just these pieces, all as likely."""
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    model.trainer_spec.pad_id, model.trainer_spec.eos_id, model.trainer_spec.unk_id = 0, 1, 2
    model.trainer_spec.bos_id, model.trainer_spec.byte_fallback = -1, bytes_too
    model.trainer_spec.pad_piece = "<pad>"
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = dummy_prefix
    for name, kind in (("<pad>", Piece.CONTROL), ("</s>", Piece.CONTROL), ("<unk>", Piece.UNKNOWN)):
        model.pieces.add(piece=name, type=kind)
    for byte in range(256 if bytes_too else 0):
        model.pieces.add(piece=f"<0x{byte:02X}>", type=Piece.BYTE)
    for piece in pieces:
        model.pieces.add(piece=piece, score=-1.0, type=Piece.NORMAL)
    Path(path).write_bytes(model.SerializeToString())
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabularies")


@pytest.fixture(scope="module")
def old(folder):
    return Vocabulary(written(folder / "old.model", OLD), extra_ids=2)


@pytest.fixture(scope="module")
def new(folder):
    return Vocabulary(written(folder / "new.model", NEW), extra_ids=3)


@pytest.fixture(scope="module")
def trained(folder):
    path = str(folder / "trained.model")
    train_sentencepiece(TEXTS, path, 280)
    return Vocabulary(path, extra_ids=5)


def table_of(vocabulary, extra_rows=0, dtype=np.float32, seed=0):
    shape = (vocabulary.vocab_size + extra_rows, 4)
    return np.random.default_rng(seed).normal(1.0, 2.0, shape).astype(dtype)


def rows_of(pieces):
    """Old ids of pieces in OLD."""
    return tuple(3 + OLD.index(piece) for piece in pieces)


def test_rows_by_meaning_worked_by_hand(old, new):
    """Old: 9 pieces 3..11, sentinels 1 and 0 at 12, 13. New: 8 pieces 3..10, sentinels 2, 1, 0 at 11, 12, 13."""
    plan = Transplant.plan(old, new)
    assert plan.rows == (
        (0,),
        (1,),
        (2,),
        rows_of(["▁the"]),
        rows_of(["itis"]),
        rows_of(["card", "itis"]),  # it goes on a word: no ▁ before it
        rows_of(["▁", "card", "itis"]),
        rows_of(["▁heart"]),
        rows_of(["card", "a"]),  # of "heart" inside a word only "a" can be written, and <unk> says nothing
        rows_of(["▁heart", "itis"]),
        (),  # cannot be written at all
        (12, 13),  # sentinel 2 is new: the mean of both old ones
        (12,),
        (13,),
    )
    assert plan.copied_ids == (0, 1, 2, 3, 4, 7, 12, 13)
    assert (plan.copied, plan.averaged) == (8, 6)
    assert plan.ordinary == tuple(range(3, 12))


def test_new_rows_are_means_and_copied_rows_the_same_bits(old, new):
    plan, table = Transplant.plan(old, new), table_of(old, extra_rows=2)
    result = plan.apply(table, 16)
    for number in plan.copied_ids:
        np.testing.assert_array_equal(result[number], table[plan.rows[number][0]])
    card, itis = table[[*rows_of(["card"]), *rows_of(["itis"])]]
    np.testing.assert_allclose(result[5], (card + itis) / 2, rtol=1e-6)
    np.testing.assert_allclose(result[11], (table[12] + table[13]) / 2, rtol=1e-6)
    for row in (10, 14, 15):  # what the old vocabulary cannot write, and two rows beyond the new one
        np.testing.assert_allclose(result[row], table[3:12].mean(axis=0), rtol=1e-6)


def test_without_old_sentinels_a_sentinel_is_the_mean_of_its_text(folder):
    old = Vocabulary(written(folder / "letters.model", ["▁", *"<>_0aditrex"]), extra_ids=0)
    plan = Transplant.plan(old, dataclasses.replace(old, extra_ids=1))
    assert [old._processor.id_to_piece(row) for row in plan.rows[-1]] == list("▁<extra_id_0>")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtype_is_kept_and_means_are_float32(old, new, dtype):
    """1 and 1 + 2^-7 are neighbours in bfloat16, and so is 256 from 258: a sum in bfloat16 would lose the 1s."""
    table = np.ones((old.vocab_size, 2), dtype)
    table[rows_of(["▁"])[0]] = 256
    result = Transplant.plan(old, new).apply(table, new.vocab_size)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result[6], np.full(2, 86, dtype))  # (256 + 1 + 1) / 3


def test_random_draws_what_mean_averages_and_nothing_else(trained, tmp_path):
    train_sentencepiece([*TEXTS, "pancreas gland tissue tumour " * 50], str(tmp_path / "other.model"), 290)
    other = Vocabulary(str(tmp_path / "other.model"), extra_ids=40)
    plan, table = Transplant.plan(trained, other), table_of(trained)
    num_rows = other.vocab_size + 3
    mean, drawn = (plan.apply(table, num_rows, init=init, seed=1) for init in ("mean", "random"))
    differs = np.flatnonzero((mean != drawn).any(axis=1))
    np.testing.assert_array_equal(differs, np.setdiff1d(np.arange(other.vocab_size), plan.copied_ids))
    np.testing.assert_array_equal(drawn, plan.apply(table, num_rows, init="random", seed=1))
    assert (drawn[differs] != plan.apply(table, num_rows, init="random", seed=2)[differs]).all()


def test_random_rows_have_the_mean_and_deviation_of_each_dimension(trained):
    """400 new sentinels: the mean of a dimension is 0.05 standard deviations off at most in 68 of 100 draws."""
    table = table_of(trained) * [1, 10, 0, 1] + [0, 5, 7, 0]
    plan = Transplant.plan(trained, dataclasses.replace(trained, extra_ids=405))
    drawn = plan.apply(table, 700, init="random")[280 : 280 + 400]
    ordinary = table[list(plan.ordinary)]
    assert len(ordinary) == 280 - 3 - 256
    np.testing.assert_allclose(drawn.mean(0), ordinary.mean(0), atol=0.2 * ordinary.std(0).max())
    np.testing.assert_allclose(drawn.std(0), ordinary.std(0), rtol=0.2)
    assert (drawn[:, 2] == 7).all()


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.lists(st.sampled_from(MODES), unique=True),
    extra_ids=st.integers(0, 9),
    padding=st.integers(0, 20),
    text=st.lists(st.sampled_from([*WORDS, "日本", "<extra_id_1>"]), max_size=8).map(" ".join),
)
def test_old_tokens_keep_their_logits_to_the_bit(trained, folder, tokens, extra_ids, padding, text):
    """A text has other ids after mode tokens and sentinels were added, but the same vectors and the same logits."""
    extended = add_special_tokens(trained, tokens, str(folder / "extended.model"))
    extended = dataclasses.replace(extended, extra_ids=trained.extra_ids + extra_ids)
    plan, table = Transplant.plan(trained, extended), table_of(trained, extra_rows=3)
    result = plan.apply(table, extended.vocab_size + padding)
    before, after = trained.encode(text), extended.encode(text)
    hidden = np.random.default_rng(len(text)).normal(size=4).astype(np.float32)
    np.testing.assert_array_equal(result[after], table[before])
    np.testing.assert_array_equal((result[after] * hidden).sum(1), (table[before] * hidden).sum(1))
    assert (plan.copied, plan.averaged) == (trained.vocab_size, len(tokens) + extra_ids)
    for token in tokens:
        pieces = table[trained.encode(token)]  # as the mode written in text, with its leading space
        np.testing.assert_allclose(result[extended.special_id(token)], pieces.mean(0), rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(old_ids=st.integers(0, 6), new_ids=st.integers(0, 6), old_bytes=st.booleans(), padding=st.integers(0, 5))
def test_back_again_gives_the_old_rows_back(trained, old_ids, new_ids, old_bytes, padding):
    """More or fewer sentinels and back: rows that both have come back to the bit."""
    base = ByteVocabulary() if old_bytes else trained
    old, new = (dataclasses.replace(base, extra_ids=count) for count in (old_ids, new_ids))
    table = table_of(old, extra_rows=padding)
    there = Transplant.plan(old, new).apply(table, new.vocab_size + padding)
    back = Transplant.plan(new, old).apply(there, old.vocab_size + padding)
    pieces = old.vocab_size - old_ids
    np.testing.assert_array_equal(back[:pieces], table[:pieces])
    for k in range(min(old_ids, new_ids)):
        np.testing.assert_array_equal(back[old.sentinel_id(k)], table[old.sentinel_id(k)])


def test_the_same_vocabulary_keeps_its_padding_rows(trained):
    table = table_of(trained, extra_rows=4)
    plan = Transplant.plan(trained, Vocabulary(trained.model_file, trained.extra_ids))
    assert plan.unchanged
    longer = plan.apply(table, len(table) + 2)
    np.testing.assert_array_equal(longer[:-2], table)
    np.testing.assert_allclose(longer[-2:], [table[list(plan.ordinary)].mean(0)] * 2, rtol=1e-6)
    np.testing.assert_array_equal(plan.apply(table, len(table) - 3), table[:-3])


def test_padding_rows_take_no_more_probability_than_the_average_token(old, new):
    """Logits of trained models lie far below 0 (here -20 ± 2), where a zero row would take it all."""
    rng = np.random.default_rng(0)
    hidden = np.ones(8)
    kernel = rng.normal(-20 / 8, 2 / np.sqrt(8), (old.vocab_size, 8))
    plan = Transplant.plan(old, new)
    padding = plan.apply(kernel.astype(np.float32), new.vocab_size + 1)[-1]
    average = np.exp(kernel[list(plan.ordinary)] @ hidden).mean()
    assert np.exp(padding @ hidden) <= average * (1 + 1e-4) < 1e-3 < np.exp(np.zeros(8) @ hidden)


def test_from_bytes_to_pieces(new):
    old = ByteVocabulary(extra_ids=3)
    plan = Transplant.plan(old, new)
    piece_ids = {piece: 3 + number for number, piece in enumerate(NEW)}
    for piece, text in (("itis", b"itis"), ("▁the", b" the"), ("日", "日".encode())):
        assert plan.rows[piece_ids[piece]] == tuple(3 + byte for byte in text)
    assert [plan.rows[new.sentinel_id(k)] for k in range(3)] == [(old.sentinel_id(k),) for k in range(3)]
    assert plan.ordinary == tuple(range(3, 259))


def test_from_pieces_to_bytes(old, trained):
    byte = {text: 3 + ord(text) for text in " aR"}
    plan = Transplant.plan(old, ByteVocabulary(extra_ids=2))
    assert [plan.rows[byte[text]] for text in " aR"] == [rows_of("▁"), rows_of("a"), rows_of("R")]
    assert plan.rows[3 + 0xE2] == ()
    assert plan.copied == 3 + 5 + 2  # ▁ a [ R ] are the single characters of OLD
    with_bytes = Transplant.plan(trained, ByteVocabulary())
    assert with_bytes.rows[3 + 0xE2] == (3 + 0xE2,)


def test_bytes_of_both_kinds_correspond(trained):
    """SentencePiece's byte pieces are 3..258, too, but `e` is a piece of its own there."""
    plan = Transplant.plan(ByteVocabulary(), trained)
    assert plan.rows[3:259] == tuple((number,) for number in range(3, 259))
    assert set(range(3, 259)) <= set(plan.copied_ids)


def test_new_byte_pieces_are_the_mean_of_all(old, folder):
    fallback = Vocabulary(written(folder / "bytes.model", OLD, bytes_too=True), extra_ids=2)
    plan = Transplant.plan(old, fallback)
    assert set(plan.rows[3:259]) == {()}
    assert plan.copied == old.vocab_size
    assert plan.ordinary == tuple(range(3, 12))
    assert Transplant.plan(fallback, old).ordinary == tuple(range(259, 268))  # bytes are hardly ever trained


def test_wrong_sizes_are_refused(old, new):
    plan, table = Transplant.plan(old, new), table_of(old)
    with pytest.raises(UserError, match="has 13 rows but its vocabulary 14 ids"):
        plan.apply(table[:-1], 14)
    with pytest.raises(UserError, match="13 rows .* too few for a vocabulary of 14 ids; set ModelConfig.vocab_size to"):
        plan.apply(table, 13)
    with pytest.raises(UserError, match="'zero' is not one of mean, random"):
        plan.apply(table, 14, init="zero")


@given(st.integers(1, 300_000), st.integers(1, 1024))
def test_padded_size(vocab_size, multiple):
    size = padded_size(vocab_size, multiple)
    assert size % multiple == 0
    assert size - multiple < vocab_size <= size


def test_special_tokens_are_added_once_and_no_text_is_encoded_as_them(trained, tmp_path):
    path = tmp_path / "new_folder" / "modes.model"
    extended = add_special_tokens(trained, MODES[:2], str(path))
    again = add_special_tokens(extended, [*MODES, MODES[2]], str(tmp_path / "again.model"))
    pieces = trained.vocab_size - trained.extra_ids
    assert [again.special_id(token) for token in MODES] == [pieces, pieces + 1, pieces + 2]
    assert again.vocab_size == trained.vocab_size + 3
    assert again.sentinel_id(0) == again.vocab_size - 1
    text = "[R] heart [X] <extra_id_0> 日本"
    assert not {pieces, pieces + 1, pieces + 2} & set(again.encode(text).tolist())
    assert again.decode(again.encode(text)) == text
    assert [file.name for file in path.parent.iterdir()] == ["modes.model"]
    np.testing.assert_array_equal(again.encode("heart of the liver"), trained.encode("heart of the liver"))


def test_special_tokens_that_cannot_be(trained, old, tmp_path):
    path = str(tmp_path / "modes.model")
    with pytest.raises(UserError, match="name another file"):
        add_special_tokens(trained, MODES, trained.model_file)
    for vocabulary, token in ((old, "card"), (old, "</s>"), (old, "")):
        with pytest.raises(UserError, match=f"'{token}' cannot be a token of its own"):
            add_special_tokens(vocabulary, ["[Q]", token], path)
    assert not Path(path).exists()


@pytest.fixture
def checkpoint(old):
    config = ModelConfig(vocab_size=16, embed_dim=4, num_heads=1, num_encoder_layers=1, num_decoder_layers=1)
    table = table_of(old, extra_rows=2)
    tensors = {"embedding/embedding": Tensor.of(table), "embedding/output": Tensor.of(-table)}
    tensors["decoder/norm/scale"] = Tensor.of(np.ones(4, np.float32))
    return Checkpoint("/some/model", EncoderDecoder, config, tensors, old, SecondMoments(7, {}), {"notes": ["Found."]})


def test_checkpoint_with_another_vocabulary(checkpoint, old, new):
    changed = checkpoint.with_vocabulary(new, 20)
    plan = Transplant.plan(old, new)
    for name in ("embedding/embedding", "embedding/output"):
        expected = plan.apply(checkpoint.tensors[name].read(), 20)
        assert changed.tensors[name].shape == expected.shape
        np.testing.assert_array_equal(changed.tensors[name].read(), expected)
        np.testing.assert_array_equal(changed.tensors[name].read((slice(3, 9),)), expected[3:9])
    assert changed.tensors["decoder/norm/scale"] is checkpoint.tensors["decoder/norm/scale"]
    assert (changed.config.vocab_size, changed.vocabulary, changed.second_moments) == (20, new, None)
    assert checkpoint.config.vocab_size == 16
    assert changed.facts["notes"] == [
        "Found.",
        "Embedding fitted to a vocabulary of 14 ids: 8 rows copied, 6 averaged; the optimizer's state was left behind.",
    ]


def test_checkpoint_tables_are_drawn_apart(checkpoint, new):
    """With the same draws the new rows of an untied output would be those of the input, scaled."""
    changed = checkpoint.with_vocabulary(new, 14, init="random", seed=3)
    inputs, outputs = (
        changed.tensors[f"embedding/{name}"].read()[[5, 6, 8, 9, 10, 11]] for name in ("embedding", "output")
    )
    standard = [(rows - rows.mean(0)) / rows.std(0) for rows in (inputs, outputs)]
    assert np.abs(standard[0] - standard[1]).max() > 0.5
    assert np.abs(standard[0] + standard[1]).max() > 0.5


def test_checkpoint_of_a_tied_model(checkpoint, new):
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name != "embedding/output"}
    changed = dataclasses.replace(checkpoint, tensors=tensors).with_vocabulary(new, 14)
    assert changed.tensors.keys() == tensors.keys()


def test_checkpoint_keeps_what_is_unchanged(checkpoint, old, folder):
    assert checkpoint.with_vocabulary(Vocabulary(old.model_file, 2), 16) is checkpoint
    longer = checkpoint.with_vocabulary(old, 24)
    assert longer.second_moments is None
    np.testing.assert_array_equal(
        longer.tensors["embedding/output"].read()[:16], checkpoint.tensors["embedding/output"].read()
    )
    assert checkpoint.with_vocabulary(dataclasses.replace(old, extra_ids=3), 16).second_moments is None
    # The same pieces in a file of other bytes.
    twin = Vocabulary(written(folder / "twin.model", OLD, dummy_prefix=False), extra_ids=2)
    assert checkpoint.with_vocabulary(twin, 16).second_moments is checkpoint.second_moments


def test_checkpoint_errors_come_before_anything_is_read(checkpoint, new):
    with pytest.raises(UserError, match="/some/model: its vocabulary is not known"):
        dataclasses.replace(checkpoint, vocabulary=None).with_vocabulary(new, 20)
    with pytest.raises(UserError, match="set ModelConfig.vocab_size to 14 or more"):
        checkpoint.with_vocabulary(new, 13)
    with pytest.raises(UserError, match="init_embedding='zeros'"):
        checkpoint.with_vocabulary(new, 20, init="zeros")
