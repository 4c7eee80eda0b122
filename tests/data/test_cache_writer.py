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
    """An error of the user's leaves nothing else; after any other the next writer finds what was done."""
    before = write(tmp_path).split("train").metadata(0, 3)
    with pytest.raises(error), cache_writer.writing(tmp_path, "law", {"shards": 1}) as folder:
        (folder / "done").write_bytes(b"half")
        raise error
    assert TokenCache.open(tmp_path, "law").split("train").metadata(0, 3) == before
    if error is UserError:
        assert [path.name for path in tmp_path.iterdir()] == ["law"]
    with pytest.raises(UserError), cache_writer.writing(tmp_path, "law", {"shards": 1}) as folder:
        assert (folder / "done").exists() == (error is RuntimeError)
        raise UserError


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
