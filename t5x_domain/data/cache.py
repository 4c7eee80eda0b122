"""The token cache: every document of a corpus, tokenised once, in a fixed shuffled order, read by range.

    <cache_dir>/<corpus>/manifest.json
                         <split>-00000-of-00004.arrayrecord      one record a document
                         <split>-lengths-00000-of-00004.npy      uint32: tokens of each of its documents

A record is a little-endian uint32 n, then n tokens (uint16 or uint32, as the manifest says), then the document's
metadata as UTF-8 JSON. Documents stand in the order of a 64-bit hash of (corpus, split, position in the source); the
hash's top bits choose the shard. So the order depends neither on the engine that writes nor on its number of workers.

What has a manifest is whole, see data/cache_writer.py. Of a cache in a bucket, a shard is copied when it is first read
and checked; the room on the disk is free again when other shards have taken its place among the open ones.
"""

import bisect
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from t5x_domain import files
from t5x_domain.data.offsets import Offsets, ShardLengths
from t5x_domain.data.whole_files import at_hand, size_and_digest, whole_file
from t5x_domain.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
COUNT = struct.Struct("<I")
# Reads are short ranges; reading ahead would decode documents that nobody asked for.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
# Shards of a split that are open at once: each takes a file descriptor, of which a process often has 1,024, and of a
# bucket's the room of a copy.
_MOST_READERS = 128


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that holds every id: little-endian uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class TokenCache:
    """A complete cache of one corpus. Make one with `TokenCache.open`."""

    def __init__(self, folder: epath.Path, manifest: dict):
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(
        cls,
        cache_dir: str | os.PathLike,
        corpus: str,
        *,
        vocabulary_fingerprint: str | None = None,
        version: int | None = None,
    ) -> "TokenCache":
        """Opens `<cache_dir>/<corpus>`; None accepts any vocabulary or version.

        On this machine sizes are checked, but not digests; in a bucket both are, when a shard is read.

        Raises:
          UserError: absent, partial, damaged, of another format, or made with another vocabulary or corpus version.
        """
        folder = files.path(cache_dir) / corpus
        manifest = _read_manifest(folder)
        if manifest.get("format_version") != FORMAT_VERSION:
            raise _stale(folder, f"has format {manifest.get('format_version')}, this program reads {FORMAT_VERSION}")
        if version is not None and manifest["version"] != version:
            raise _stale(folder, f"holds version {manifest['version']} of the corpus, but Corpus.version is {version}")
        if vocabulary_fingerprint is not None and manifest["vocabulary"]["fingerprint"] != vocabulary_fingerprint:
            raise _stale(folder, f"was made with another vocabulary ({_describe(manifest['vocabulary'])})")
        cache = cls(folder, manifest)
        for name, check in () if files.is_remote(folder) else cache._checks():
            path = folder / name
            if not path.is_file():
                raise _stale(folder, f"lacks {name}")
            if path.stat().length != check["size"]:
                raise _stale(folder, f"has {name} with {path.stat().length} bytes instead of {check['size']}")
        return cache

    @property
    def splits(self) -> list[str]:
        return list(self.manifest["splits"])

    def split(self, name: str) -> "CachedSplit":
        """Raises UserError when the corpus has no such split."""
        if name not in self.manifest["splits"]:
            raise UserError(f"{self.folder}: there is no split '{name}', only {', '.join(self.splits)}.")
        return CachedSplit(self.folder, self.manifest, name)

    def verify(self) -> None:
        """Reads every file and compares its SHA-256 with the manifest's. Raises UserError naming the damaged file."""
        for name, check in self._checks():
            with at_hand(self.folder / name) as path:
                if size_and_digest(path) != check:
                    raise _stale(self.folder, f"has a damaged {name} (its SHA-256 differs)")

    def _checks(self) -> Iterator[tuple[str, dict]]:
        for split in self.manifest["splits"].values():
            for shard in split["shards"]:
                yield from shard["checks"].items()


class CachedSplit:
    """The documents of one split, by range. Safe to share between threads; pickles without its open files."""

    def __init__(self, folder: epath.Path, manifest: Mapping, split: str):
        entry = manifest["splits"][split]
        self.corpus: str = manifest["corpus"]
        self.split = split
        self.num_documents: int = entry["documents"]
        self.num_tokens: int = entry["tokens"]
        self.num_bytes: int = entry["bytes"]
        self._arguments = (folder, manifest, split)
        self._folder = folder
        self._metadata_fields = entry["metadata_fields"]
        self._shards = entry["shards"]
        self._first_documents = [0, *itertools.accumulate(shard["documents"] for shard in self._shards)]
        self._dtype = np.dtype(manifest["token_dtype"])
        self._readers: collections.OrderedDict[int, ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):  # noqa: ANN204
        return CachedSplit, self._arguments

    @property
    def digest(self) -> str:
        """SHA-256 of the digests of all shards, in hexadecimal: another one means other documents or another order."""
        checks = json.dumps([shard["checks"] for shard in self._shards], sort_keys=True)
        return hashlib.sha256(checks.encode()).hexdigest()

    @functools.cached_property
    def offsets(self) -> Offsets:
        """int64 [num_documents + 1]: tokens before each document in stored order; EOS is not stored nor counted."""
        return Offsets(
            [
                ShardLengths(shard["documents"], shard["tokens"], functools.partial(self._lengths, number))
                for number, shard in enumerate(self._shards)
            ]
        )

    def _lengths(self, shard: int) -> np.ndarray:
        with self._at_hand(shard, "lengths_file") as path:
            return np.load(path, mmap_mode="r")

    @property
    def metadata_fields(self) -> set[str]:
        """Names of the fields that some document has."""
        return set(self._metadata_fields)

    def derived(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """An array that is made from the split once and then kept beside it, under a name that says what it is."""
        path = self._folder / f"{self.split}-{name}.npy"
        if path.exists():
            with at_hand(path) as local:
                return np.load(local, mmap_mode="r")
        array = make()
        # A cache that may only be read works too, only more slowly. Other hosts may do the same at this moment.
        with contextlib.suppress(OSError, UserError), whole_file(path) as local, open(local, "wb") as file:
            np.save(file, array)
        return array

    def documents(self, start: int, stop: int) -> list[np.ndarray]:
        """Tokens of documents [start, stop), each int32 [n]. Raises IndexError outside the split."""
        return [
            np.frombuffer(record, self._dtype, COUNT.unpack_from(record)[0], COUNT.size).astype(np.int32)
            for record in self._records(start, stop)
        ]

    def metadata(self, start: int, stop: int) -> list[dict]:
        """Metadata of documents [start, stop). Raises IndexError outside the split."""
        return [
            json.loads(record[COUNT.size + COUNT.unpack_from(record)[0] * self._dtype.itemsize :])
            for record in self._records(start, stop)
        ]

    def _records(self, start: int, stop: int) -> list[bytes]:
        if not 0 <= start <= stop <= self.num_documents:
            raise IndexError(f"documents {start}:{stop} of {self.num_documents} in {self.corpus}/{self.split}")
        records = []
        while start < stop:
            shard = bisect.bisect_right(self._first_documents, start) - 1
            first, end = self._first_documents[shard : shard + 2]
            records += self._reader(shard).read(start - first, min(stop, end) - first)
            start = min(stop, end)
        return records

    def _reader(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            if shard not in self._readers:
                with self._at_hand(shard, "file") as path:
                    self._readers[shard] = ArrayRecordReader(str(path), _READER_OPTIONS)
            self._readers.move_to_end(shard)
            if len(self._readers) > _MOST_READERS:
                self._readers.popitem(last=False)  # closes when the last thread that reads it is done
            return self._readers[shard]

    def _at_hand(self, shard: int, kind: str) -> contextlib.AbstractContextManager[Path]:
        """A file of a shard; `kind` is its key in the manifest."""
        entry = self._shards[shard]
        return at_hand(self._folder / entry[kind], entry["checks"][entry[kind]])


def partial_folder(folder: epath.Path) -> epath.Path:
    """Where a cache is written: in its place in a bucket, where nothing can be renamed, else in a hidden sibling."""
    return folder if files.is_remote(folder) else folder.with_name(f".{folder.name}.partial")


def is_cache(folder: epath.Path) -> bool:
    """Whether a folder holds a cache of any format: whether its manifest is one of ours."""
    try:
        return _is_manifest(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return False


def _is_manifest(content: object) -> bool:
    return isinstance(content, dict) and "format_version" in content


def _read_manifest(folder: epath.Path) -> dict:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        state = (
            "was interrupted while it was written"
            if partial_folder(folder).exists()
            else "does not exist or has no manifest.json"
        )
        raise UserError(f"{folder}: the token cache {state}; run `python -m t5x_domain.prepare` first.") from error
    except ValueError as error:
        raise _foreign(folder, "has a manifest.json that is no JSON") from error
    if not _is_manifest(manifest):
        raise _foreign(folder, "has a manifest.json that is none of a token cache")
    return manifest


def _foreign(folder: epath.Path, reason: str) -> UserError:
    """`prepare` takes nothing away that it may not have written, so the user has to."""
    return UserError(f"{folder}: {reason}; choose another CACHE_DIR, or remove the folder and run `prepare` again.")


def _stale(folder: epath.Path, reason: str) -> UserError:
    return UserError(f"{folder}: the token cache {reason}; redo it with `python -m t5x_domain.prepare --overwrite`.")


def _describe(vocabulary: Mapping) -> str:
    return ", ".join(f"{name}={value}" for name, value in vocabulary.items() if name != "fingerprint")
