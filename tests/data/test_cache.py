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
from stored import DOCUMENTS, write

from t5x_domain.data.cache import TokenCache
from t5x_domain.errors import UserError


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
        patched.setattr(os, "replace", refuse)
        for _ in range(2):
            np.testing.assert_array_equal(split.derived("x", make), [0, 1, 2])
    assert len(made) == 2 and sorted(path.name for path in split._folder.iterdir()) == files
    for _ in range(2):
        np.testing.assert_array_equal(split.derived("x", make), [0, 1, 2])
    assert len(made) == 3
    assert sorted(path.name for path in split._folder.iterdir()) == sorted([*files, "train-x.npy"])
