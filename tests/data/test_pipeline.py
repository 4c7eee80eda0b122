import json

import pytest

from t5x_domain.data.cache import TokenCache
from t5x_domain.data.pipeline import write_cache
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Corpus
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary, train_sentencepiece
from t5x_domain.errors import UserError

BEAM = ["--runner=DirectRunner", "--direct_num_workers=1", "--direct_running_mode=in_memory"]
ENGINES = pytest.mark.parametrize("beam_flags", [None, BEAM], ids=["in_process", "beam"])


def corpus(tmp_path, *texts, **knobs):
    """A corpus of two files; records 0, 5, 10, … are of split test."""
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for number, path in enumerate(paths):
        records = [{"text": t, "id": i, "split": "train" if i % 5 else "test"} for i, t in enumerate(texts)][number::2]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    files = {split: [str(path) for path in paths] for split in ("train", "test")}
    return Corpus("law", JsonlSource(files, split_field="split", **knobs))


TEXTS = [f"Section {i}: nobody shall {'§' * (i % 4)} act {i}." for i in range(60)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@ENGINES
def test_documents_reach_the_cache(tmp_path, beam_flags):
    vocabulary = ByteVocabulary()
    write_cache(corpus(tmp_path, *TEXTS), vocabulary, tmp_path / "cache", num_shards=3, beam_flags=beam_flags)
    cache = TokenCache.open(tmp_path / "cache", "law", vocabulary_fingerprint=vocabulary.fingerprint, version=1)
    cache.verify()
    seen = {}
    for name in ("train", "test"):
        split = cache.split(name)
        fields, documents = (read(0, split.num_documents) for read in (split.metadata, split.documents))
        seen[name] = {f["id"]: vocabulary.decode(tokens) for f, tokens in zip(fields, documents, strict=True)}
        assert split.num_bytes == sum(len(text.encode()) for text in seen[name].values()) == split.num_tokens
    assert seen["test"] == {i: TEXTS[i] for i in range(0, 60, 5)}
    assert seen["train"] == {i: TEXTS[i] for i in range(60) if i % 5}
    assert cache.manifest["splits"]["train"]["metadata_fields"] == ["id"]
    assert cache.manifest["source"]["kind"] == "JsonlSource"
    assert cache.manifest["token_dtype"] == "<u2"


def test_both_engines_give_the_same_bytes(tmp_path):
    train_sentencepiece(TEXTS, str(tmp_path / "law.model"), 295)
    vocabulary = Vocabulary(str(tmp_path / "law.model"))
    law = corpus(tmp_path, *TEXTS, "", skip_bad_records=True)  # 20 shards for 12 test documents: some are empty
    for name, flags in (("one", None), ("two", BEAM), ("three", None)):
        write_cache(law, vocabulary, tmp_path / name, num_shards=20, beam_flags=flags)
    one, two, three = (contents(tmp_path / name / "law") for name in ("one", "two", "three"))
    assert len(one) == 1 + 2 * 2 * 20
    assert one == two
    assert one == three


@ENGINES
@pytest.mark.parametrize(
    "text, reason", [(" \n", "the text is empty or blank"), ("an <extra_id_0> in text", "the text contains a sentinel")]
)
def test_documents_without_usable_tokens(tmp_path, beam_flags, text, reason):
    train_sentencepiece(TEXTS, str(tmp_path / "law.model"), 295)
    vocabulary = Vocabulary(str(tmp_path / "law.model"))
    texts = [*TEXTS[:6], text]
    with pytest.raises(UserError, match=rf"^\S+a.jsonl, line 4: {reason}.* JsonlSource.skip_bad_records = True\.$"):
        write_cache(corpus(tmp_path, *texts), vocabulary, tmp_path / "cache", num_shards=2, beam_flags=beam_flags)
    assert not list((tmp_path / "cache").iterdir())
    law = corpus(tmp_path, *texts, skip_bad_records=True)
    write_cache(law, vocabulary, tmp_path / "cache", num_shards=2, beam_flags=beam_flags)
    train = TokenCache.open(tmp_path / "cache", "law").manifest["splits"]["train"]
    ((skipped, count),) = train["skipped"].items()
    assert reason in skipped and count == 1 and train["documents"] == 4


@ENGINES
def test_split_without_documents(tmp_path, beam_flags):
    law = corpus(tmp_path, "a test document", "", "", skip_bad_records=True)
    with pytest.raises(UserError, match="no document in split 'train'"):
        write_cache(law, ByteVocabulary(), tmp_path / "cache", num_shards=2, beam_flags=beam_flags)
    assert not list((tmp_path / "cache").iterdir())


def test_beam_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install 't5x_domain\[beam\]'"):
        write_cache(corpus(tmp_path, *TEXTS), ByteVocabulary(), tmp_path / "cache", num_shards=2, beam_flags=BEAM)


def test_shards_must_be_visible_under_their_path(tmp_path, monkeypatch):
    """A relative cache folder is made absolute, since a Beam worker may run elsewhere."""
    monkeypatch.chdir(tmp_path)
    write_cache(corpus(tmp_path, *TEXTS), ByteVocabulary(), "cache", num_shards=2)
    assert TokenCache.open(tmp_path / "cache", "law").split("test").num_documents == 12
