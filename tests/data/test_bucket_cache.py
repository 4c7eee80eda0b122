"""A token cache in a bucket: written there, resumed there, and read from there by copies of what is needed."""

import json
import os
import tempfile

import numpy as np
import pytest
from bucket import in_memory

from t5x_domain import files
from t5x_domain.data import cache
from t5x_domain.data.cache import TokenCache
from t5x_domain.data.pipeline import CacheWriter, write_cache
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Corpus
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary, train_sentencepiece
from t5x_domain.errors import UserError

BEAM = ["--runner=DirectRunner", "--direct_num_workers=1", "--direct_running_mode=in_memory"]
TEXTS = [f"Section {i}: nobody shall act {i}." for i in range(60)]
bucket = pytest.fixture(in_memory)


@pytest.fixture
def law(bucket):
    """A corpus of two files in a bucket."""
    for number in (0, 1):
        lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(TEXTS)][number::2]
        files.path(f"gs://data/law-{number}.jsonl").write_text("\n".join(lines) + "\n")
    return Corpus("law", JsonlSource({"train": "gs://data/law-*.jsonl"}))


def copies():
    """Files of this process below its scratch folder."""
    scratch = [name for name in os.listdir(tempfile.gettempdir()) if name.startswith(f"t5x_domain-{os.getpid()}-")]
    return [name for folder in scratch for *_, names in os.walk(f"{tempfile.gettempdir()}/{folder}") for name in names]


@pytest.mark.parametrize("beam_flags", [None, BEAM], ids=["in_process", "beam"])
def test_same_bytes_as_on_a_disk(law, bucket, tmp_path, beam_flags):
    before = copies()
    train_sentencepiece(TEXTS, "gs://caches/law.model", 288)
    vocabulary = Vocabulary("gs://caches/law.model")
    write_cache(law, vocabulary, tmp_path, num_shards=4)
    write_cache(law, vocabulary, "gs://caches", num_shards=4, beam_flags=beam_flags)
    ours = {name.removeprefix("caches/law/"): data for name, data in bucket().items() if "caches/law/" in name}
    assert ours == {path.name: path.read_bytes() for path in (tmp_path / "law").iterdir()}
    remote = TokenCache.open("gs://caches", "law", vocabulary_fingerprint=vocabulary.fingerprint)
    remote.verify()
    split, local = remote.split("train"), TokenCache.open(tmp_path, "law").split("train")
    np.testing.assert_array_equal(split.offsets, local.offsets)
    for one, two in zip(split.documents(0, 60), local.documents(0, 60), strict=True):
        np.testing.assert_array_equal(one, two)
    assert split.metadata(0, 60) == local.metadata(0, 60)
    np.testing.assert_array_equal(split.derived("x", lambda: np.arange(3)), [0, 1, 2])
    np.testing.assert_array_equal(split.derived("x", lambda: np.zeros(3)), [0, 1, 2])
    assert copies() == before, "what is open or mapped has no name any more"


def test_reads_only_the_shards_it_needs(law, bucket, monkeypatch):
    write_cache(law, ByteVocabulary(), "gs://caches", num_shards=8)
    fetched = []
    download = type(files.path("gs://a")).download
    monkeypatch.setattr(
        type(files.path("gs://a")), "download", lambda path, to: (fetched.append(path.name), download(path, to))
    )
    split = TokenCache.open("gs://caches", "law").split("train")
    split.documents(0, 1)
    assert fetched == ["train-00000-of-00008.arrayrecord"]
    split.offsets[1]
    assert fetched[1:] == ["train-lengths-00000-of-00008.npy"]
    monkeypatch.setattr(cache, "_MOST_READERS", 2)
    split.documents(0, 60)
    assert len(split._readers) == 2 and len(fetched) == 1 + 1 + 7
    split.documents(0, 1)
    assert fetched[-1] == "train-00000-of-00008.arrayrecord", "which had given up its place"


def test_goes_on_where_it_was_interrupted(law, bucket, monkeypatch, tmp_path, capsys):
    write, done = CacheWriter.write, []

    def stops(writer, *shard):
        if len(done) == 3:
            raise RuntimeError("the machine is gone")
        done.append(shard)
        write(writer, *shard)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(CacheWriter, "write", stops)
        write_cache(law, ByteVocabulary(), "gs://caches", num_shards=4)
    with pytest.raises(UserError, match="gs://caches/law: the token cache was interrupted while it was written"):
        TokenCache.open("gs://caches", "law")
    write_cache(law, ByteVocabulary(), "gs://caches", num_shards=4)
    assert "with 0 of 2 tasks and 1 of 4 shards to do" in capsys.readouterr().err
    write_cache(law, ByteVocabulary(), tmp_path, num_shards=4)
    ours = {name.removeprefix("caches/law/"): data for name, data in bucket().items() if "caches/law/" in name}
    assert ours == {path.name: path.read_bytes() for path in (tmp_path / "law").iterdir()}


def test_writes_again_but_not_over_other_things(law, bucket):
    files.path("gs://caches/law/deeds.pdf").write_text("mine")
    with pytest.raises(
        UserError, match="gs://caches/law: holds files that are no token cache; choose another CACHE_DIR"
    ):
        write_cache(law, ByteVocabulary(), "gs://caches", num_shards=4)
    files.path("gs://caches/law/deeds.pdf").unlink()
    write_cache(law, ByteVocabulary(), "gs://caches", num_shards=4)
    write_cache(law, ByteVocabulary(extra_ids=7), "gs://caches", num_shards=2)
    names = [name for name in bucket() if name.startswith("caches/law/")]
    assert len(names) == 1 + 2 * 2
    TokenCache.open("gs://caches", "law", vocabulary_fingerprint=ByteVocabulary(extra_ids=7).fingerprint).verify()


def fails_at(monkeypatch, method, nth):
    """The n-th call of a method of paths in buckets finds the machine gone."""
    path, calls = type(files.path("gs://a")), []
    original = getattr(path, method)

    def patched(*arguments, **options):
        calls.append(arguments)
        if len(calls) == nth:
            raise RuntimeError("the machine is gone")
        return original(*arguments, **options)

    monkeypatch.setattr(path, method, patched)


@pytest.mark.parametrize("nth", range(1, 7))
def test_killed_while_it_clears_an_old_cache(law, bucket, monkeypatch, nth):
    """The manifest, then four files of two shards, are removed, and in the end the plan."""
    write_cache(law, ByteVocabulary(extra_ids=7), "gs://caches", num_shards=2)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        fails_at(patched, "unlink", nth)
        write_cache(law, ByteVocabulary(), "gs://caches", num_shards=2)
    write_cache(law, ByteVocabulary(), "gs://caches", num_shards=2)
    TokenCache.open("gs://caches", "law", vocabulary_fingerprint=ByteVocabulary().fingerprint).verify()
    assert len([name for name in bucket() if name.startswith("caches/law/")]) == 1 + 2 * 2


def test_killed_while_it_clears_up(law, bucket, monkeypatch):
    """The cache is whole, and kept by whoever finds it; but who is told to overwrite it does."""
    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        fails_at(patched, "rmtree", 1)
        write_cache(law, ByteVocabulary(), "gs://caches", num_shards=2)
    TokenCache.open("gs://caches", "law").verify()
    lengths = files.path("gs://caches/law/train-lengths-00000-of-00002.npy")
    lengths.write_text("damaged")
    write_cache(law, ByteVocabulary(), "gs://caches", num_shards=2, overwrite=True)
    TokenCache.open("gs://caches", "law").verify()
    assert len([name for name in bucket() if name.startswith("caches/law/")]) == 1 + 2 * 2


def test_another_process_has_finished_first(law, bucket, monkeypatch):
    write, others = CacheWriter.write, []

    def meanwhile(writer, *shard):
        if not others:
            others.append(shard)
            write_cache(law, ByteVocabulary(), "gs://caches", num_shards=2)
        write(writer, *shard)

    monkeypatch.setattr(CacheWriter, "write", meanwhile)
    with pytest.raises(UserError, match="gs://caches/law: what was written is gone .* another `prepare` has finished"):
        write_cache(law, ByteVocabulary(), "gs://caches", num_shards=2)
    TokenCache.open("gs://caches", "law").verify()


def test_files_of_a_source_are_asked_for_once(law, bucket, monkeypatch):
    """Their sizes come with their names: one listing, whatever the number of files."""
    asked = []
    path = type(files.path("gs://a"))
    call = path._call
    monkeypatch.setattr(path, "_call", lambda self, method, **how: asked.append(method) or call(self, method, **how))
    parts = law.source.describe()["parts"]["train"]
    assert [name for name, _ in parts] == ["law-0.jsonl", "law-1.jsonl"] and min(size for _, size in parts) > 1000
    assert asked == ["glob"]


def test_damage_is_found_when_a_shard_is_read(law, bucket):
    write_cache(law, ByteVocabulary(), "gs://caches", num_shards=2)
    shard = files.path("gs://caches/law/train-00001-of-00002.arrayrecord")
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(bytes(content))
    split = TokenCache.open("gs://caches", "law").split("train")
    split.documents(0, 1)
    with pytest.raises(UserError, match="train-00001-of-00002.arrayrecord: damaged"):
        split.documents(59, 60)
