import base64
import dataclasses
import gzip
import json
import math
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer

from t5x_domain.conversion.tokenizer import read_vocabulary, write_tokenizer
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary, train_sentencepiece
from t5x_domain.errors import UserError

SAMPLES = sorted(Path("data/sample").glob("*.jsonl.gz"))
MODES = ("[NLU]", "[S2S]")
EXTRA_IDS = 20
KINDS = ("nmt_nfkc", "identity", "bytes")


def sample_texts(count):
    """Passages of the first texts of each file of the sample."""
    texts = []
    for path in SAMPLES:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts += [json.loads(next(file))["text"][:2000] for _ in range(count)]
    return texts


@dataclasses.dataclass
class Case:
    folder: Path
    vocabulary: Vocabulary | ByteVocabulary

    def __post_init__(self):
        self.folder.mkdir(parents=True)
        write_tokenizer(self.folder, self.vocabulary, start_token=False)
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def ids(self, text):
        return self.tokenizer.encode(text).ids

    def agrees(self, text):
        return self.ids(text) == [*self.vocabulary.encode(text), 1]

    def score(self, ids):
        pieces = ModelProto.FromString(model_bytes(self)).pieces
        return math.fsum(pieces[index].score for index in ids)

    def decodes(self, text):
        ids = self.vocabulary.encode(text).tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=False) == self.vocabulary.decode(ids)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    made = {"bytes": Case(root / "bytes", ByteVocabulary(EXTRA_IDS))}
    for rule in ("nmt_nfkc", "identity"):
        model_file = str(root / f"{rule}.model")
        train_sentencepiece(sample_texts(400), model_file, 1500, special_tokens=MODES, normalization=rule)
        made[rule] = Case(root / rule, Vocabulary(model_file, EXTRA_IDS))
    return made


# Texts that are written alike in both: characters by themselves, without marks that join the one before them.
LATIN = ["heart", "disease", "2,000", "ﬁne", "½", "①", "é", "ß", "İ", "<0x0A>", "<0x", "[NL", "<extra_id_", ".", "("]
WORDS = st.sampled_from([*LATIN, "日本", "ｶ", "が", "각", "😀", "～", "…", "\x00", "\x07", "\u200b", "0", "-"])
SPACES = st.sampled_from([" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "▁", ""])
TEXTS = st.lists(st.tuples(SPACES, WORDS, SPACES)).map(lambda parts: "".join(map("".join, parts)))


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@settings(max_examples=300, deadline=None)
def test_texts_have_our_ids_and_decode_to_our_text(cases, kind, text):
    assert cases[kind].agrees(text)
    assert cases[kind].decodes(text)


CHARACTERS = st.characters(exclude_categories=("Cs", "M", "Lm", "Sk", "Cf"), max_codepoint=0x10FF)
SPECIAL = re.compile(r"<(pad|/s|unk|extra_id_\d+)>|\[NLU\]|\[S2S\]")


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(CHARACTERS).filter(lambda text: not SPECIAL.search(text)))
@settings(max_examples=300, deadline=None)
def test_characters_have_our_ids(cases, kind, text):
    assert cases[kind].agrees(text)


@pytest.mark.parametrize("kind", KINDS)
def test_passages_of_the_sample_have_our_ids(cases, kind):
    case = cases[kind]
    lines = [line for text in sample_texts(1000) for line in (text, *text.splitlines())]
    assert len(lines) > 2000
    assert [line for line in lines if not case.decodes(line)] == []
    other = [line for line in lines if not case.agrees(line)]
    assert len(other) <= len(lines) // 1000
    for line in other:  # SentencePiece adds float32 numbers, whose 24 bits are good to six digits
        ours, theirs = (case.score(ids) for ids in (case.vocabulary.encode(line), case.ids(line)))
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_sentinels_have_our_ids(cases, kind):
    case = cases[kind]
    for k in (0, 7, EXTRA_IDS - 1):
        assert case.tokenizer.token_to_id(f"<extra_id_{k}>") == case.vocabulary.sentinel_id(k)
    assert case.tokenizer.get_vocab_size() == case.vocabulary.vocab_size
    assert case.tokenizer.token_to_id(f"<extra_id_{EXTRA_IDS}>") is None


@pytest.mark.parametrize("kind", ["nmt_nfkc", "identity"])
@given(words=st.lists(st.sampled_from(["heart", "disease,", "<extra_id_0>", "<extra_id_7>", "ß"]), max_size=8))
@settings(max_examples=100, deadline=None)
def test_texts_with_sentinels_have_our_ids_and_decode_to_our_text(cases, kind, words):
    assert cases[kind].agrees(" ".join(words))
    assert cases[kind].decodes(" ".join(words))


@pytest.mark.parametrize("kind", ["nmt_nfkc", "identity"])
def test_mode_token_and_a_space_stand_for_its_id_before_the_text(cases, kind):
    case = cases[kind]
    mode = case.vocabulary.special_id("[S2S]")
    assert case.ids("[S2S] heart disease") == [mode, *case.vocabulary.encode("heart disease"), 1]
    assert mode not in case.vocabulary.encode("[S2S] heart disease")  # why the docstring names this


def test_sentinel_in_bytes_is_read_as_one_token(cases):
    case = cases["bytes"]
    assert case.ids("a<extra_id_0>b") == [ord("a") + 3, 3 + 256 + EXTRA_IDS - 1, ord("b") + 3, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_start_token_instead_of_eos(cases, kind, tmp_path):
    vocabulary = cases[kind].vocabulary
    write_tokenizer(tmp_path, vocabulary, start_token=True)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("heart disease").ids == [0, *vocabulary.encode("heart disease")]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["bos_token"] == "<pad>"


def test_scores_are_read_exactly_by_a_reader_that_rounds_digits_and_power_apart(cases):
    text = (cases["nmt_nfkc"].folder / "tokenizer.json").read_text()
    written = re.findall(r",(-\d+)e-(\d+)\]", text)
    assert all(abs(int(digits)) < 2**63 for digits, _ in written)
    read = {float(digits) / 10.0 ** int(power) for digits, power in written}
    scores = {piece.score for piece in ModelProto.FromString(model_bytes(cases["nmt_nfkc"])).pieces}
    assert read < scores
    assert len(read) >= 0.99 * len(scores)  # a few values cannot be reached that way


def model_bytes(case):
    return (case.folder / "spiece.model").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_read(cases, kind, tmp_path):
    case = cases[kind]
    read = read_vocabulary(case.folder, tmp_path / "unused.model")
    assert read.fingerprint == case.vocabulary.fingerprint
    assert not (tmp_path / "unused.model").exists()


@pytest.mark.parametrize("kind", ["nmt_nfkc", "identity"])
def test_tokenizer_json_alone_gives_a_model_with_the_same_ids(cases, kind, tmp_path):
    case = cases[kind]
    shutil.copy(case.folder / "tokenizer.json", tmp_path)
    read = read_vocabulary(tmp_path, tmp_path / "made.model")
    assert read == Vocabulary(str(tmp_path / "made.model"), EXTRA_IDS)
    assert read.vocab_size == case.vocabulary.vocab_size
    assert [read.special_id(mode) for mode in MODES] == [case.vocabulary.special_id(mode) for mode in MODES]
    before, after = (ModelProto.FromString(x) for x in (model_bytes(case), (tmp_path / "made.model").read_bytes()))
    assert [(p.piece, p.score, p.type) for p in before.pieces] == [(p.piece, p.score, p.type) for p in after.pieces]
    for text in [*sample_texts(300), " a  b\n\nc ", "😀<0x0A> <extra_id_3> x"]:
        assert read.encode(text).tolist() == case.vocabulary.encode(text).tolist()


def write_json(folder, name, content):
    (folder / name).write_text(json.dumps(content))


def unigram(sentinels, **parts):
    """`tokenizer.json` in the form of released T5 files: a vocabulary of 7 pieces and these ids of sentinels."""
    pieces = [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["▁", -2.5], ["a", -1.5], ["▁a", -3.5], ["b", -4]]
    ordered = sorted(sentinels, key=sentinels.get)
    tokens = {"<pad>": 0, "</s>": 1, "<unk>": 2} | sentinels
    charsmap = base64.b64encode(b"").decode()
    return {
        "added_tokens": [{"id": index, "content": token, "special": True} for token, index in tokens.items()],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "Metaspace", "prepend_scheme": "always"}],
        },
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces + [[token, 0] for token in ordered]},
        **parts,
    }


def test_sentinels_may_be_listed_in_any_order(tmp_path):
    write_json(tmp_path, "tokenizer.json", unigram({"<extra_id_1>": 8, "<extra_id_2>": 7, "<extra_id_0>": 9}))
    vocabulary = read_vocabulary(tmp_path, tmp_path / "made.model")
    assert (vocabulary.vocab_size, vocabulary.num_sentinels, vocabulary.sentinel_id(0)) == (10, 3, 9)
    # '▁a' costs 3.5 and '▁', 'a' together 4; white space goes as WhitespaceSplit removes it.
    assert vocabulary.encode("  ab  a <extra_id_2>").tolist() == [5, 6, 5, 7]


def test_sentinels_numbered_upwards_are_an_error(tmp_path):
    write_json(tmp_path, "tokenizer.json", unigram({"<extra_id_0>": 7, "<extra_id_1>": 8}))
    with pytest.raises(UserError, match="<extra_id_0> has id 7, .* must have id 8; number the sentinels"):
        read_vocabulary(tmp_path, tmp_path / "made.model")
    assert not (tmp_path / "made.model").exists()


def test_added_token_above_the_pieces_is_an_error(tmp_path):
    content = unigram({"<extra_id_0>": 7})
    content["added_tokens"].append({"id": 8, "content": "<mask>", "special": True})
    write_json(tmp_path, "tokenizer.json", content)
    with pytest.raises(UserError, match="added token '<mask>' has id 8"):
        read_vocabulary(tmp_path, tmp_path / "made.model")


@pytest.mark.parametrize(
    "config, extra_ids",
    [
        ({"tokenizer_class": "T5Tokenizer"}, 100),
        ({"tokenizer_class": "T5TokenizerFast", "extra_ids": 7}, 7),
        ({"tokenizer_class": "T5Tokenizer", "additional_special_tokens": ["<extra_id_1>", "<extra_id_0>", "<x>"]}, 2),
        ({"tokenizer_class": "T5Tokenizer", "extra_special_tokens": [{"content": "<extra_id_0>"}]}, 1),
        ({"tokenizer_class": "T5Tokenizer", "added_tokens_decoder": {"1500": {"content": "<extra_id_0>"}}}, 1),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, 0),
        (None, 100),
    ],
)
@pytest.mark.parametrize("name", ["spiece.model", "sentencepiece.bpe.model", "tokenizer.model"])
def test_sentinels_of_a_sentencepiece_model(cases, tmp_path, config, extra_ids, name):
    shutil.copy(cases["nmt_nfkc"].folder / "spiece.model", tmp_path / name)
    if config:
        write_json(tmp_path, "tokenizer_config.json", config)
    assert read_vocabulary(tmp_path, tmp_path / "unused") == Vocabulary(str(tmp_path / name), extra_ids)


def test_sentinels_inside_a_sentencepiece_model_are_taken_out(cases, tmp_path):
    """As in mT5, whose model holds its sentinels as its last pieces."""
    vocabulary = cases["nmt_nfkc"].vocabulary
    proto = ModelProto.FromString(model_bytes(cases["nmt_nfkc"]))
    for k in reversed(range(EXTRA_IDS)):
        proto.pieces.add(piece=f"▁<extra_id_{k}>", type=proto.SentencePiece.USER_DEFINED)
    (tmp_path / "spiece.model").write_bytes(proto.SerializeToString())
    write_json(tmp_path, "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0})
    read = read_vocabulary(tmp_path, tmp_path / "made.model")
    assert read == Vocabulary(str(tmp_path / "made.model"), EXTRA_IDS)
    text = "heart <extra_id_3> disease"
    assert read.encode(text).tolist() == vocabulary.encode(text).tolist()


@pytest.mark.parametrize(
    "config, extra_ids",
    [({}, 125), ({"extra_ids": 30}, 30), ({"added_tokens_decoder": {"259": "<extra_id_0>", "260": "<extra_id_1>"}}, 2)],
)
def test_byt5_by_its_class(tmp_path, config, extra_ids):
    listed = {index: {"content": token} for index, token in config.get("added_tokens_decoder", {}).items()}
    config = {"tokenizer_class": "ByT5Tokenizer"} | config | ({"added_tokens_decoder": listed} if listed else {})
    write_json(tmp_path, "tokenizer_config.json", config)
    assert read_vocabulary(tmp_path, tmp_path / "unused") == ByteVocabulary(extra_ids)


def test_a_folder_without_tokenizer_gives_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert read_vocabulary(tmp_path, tmp_path / "unused") is None


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}', "of type BPE; supported are"),
        ("tokenizer.json", json.dumps(unigram({}, normalizer={"type": "Lowercase"})), "step Lowercase; supported are"),
        ("tokenizer.json", '{"model": ', "tokenizer.json: not JSON"),
        ("tokenizer.model", "bytes of another kind", "tokenizer.model: not a SentencePiece model; supported are"),
    ],
)
def test_other_tokenizers_are_an_error(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_vocabulary(tmp_path, tmp_path / "made.model")


def test_special_tokens_at_other_ids_are_an_error(tmp_path):
    content = unigram({})
    content["model"]["vocab"][0], content["model"]["vocab"][1] = ["</s>", 0], ["<pad>", 0]
    write_json(tmp_path, "tokenizer.json", content)
    with pytest.raises(UserError, match=r"have ids \(1, 0, 2\) but T5 needs \(0, 1, 2\)"):
        read_vocabulary(tmp_path, tmp_path / "made.model")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda proto: setattr(proto.trainer_spec, "model_type", proto.trainer_spec.BPE), "is not a unigram model"),
        (lambda proto: setattr(proto.normalizer_spec, "add_dummy_prefix", False), "every word's space"),
        (lambda proto: setattr(proto.pieces[-1], "type", proto.SentencePiece.USER_DEFINED), "user-defined or unused"),
    ],
)
def test_a_model_that_tokenizer_files_cannot_say_is_an_error(cases, tmp_path, change, message):
    proto = ModelProto.FromString(model_bytes(cases["nmt_nfkc"]))
    change(proto)
    (tmp_path / "odd.model").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match=message):
        write_tokenizer(tmp_path, Vocabulary(str(tmp_path / "odd.model"), 3), start_token=False)
