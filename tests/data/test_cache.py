import json
import os
import pickle
import shutil
import threading

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.data import cache
from t5x_domain.data.cache import TokenCache
from t5x_domain.errors import UserError

DOCUMENTS = [np.random.default_rng(i).integers(3, 60_000, 1 + i % 7, np.int32) for i in range(150)]
FINGERPRINT = "f" * 64


def write(cache_dir, documents=DOCUMENTS, num_shards=4, vocab_size=1 << 16, version=1):
    dtype = cache.token_dtype(vocab_size)
    records = [
        cache.encode_record(
            "law", "train", (0, i), tokens=tokens, num_bytes=10 + i, metadata={"id": i, "title": "§é"}, dtype=dtype
        )
        for i, tokens in enumerate(documents)
    ]
    with cache.writing(cache_dir, "law") as folder:
        shards = []
        for shard in range(num_shards):
            mine = [record for record in records if cache.shard_of(record, num_shards) == shard]
            shards.append(cache.write_shard(folder, "train", shard, num_shards, mine))
        totals = {count: sum(shard[count] for shard in shards) for count in ("documents", "tokens", "bytes")}
        manifest = {
            "corpus": "law",
            "version": version,
            "vocabulary": {"kind": "test", "fingerprint": FINGERPRINT},
            "token_dtype": dtype.str,
            "splits": {"train": {**totals, "metadata_fields": ["id", "title"], "shards": shards}},
        }
        cache.write_manifest(folder, manifest)
    return TokenCache.open(cache_dir, "law", vocabulary_fingerprint=FINGERPRINT, version=version)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cache")).split("train")


def test_everything_comes_back_once(split):
    ids = [fields["id"] for fields in split.metadata(0, split.num_documents)]
    assert sorted(ids) == list(range(len(DOCUMENTS))) and ids != sorted(ids)
    for i, tokens in zip(ids, split.documents(0, split.num_documents), strict=True):
        assert tokens.dtype == np.int32
        np.testing.assert_array_equal(tokens, DOCUMENTS[i])
    lengths = [len(DOCUMENTS[i]) for i in ids]
    np.testing.assert_array_equal(split.offsets, np.concatenate([[0], np.cumsum(lengths)]))
    assert np.asarray(split.offsets).dtype == np.int64
    assert split.num_tokens == split.offsets[-1]
    assert split.num_bytes == sum(10 + i for i in range(len(DOCUMENTS)))
    assert split.metadata(0, 1)[0]["title"] == "§é"


@given(st.data())
def test_ranges_equal_slices_of_the_whole(split, data):
    start = data.draw(st.integers(0, split.num_documents))
    stop = data.draw(st.integers(start, split.num_documents))
    whole = split.documents(0, split.num_documents)
    part = split.documents(start, stop)
    assert [tokens.tolist() for tokens in part] == [tokens.tolist() for tokens in whole[start:stop]]
    assert split.metadata(start, stop) == split.metadata(0, split.num_documents)[start:stop]


@pytest.mark.parametrize("start, stop", [(-1, 3), (3, 151), (5, 4)])
def test_ranges_outside_the_split(split, start, stop):
    with pytest.raises(IndexError, match="of 150 in law/train"):
        split.documents(start, stop)


def test_record_layout(tmp_path):
    """The stored bytes, written out by hand from the format's description."""
    for vocab_size, width in ((1 << 16, 2), ((1 << 16) + 1, 4)):
        opened = write(tmp_path, [np.array([5, 600], np.int32)], num_shards=1, vocab_size=vocab_size)
        record = ArrayRecordReader(str(opened.folder / "train-00000-of-00001.arrayrecord")).read([0])[0]
        tokens = (5).to_bytes(width, "little") + (600).to_bytes(width, "little")
        assert record == b"\x02\0\0\0" + tokens + '{"id":0,"title":"§é"}'.encode()
        lengths = np.load(opened.folder / "train-lengths-00000-of-00001.npy")
        assert lengths.tolist() == [2] and lengths.dtype == np.uint32
        np.testing.assert_array_equal(opened.split("train").documents(0, 1)[0], [5, 600])
        shutil.rmtree(opened.folder)


@given(st.integers(0, 2**64 - 1), st.integers(1, 999))
def test_shards_are_in_key_order(key, num_shards):
    """Shard s holds the keys in [s 2^64 / n, (s + 1) 2^64 / n), so that shards joined are sorted by key."""
    record = cache.Record(key, (0, 0), 1, 1, (), b"")
    shard = cache.shard_of(record, num_shards)
    assert shard * 2**64 <= key * num_shards < (shard + 1) * 2**64


def test_shards_are_nearly_equal():
    """A shard's count is binomial(20000, 1/8): 2500, standard deviation 46.8; six of them are 281."""
    keywords = {"tokens": np.ones(1, np.int32), "num_bytes": 1, "metadata": {}, "dtype": np.dtype("<u2")}
    records = [cache.encode_record("law", "train", (i % 3, i), **keywords) for i in range(20_000)]
    counts = np.bincount([cache.shard_of(record, 8) for record in records], minlength=8)
    assert np.abs(counts - 2500).max() < 281
    other = cache.encode_record("law", "test", (0, 0), **keywords)
    assert other.key != records[0].key


@pytest.mark.parametrize("num_shards", [1, 3, 7, 400])
def test_order_does_not_depend_on_the_number_of_shards(split, tmp_path, num_shards):
    other = write(tmp_path, num_shards=num_shards).split("train")
    assert other.metadata(0, 150) == split.metadata(0, 150)


def test_pickles_and_is_shared_between_threads(split):
    expected = [tokens.tolist() for tokens in split.documents(0, 150)]
    clone, results = pickle.loads(pickle.dumps(split)), []

    def read():
        results.append([tokens.tolist() for i in range(150) for tokens in clone.documents(i, i + 1)])

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 8


def refuses(cache_dir, match, **arguments):
    with pytest.raises(UserError, match=match):
        TokenCache.open(cache_dir, "law", **arguments)


def test_refuses_other_vocabulary_version_and_format(tmp_path):
    folder = write(tmp_path).folder
    refuses(tmp_path, "another vocabulary .*kind=test.*--overwrite", vocabulary_fingerprint="0" * 64)
    refuses(tmp_path, "holds version 1 .* Corpus.version is 2", version=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    refuses(tmp_path, "has format 99, this program reads 1")
    (folder / "manifest.json").write_text("{")
    refuses(tmp_path, "manifest.json that is no JSON")
    (folder / "manifest.json").unlink()
    refuses(tmp_path, "does not exist or has no manifest.json; run .*prepare")


@pytest.mark.parametrize("name", ["train-00002-of-00004.arrayrecord", "train-lengths-00001-of-00004.npy"])
def test_refuses_missing_and_cut_files(tmp_path, name):
    path = write(tmp_path).folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    refuses(tmp_path, f"{name} with {len(content) - 1} bytes instead of {len(content)}")
    path.unlink()
    refuses(tmp_path, f"lacks {name}")


def test_verify_finds_a_flipped_byte(tmp_path):
    opened = write(tmp_path)
    opened.verify()
    path = opened.folder / "train-00001-of-00004.arrayrecord"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged train-00001-of-00004.arrayrecord"):
        TokenCache.open(tmp_path, "law").verify()


def test_unknown_split(tmp_path):
    with pytest.raises(UserError, match="no split 'test', only train"):
        write(tmp_path).split("test")


@pytest.mark.parametrize("error", [UserError, RuntimeError])
def test_failed_writing_leaves_the_old_cache(tmp_path, error):
    """An error of the user's leaves nothing else; after any other the next writer finds what was done."""
    before = write(tmp_path).split("train").metadata(0, 3)
    with pytest.raises(error), cache.writing(tmp_path, "law", {"shards": 1}) as folder:
        (folder / "done").write_bytes(b"half")
        raise error
    assert TokenCache.open(tmp_path, "law").split("train").metadata(0, 3) == before
    if error is UserError:
        assert [path.name for path in tmp_path.iterdir()] == ["law"]
    with pytest.raises(UserError), cache.writing(tmp_path, "law", {"shards": 1}) as folder:
        assert (folder / "done").exists() == (error is RuntimeError)
        raise UserError


def test_leftovers_of_another_plan_are_removed(tmp_path, capsys):
    with pytest.raises(RuntimeError), cache.writing(tmp_path, "law", {"shards": 1, "source": "a"}) as folder:
        (folder / "done").write_bytes(b"half")
        raise RuntimeError
    refuses(tmp_path, "was interrupted while it was written")
    with cache.writing(tmp_path, "law", {"shards": 1, "source": "b"}) as folder:
        assert {path.name for path in folder.iterdir()} == {"work", ".plan.json", ".lock"}
        assert "law.partial: was begun with another source; starts afresh" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["law"] and not list((tmp_path / "law").iterdir())


def test_one_writer_at_a_time(tmp_path):
    with cache.writing(tmp_path, "law"):
        with pytest.raises(UserError, match=rf"law.partial: process {os.getpid()} on .* is writing this token cache"):
            write(tmp_path)
        with cache.writing(tmp_path, "medicine"):
            pass
    write(tmp_path)


def test_a_file_is_whole_or_not_there(tmp_path):
    with pytest.raises(RuntimeError), cache.whole_file(tmp_path / "a") as path:
        path.write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with cache.whole_file(tmp_path / "a") as one, cache.whole_file(tmp_path / "a") as two:
        one.write_text("same")
        two.write_text("same")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "same")]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), min_size=1, max_size=12))
def test_any_tokens_come_back(tmp_path_factory, documents):
    arrays = [np.array(tokens, np.uint32).view(np.int32) for tokens in documents]
    split = write(tmp_path_factory.mktemp("any"), arrays, vocab_size=1 << 32).split("train")
    read = split.documents(0, len(arrays))
    for fields, tokens in zip(split.metadata(0, len(arrays)), read, strict=True):
        np.testing.assert_array_equal(tokens, arrays[fields["id"]])


def test_derived_arrays_are_kept_where_that_is_possible(tmp_path, monkeypatch):
    """Made anew where the cache may only be read; made once elsewhere; a failure leaves nothing behind."""
    split, made = write(tmp_path).split("train"), []
    files = sorted(path.name for path in split._folder.iterdir())

    def make():
        made.append(1)
        return np.arange(3)

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(cache.os, "replace", refuse)
        for _ in range(2):
            np.testing.assert_array_equal(split.derived("x", make), [0, 1, 2])
    assert len(made) == 2 and sorted(path.name for path in split._folder.iterdir()) == files
    for _ in range(2):
        np.testing.assert_array_equal(split.derived("x", make), [0, 1, 2])
    assert len(made) == 3
    assert sorted(path.name for path in split._folder.iterdir()) == sorted([*files, "train-x.npy"])
