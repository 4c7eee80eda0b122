"""Records on their way from the parts of a source to the shards of a cache: written by part, read by shard.

A spill file holds the records of one piece of work, a stretch for each shard and each time that the buffer was full:

    pickled lists of records                a stretch each
    int64 [shards, flushes, 2]              where each stretch is, (offset, size): a shard reads its own row only
    pickled {reason: count}                 of the records that were skipped
    3 × uint64                              where the table and the pickle begin, and the number of flushes

It appears under its name when it is whole. Numbers are little-endian.
"""

import collections
import pickle
import struct
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
from etils import epath

from t5x_domain.data.cache_writer import Record, shard_of
from t5x_domain.data.sources import BadRecord
from t5x_domain.data.whole_files import whole_file

# Payload that is held in memory before it is written, in bytes.
_BUFFER = 64 << 20
_FOOTER = struct.Struct("<QQQ")
_PLACE = np.dtype(("<i8", 2))


def write_spill(path: epath.Path, num_shards: int, records: Iterable[Record | BadRecord]) -> None:
    """Writes records as they come; bad ones are counted by reason."""
    flushes: list[np.ndarray] = []
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
                flushes.append(_flush(file, waiting, num_shards))
                size = 0
        flushes.append(_flush(file, waiting, num_shards))
        table = file.tell()
        file.write(np.stack(flushes, axis=1).tobytes())
        reasons = file.tell()
        file.write(pickle.dumps(dict(skipped)) + _FOOTER.pack(table, reasons, len(flushes)))


def _flush(file: BinaryIO, waiting: dict[int, list[Record]], num_shards: int) -> np.ndarray:
    """Writes a stretch for every shard that has records waiting; where they are, int64 [shards, 2]."""
    places = np.zeros(num_shards, _PLACE)
    for shard, records in sorted(waiting.items()):
        places[shard] = file.tell(), file.write(pickle.dumps(records, pickle.HIGHEST_PROTOCOL))
    waiting.clear()
    return places


def read_spill(path: epath.Path, shard: int) -> Iterator[Record]:
    """The records of one shard."""
    with path.open("rb") as buffered:
        file = buffered.raw  # of a bucket reads what is asked for, and no whole buffer
        table, _, flushes = _footer(file)
        row = flushes * _PLACE.itemsize
        file.seek(table + shard * row)
        for offset, size in np.frombuffer(file.read(row), _PLACE).tolist():
            if size:
                file.seek(offset)
                yield from pickle.loads(file.read(size))


def skipped_in(path: epath.Path) -> dict[str, int]:
    """{reason: how many records were skipped for it}."""
    with path.open("rb") as buffered:
        file = buffered.raw
        _, reasons, _ = _footer(file)
        file.seek(reasons)
        return pickle.loads(file.read())


def _footer(file: BinaryIO) -> tuple[int, int, int]:
    """Where the table and the reasons begin, and the number of flushes."""
    file.seek(-_FOOTER.size, 2)
    return _FOOTER.unpack(file.read())
