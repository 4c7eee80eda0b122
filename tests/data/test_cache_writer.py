import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored import write

from t5x_domain.data import cache_writer
from t5x_domain.data.cache import TokenCache
from t5x_domain.errors import UserError


@given(st.integers(0, 2**64 - 1), st.integers(1, 999))
def test_shards_are_in_key_order(key, num_shards):
    """Shard s holds the keys in [s 2^64 / n, (s + 1) 2^64 / n), so that shards joined are sorted by key."""
    record = cache_writer.Record(key, (0, 0), 1, 1, (), b"")
    shard = cache_writer.shard_of(record, num_shards)
    assert shard * 2**64 <= key * num_shards < (shard + 1) * 2**64


def test_shards_are_nearly_equal():
    """A shard's count is binomial(20000, 1/8): 2500, standard deviation 46.8; six of them are 281."""
    keywords = {"tokens": np.ones(1, np.int32), "num_bytes": 1, "metadata": {}, "dtype": np.dtype("<u2")}
    records = [cache_writer.encode_record("law", "train", (i % 3, i), **keywords) for i in range(20_000)]
    counts = np.bincount([cache_writer.shard_of(record, 8) for record in records], minlength=8)
    assert np.abs(counts - 2500).max() < 281
    other = cache_writer.encode_record("law", "test", (0, 0), **keywords)
    assert other.key != records[0].key


@pytest.mark.parametrize("error", [UserError, RuntimeError])
def test_failed_writing_leaves_the_old_cache(tmp_path, error):
    """The next writer finds what was done: the cause may have had nothing to do with it."""
    before = write(tmp_path).split("train").metadata(0, 3)
    with pytest.raises(error), cache_writer.writing(tmp_path, "law", {"shards": 1}) as folder:
        (folder / "done").write_bytes(b"half")
        raise error
    assert TokenCache.open(tmp_path, "law").split("train").metadata(0, 3) == before
    with cache_writer.writing(tmp_path, "law", {"shards": 1}) as folder:
        assert (folder / "done").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["law"]


@pytest.mark.parametrize("manifest", [None, "{}", "[", '{"name": "an extension of a browser"}'])
def test_what_is_no_cache_is_not_replaced(tmp_path, manifest):
    (tmp_path / "law").mkdir()
    with cache_writer.writing(tmp_path, "law"):
        pass
    (tmp_path / "law" / "deeds.jsonl").write_text("mine")
    if manifest:
        (tmp_path / "law" / "manifest.json").write_text(manifest)
        with pytest.raises(UserError, match="law: has a manifest.json that is no.*; choose another CACHE_DIR, or"):
            TokenCache.open(tmp_path, "law")
    with pytest.raises(UserError, match="law: holds files that are no token cache; choose another CACHE_DIR"):
        write(tmp_path)
    assert (tmp_path / "law" / "deeds.jsonl").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["law"]


def test_killed_while_it_clears_up(tmp_path):
    """The cache is whole; what is left of writing it goes with the next call."""
    folder = write(tmp_path).folder
    names = {path.name for path in tmp_path.rglob("*")}
    (folder / "work").mkdir()
    for left in (folder / "work" / "a.records", folder / ".lock", folder / ".plan.json"):
        left.write_text("{}")
    (tmp_path / ".law.replaced").mkdir()
    cache_writer.clear_up(folder)
    assert {path.name for path in tmp_path.rglob("*")} == names


def test_leftovers_of_another_plan_are_removed(tmp_path, capsys):
    with pytest.raises(RuntimeError), cache_writer.writing(tmp_path, "law", {"shards": 1, "source": "a"}) as folder:
        (folder / "done").write_bytes(b"half")
        raise RuntimeError
    with pytest.raises(UserError, match="was interrupted while it was written"):
        TokenCache.open(tmp_path, "law")
    with cache_writer.writing(tmp_path, "law", {"shards": 1, "source": "b"}) as folder:
        assert {path.name for path in folder.iterdir()} == {"work", ".plan.json", ".lock"}
        assert "law.partial: was begun with another source; starts afresh" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["law"] and not list((tmp_path / "law").iterdir())


def test_one_writer_at_a_time(tmp_path):
    with cache_writer.writing(tmp_path, "law"):
        with pytest.raises(UserError, match=rf"law.partial: process {os.getpid()} on .* is writing this token cache"):
            write(tmp_path)
        with cache_writer.writing(tmp_path, "medicine"):
            pass
    write(tmp_path)
