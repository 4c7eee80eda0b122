"""Tokens before each document of a corpus, looked up in the lengths that lie beside the shards.

What stays in memory is 8 bytes for every 256 documents of the shards that were asked for: 31 MB for 10⁹ documents. The
lengths themselves are mapped, so the operating system reads the pages that are looked at and may drop them.
"""

import bisect
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_STRIDE = 256
# Documents whose offsets are computed together where all are wanted.
_DOCUMENTS_AT_ONCE = 1 << 20


class ShardLengths(NamedTuple):
    """The documents of a shard: how many, their tokens in all, and what reads the tokens of each (uint32 [n])."""

    documents: int
    tokens: int
    load: Callable[[], np.ndarray]


class Offsets:
    """int64 [documents + 1], like an array that is read where it is looked at; the last one is the number of tokens.

    Takes an index, a slice without step, `searchsorted`, `len` and `np.asarray`. Pickles without what it has read.
    """

    def __init__(
        self,
        shards: Sequence[ShardLengths],
        *,
        separator: int = 0,
        first: int = 0,
        stop: int | None = None,
        indices: dict[int, "_Index"] | None = None,
    ):
        """Of documents [first, stop) of the shards joined, each followed by `separator` more tokens.

        `indices` are what others with the same separator have read.
        """
        self._shards = shards
        self._separator = separator
        self._documents = [0, *itertools.accumulate(shard.documents for shard in shards)]
        self._tokens = [0, *itertools.accumulate(shard.tokens + separator * shard.documents for shard in shards)]
        self._first, self._stop = first, self._documents[-1] if stop is None else stop
        self._indices: dict[int, _Index] = {} if indices is None else indices
        self._begin = self._before(self._first)

    @classmethod
    def from_lengths(cls, lengths: np.ndarray | Sequence[int]) -> "Offsets":
        """Of documents whose lengths are in memory."""
        lengths = np.asarray(lengths, np.uint32)
        return cls(
            [ShardLengths(len(lengths), int(lengths.sum(dtype=np.int64)), functools.partial(np.asarray, lengths))]
        )

    def part(self, first: int, stop: int) -> "Offsets":
        """Of documents [first, stop), counted from the first."""
        assert 0 <= first < stop < len(self)
        place = {"first": self._first + first, "stop": self._first + stop}
        return Offsets(self._shards, separator=self._separator, **place, indices=self._indices)

    def with_separators(self) -> "Offsets":
        """With one more token after every document."""
        return Offsets(self._shards, separator=self._separator + 1, first=self._first, stop=self._stop)

    def __reduce__(self):  # noqa: ANN204
        settings = {"separator": self._separator, "first": self._first, "stop": self._stop}
        return functools.partial(Offsets, **settings), (self._shards,)

    def __len__(self) -> int:
        return self._stop - self._first + 1

    def __getitem__(self, key: int | slice) -> int | np.ndarray:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            assert step == 1
            return self._between(start, max(start, stop))
        index = key + len(self) if key < 0 else key
        if not 0 <= index < len(self):
            raise IndexError(f"offset {key} of {len(self)}")
        return self._before(self._first + int(index)) - self._begin

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        del copy  # always a new one
        parts = [self[start : start + _DOCUMENTS_AT_ONCE] for start in range(0, len(self), _DOCUMENTS_AT_ONCE)]
        return np.concatenate(parts).astype(dtype or np.int64, copy=False)

    def searchsorted(self, token: int, side: str = "left") -> int:
        """How many offsets are below `token`, with side 'right' those that equal it, too; as numpy's for a number."""
        place = int(token) - (side == "left") + self._begin  # the document that holds this token, and all before it
        if place < self._begin:
            return 0
        if place >= self._tokens[-1]:
            return len(self)
        shard = bisect.bisect_right(self._tokens, place) - 1
        document = self._documents[shard] + self._index(shard).document(place - self._tokens[shard])
        return min(document - self._first + 1, len(self))

    def _before(self, document: int) -> int:
        """Tokens before a document of the shards joined. No file is read for the first of a shard."""
        shard = bisect.bisect_left(self._documents, document)
        if self._documents[shard] == document:
            return self._tokens[shard]
        return self._tokens[shard - 1] + self._index(shard - 1).before(document - self._documents[shard - 1])

    def _between(self, start: int, stop: int) -> np.ndarray:
        """Offsets [start, stop)."""
        if start == stop:
            return np.zeros(0, np.int64)
        first, last = self._first + start, self._first + stop - 1
        shard = bisect.bisect_right(self._documents, first) - 1
        parts = [np.array([self._before(first) - self._begin])]
        while first < last:
            begin, end = self._documents[shard : shard + 2]
            if first < end:
                lengths = self._index(shard).lengths[first - begin : min(last, end) - begin]
                parts.append(lengths.astype(np.int64) + self._separator)
            first, shard = min(last, end), shard + 1
        return np.cumsum(np.concatenate(parts), dtype=np.int64)

    def _index(self, shard: int) -> "_Index":
        index = self._indices.get(shard)
        if index is None:
            index = self._indices.setdefault(shard, _Index(self._shards[shard].load(), self._separator))
        return index


class _Index:
    """Lengths of one shard's documents, and the tokens before every 256th of them."""

    def __init__(self, lengths: np.ndarray, separator: int):
        self.lengths, self._separator = np.asarray(lengths), separator  # memmap's own indexing is slow
        starts = np.arange(0, len(lengths), _STRIDE)
        tokens = np.add.reduceat(lengths, starts, dtype=np.int64) + separator * np.minimum(
            _STRIDE, len(lengths) - starts
        )
        self._every = np.cumsum(tokens) - tokens

    def before(self, document: int) -> int:
        """Tokens before a document of the shard."""
        nth, rest = divmod(document, _STRIDE)
        start = nth * _STRIDE
        return int(self._every[nth] + self.lengths[start:document].sum(dtype=np.int64)) + self._separator * rest

    def document(self, token: int) -> int:
        """The document that holds a token of the shard."""
        nth = int(self._every.searchsorted(token, side="right")) - 1
        start = nth * _STRIDE
        ends = self.lengths[start : start + _STRIDE].cumsum(dtype=np.int64)
        if self._separator:
            ends += self._separator * np.arange(1, len(ends) + 1)
        return start + int(ends.searchsorted(token - self._every[nth], side="right"))
