"""Records on their way from the parts of a source to the shards of a cache: written by part, read by shard.

A spill file holds the records of one piece of work, a stretch for each shard and each time that the buffer was full:
pickled lists of records, then a pickled index {"stretches": {shard: [(offset, size), …]}, "skipped": {reason: count}},
then the index's size in 8 bytes. It appears under its name when it is whole.
"""

import collections
import pickle
import struct
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from etils import epath

from t5x_domain.data.cache_writer import Record, shard_of
from t5x_domain.data.sources import BadRecord
from t5x_domain.data.whole_files import whole_file

# Payload that is held in memory before it is written, in bytes.
_BUFFER = 64 << 20
_SIZE = struct.Struct("<Q")


def write_spill(path: epath.Path, num_shards: int, records: Iterable[Record | BadRecord]) -> None:
    """Writes records as they come; bad ones are counted by reason."""
    stretches: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
    skipped: collections.Counter[str] = collections.Counter()
    with whole_file(path) as local, open(local, "wb") as file:
        waiting: dict[int, list[Record]] = collections.defaultdict(list)
        size = 0
        for record in records:
            if isinstance(record, BadRecord):
                skipped[record.reason] += 1
                continue
            waiting[shard_of(record, num_shards)].append(record)
            size += len(record.payload)
            if size >= _BUFFER:
                _flush(file, waiting, stretches)
                size = 0
        _flush(file, waiting, stretches)
        index = pickle.dumps({"stretches": dict(stretches), "skipped": dict(skipped)})
        file.write(index + _SIZE.pack(len(index)))


def _flush(file: BinaryIO, waiting: dict[int, list[Record]], stretches: dict[int, list[tuple[int, int]]]) -> None:
    for shard, records in sorted(waiting.items()):
        start = file.tell()
        stretches[shard].append((start, file.write(pickle.dumps(records, pickle.HIGHEST_PROTOCOL))))
    waiting.clear()


def read_spill(path: epath.Path, shard: int) -> Iterator[Record]:
    """The records of one shard."""
    with path.open("rb") as buffered:
        file = buffered.raw  # of a bucket reads what is asked for, and no whole buffer
        for offset, size in _index(file)["stretches"].get(shard, ()):
            file.seek(offset)
            yield from pickle.loads(file.read(size))


def skipped_in(path: epath.Path) -> dict[str, int]:
    """{reason: how many records were skipped for it}."""
    with path.open("rb") as buffered:
        return _index(buffered.raw)["skipped"]


def _index(file: BinaryIO) -> dict[str, Any]:
    end = file.seek(-_SIZE.size, 2)
    (size,) = _SIZE.unpack(file.read())
    file.seek(end - size)
    return pickle.loads(file.read(size))
