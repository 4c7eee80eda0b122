"""Records come back by shard, and a shard reads little else."""

import pytest
from bucket import in_memory

from t5x_domain import files
from t5x_domain.data import spill
from t5x_domain.data.cache_writer import Record, shard_of
from t5x_domain.data.sources import BadRecord

bucket = pytest.fixture(in_memory)
NUM_SHARDS = 300


def record(number):
    return Record(number * 2**64 // 1000, (0, number), 1, 1, (), b"%04d" % number)


def test_a_shard_reads_its_own_row(bucket, monkeypatch):
    """The table of 300 shards and 100 flushes has 480 kB; a shard's row 1.6 kB."""
    monkeypatch.setattr(spill, "_BUFFER", 40)
    path = files.path("gs://b/a.records")
    records = [record(number) for number in range(1000)]
    spill.write_spill(path, NUM_SHARDS, [BadRecord("not UTF-8", "a, line 1"), *records])
    asked, call = [], type(path)._call

    def counted(self, method, **how):
        asked.append(how.get("end", 0) - how.get("start", 0))
        return call(self, method, **how)

    monkeypatch.setattr(type(path), "_call", counted)
    for shard in (0, 7, NUM_SHARDS - 1):
        asked.clear()
        assert list(spill.read_spill(path, shard)) == [r for r in records if shard_of(r, NUM_SHARDS) == shard]
        assert sum(asked) < 3000
    assert spill.skipped_in(path) == {"not UTF-8": 1}


def test_nothing_at_all(tmp_path):
    spill.write_spill(files.path(tmp_path / "a"), NUM_SHARDS, [])
    assert list(spill.read_spill(files.path(tmp_path / "a"), 5)) == [] and spill.skipped_in(tmp_path / "a") == {}
