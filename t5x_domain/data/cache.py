"""The token cache: every document of a corpus, tokenised once, in a fixed shuffled order, read by range.

    <cache_dir>/<corpus>/manifest.json
                         <split>-00000-of-00004.arrayrecord      one record a document
                         <split>-lengths-00000-of-00004.npy      uint32: tokens of each of its documents

A record is a little-endian uint32 n, then n tokens (uint16 or uint32, as the manifest says), then the document's
metadata as UTF-8 JSON. Documents stand in the order of a 64-bit hash of (corpus, split, position in the source); the
hash's top bits choose the shard. So the order depends neither on the engine that writes nor on its number of workers.

A cache is written into a hidden sibling folder and renamed when it is complete: what has its name is whole.
"""

import bisect
import collections
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import platform
import shutil
import struct
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from t5x_domain.data.offsets import Offsets, ShardLengths
from t5x_domain.errors import UserError
from t5x_domain.files import changed_keys

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WORK = "work"  # in the folder of a cache that is being written: what is thrown away when it is complete
_PLAN, _LOCK = ".plan.json", ".lock"
_COUNT = struct.Struct("<I")
# Documents compressed together. Ten are read in 16 µs from groups of 32, in 23 µs from groups of 64 (7 % smaller).
_WRITER_OPTIONS = "group_size:32"
# Reads are short ranges; reading ahead would decode documents that nobody asked for.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
# Shards of a split that are open at once: each takes a file descriptor, of which a process often has 1,024.
_MOST_READERS = 128


class Record(NamedTuple):
    """One document on its way into a shard; records sort by `key`, then by `position`."""

    key: int  # 64-bit hash that fixes the place in the cache
    position: tuple[int, int]  # (part of the source, record in the part)
    num_tokens: int
    num_bytes: int  # of the text in UTF-8
    fields: tuple[str, ...]  # names of the metadata
    payload: bytes  # as stored


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that holds every id: little-endian uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def encode_record(
    corpus: str,
    split: str,
    position: tuple[int, int],
    *,
    tokens: np.ndarray,
    num_bytes: int,
    metadata: Mapping,
    dtype: np.dtype,
) -> Record:
    """Tokens (int32 [n]) and metadata of a document as a record with its place in the shuffled order."""
    place = f"{corpus}\0{split}\0{position[0]}\0{position[1]}".encode()
    key = int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "big")
    fields = json.dumps(metadata, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode("utf-8")
    payload = _COUNT.pack(len(tokens)) + tokens.astype(dtype).tobytes() + fields
    return Record(key, position, len(tokens), num_bytes, tuple(metadata), payload)


def shard_of(record: Record, num_shards: int) -> int:
    """The shard of a record, by the top bits of its key: shards are nearly equal and stay in key order."""
    return record.key * num_shards >> 64


def write_shard(folder: Path, split: str, shard: int, num_shards: int, records: Iterable[Record]) -> dict:
    """Writes one shard, in key order, and returns its entry for the manifest. `records` are sorted in memory."""
    records = sorted(records)
    suffix = f"{shard:05d}-of-{num_shards:05d}"
    file, lengths_file = f"{split}-{suffix}.arrayrecord", f"{split}-lengths-{suffix}.npy"
    checks = {}
    with whole_file(folder / file) as path:
        writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
        for record in records:
            writer.write(record.payload)
        writer.close()
        checks[file] = _size_and_digest(path)
    with whole_file(folder / lengths_file) as path:
        with open(path, "wb") as out:  # to a path without .npy, np.save would add it
            np.save(out, np.array([record.num_tokens for record in records], np.uint32))
        checks[lengths_file] = _size_and_digest(path)
    return {
        "file": file,
        "lengths_file": lengths_file,
        "documents": len(records),
        "tokens": sum(record.num_tokens for record in records),
        "bytes": sum(record.num_bytes for record in records),
        "metadata_fields": sorted(set().union(*(record.fields for record in records))),
        "checks": checks,
    }


@contextlib.contextmanager
def writing(cache_dir: str | Path, corpus: str, plan: Mapping | None = None) -> Iterator[Path]:
    """A folder to write a corpus into. It replaces `<cache_dir>/<corpus>` when the block ends.

    The block must end with `write_manifest`. What helps to write, but is no part of the cache, goes into its folder
    `WORK`. If the block is interrupted, the next one with the same plan (what is written, as JSON) finds what is there;
    one with another plan, or after a UserError, finds it empty.

    Raises:
      UserError: another process is writing the same corpus.
    """
    final = Path(cache_dir) / corpus
    partial, replaced = _partial(final), final.with_name(f".{corpus}.replaced")
    with _locked(partial):
        _begin(partial, plan or {})
        try:
            yield partial
        except UserError:
            shutil.rmtree(partial)
            raise
        shutil.rmtree(partial / WORK, ignore_errors=True)
        for path in partial.glob(".*"):
            if path.name not in (_PLAN, _LOCK):
                path.unlink()  # half a file, of a process that was killed
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        _fsync(final.parent)
        for name in (_PLAN, _LOCK):
            (final / name).unlink()
        shutil.rmtree(replaced, ignore_errors=True)


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Makes a folder that one process at a time may have; the lock ends with the process, however that ends."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _LOCK
        with open(path, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise UserError(
                    f"{folder}: {file.read() or 'another process'} is writing this token cache at the moment; wait "
                    "until it has ended, or stop it."
                ) from error
            if not path.exists() or not os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                continue  # who had it has just finished and renamed the folder
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            yield
            return


def _begin(partial: Path, plan: Mapping) -> None:
    """Empties a folder unless what is in it follows the same plan."""
    path = partial / _PLAN
    begun = json.loads(path.read_text()) if path.exists() else None
    if begun != plan:
        if begun is not None:
            changed = ", another ".join(changed_keys(begun, plan))
            print(f"{partial}: was begun with another {changed}; starts afresh", file=sys.stderr)
        for leftover in partial.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != _LOCK:
                leftover.unlink()
        with whole_file(path) as file:
            file.write_text(json.dumps(plan))
    (partial / WORK).mkdir(exist_ok=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write that becomes `path`, durably, when the block ends, and goes if it fails.

    Several processes may write the same file at once; it is one of theirs.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield partial
        _fsync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_manifest(folder: Path, manifest: Mapping) -> None:
    """Writes the manifest: the last file of a cache."""
    with whole_file(folder / MANIFEST) as path:
        text = json.dumps({"format_version": FORMAT_VERSION, **manifest}, indent=1) + "\n"
        path.write_text(text, encoding="utf-8")
    _fsync(folder)


class TokenCache:
    """A complete cache of one corpus. Make one with `TokenCache.open`."""

    def __init__(self, folder: Path, manifest: dict):
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(
        cls,
        cache_dir: str | Path,
        corpus: str,
        *,
        vocabulary_fingerprint: str | None = None,
        version: int | None = None,
    ) -> "TokenCache":
        """Opens `<cache_dir>/<corpus>`; None accepts any vocabulary or version. Sizes are checked, digests are not.

        Raises:
          UserError: absent, partial, damaged, of another format, or made with another vocabulary or corpus version.
        """
        folder = Path(cache_dir) / corpus
        manifest = _read_manifest(folder)
        if manifest.get("format_version") != FORMAT_VERSION:
            raise _stale(folder, f"has format {manifest.get('format_version')}, this program reads {FORMAT_VERSION}")
        if version is not None and manifest["version"] != version:
            raise _stale(folder, f"holds version {manifest['version']} of the corpus, but Corpus.version is {version}")
        if vocabulary_fingerprint is not None and manifest["vocabulary"]["fingerprint"] != vocabulary_fingerprint:
            raise _stale(folder, f"was made with another vocabulary ({_describe(manifest['vocabulary'])})")
        cache = cls(folder, manifest)
        for name, check in cache._checks():
            path = folder / name
            if not path.is_file():
                raise _stale(folder, f"lacks {name}")
            if path.stat().st_size != check["size"]:
                raise _stale(folder, f"has {name} with {path.stat().st_size} bytes instead of {check['size']}")
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
            if _size_and_digest(self.folder / name) != check:
                raise _stale(self.folder, f"has a damaged {name} (its SHA-256 differs)")

    def _checks(self) -> Iterator[tuple[str, dict]]:
        for split in self.manifest["splits"].values():
            for shard in split["shards"]:
                yield from shard["checks"].items()


class CachedSplit:
    """The documents of one split, by range. Safe to share between threads; pickles without its open files."""

    def __init__(self, folder: Path, manifest: Mapping, split: str):
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

    @functools.cached_property
    def offsets(self) -> Offsets:
        """int64 [num_documents + 1]: tokens before each document in stored order; EOS is not stored nor counted."""
        return Offsets(
            [
                ShardLengths(
                    shard["documents"],
                    shard["tokens"],
                    functools.partial(np.load, self._folder / shard["lengths_file"], mmap_mode="r"),
                )
                for shard in self._shards
            ]
        )

    @property
    def metadata_fields(self) -> set[str]:
        """Names of the fields that some document has."""
        return set(self._metadata_fields)

    def derived(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """An array that is made from the split once and then kept beside it, under a name that says what it is."""
        path = self._folder / f"{self.split}-{name}.npy"
        if path.exists():
            return np.load(path, mmap_mode="r")
        array = make()
        # A cache that may only be read works too, only more slowly. Other hosts may do the same at this moment.
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=self._folder, prefix=".partial-") as partial:
            np.save(f"{partial}/{path.name}", array)
            os.replace(f"{partial}/{path.name}", path)
        return array

    def documents(self, start: int, stop: int) -> list[np.ndarray]:
        """Tokens of documents [start, stop), each int32 [n]. Raises IndexError outside the split."""
        return [
            np.frombuffer(record, self._dtype, _COUNT.unpack_from(record)[0], _COUNT.size).astype(np.int32)
            for record in self._records(start, stop)
        ]

    def metadata(self, start: int, stop: int) -> list[dict]:
        """Metadata of documents [start, stop). Raises IndexError outside the split."""
        return [
            json.loads(record[_COUNT.size + _COUNT.unpack_from(record)[0] * self._dtype.itemsize :])
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
                path = str(self._folder / self._shards[shard]["file"])
                self._readers[shard] = ArrayRecordReader(path, _READER_OPTIONS)
            self._readers.move_to_end(shard)
            if len(self._readers) > _MOST_READERS:
                self._readers.popitem(last=False)  # closes when the last thread that reads it is done
            return self._readers[shard]


def _read_manifest(folder: Path) -> dict:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        state = (
            "was interrupted while it was written"
            if _partial(folder).exists()
            else "does not exist or has no manifest.json"
        )
        raise UserError(f"{folder}: the token cache {state}; run `python -m t5x_domain.prepare` first.") from error
    except ValueError as error:
        raise _stale(folder, "has a manifest.json that is no JSON") from error


def _stale(folder: Path, reason: str) -> UserError:
    return UserError(f"{folder}: the token cache {reason}; redo it with `python -m t5x_domain.prepare --overwrite`.")


def _describe(vocabulary: Mapping) -> str:
    return ", ".join(f"{name}={value}" for name, value in vocabulary.items() if name != "fingerprint")


def _size_and_digest(path: Path) -> dict:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
