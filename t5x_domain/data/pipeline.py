"""Writes the token cache of a corpus, in this process or with Apache Beam. Both give the same bytes.

    parts of the source -> documents -> records with a hashed key -> grouped by shard -> sorted and written

Documents stream through; what is held in memory at once is one shard, so large corpora want many shards.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tqdm

from t5x_domain.data import cache
from t5x_domain.data.sources import BadRecord, Document, no_documents
from t5x_domain.data.tasks import Corpus
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError

if TYPE_CHECKING:
    import apache_beam as beam


@dataclasses.dataclass(frozen=True)
class CacheWriter:
    """What both engines do to documents and shards. Pickles, so that Beam can send it to its workers."""

    corpus: Corpus
    vocabulary: Vocabulary | ByteVocabulary
    folder: Path
    num_shards: int

    def read(self, split: str, part_number: int, part: str) -> Iterator[tuple[str, Document | BadRecord]]:
        """Documents and bad records of one part, with their split."""
        for document in self.corpus.source.read(split, part_number, part):
            yield split, document

    def tokenize(self, split: str, document: Document | BadRecord) -> tuple[tuple[str, int], cache.Record | BadRecord]:
        """((split, shard), record). Bad records pass, or become of documents that give no usable tokens."""
        record = document if isinstance(document, BadRecord) else self._record(split, document)
        if isinstance(record, BadRecord):
            self.corpus.source.check_skippable(record)
            return (split, 0), record
        return (split, cache.shard_of(record, self.num_shards)), record

    def _record(self, split: str, document: Document) -> cache.Record | BadRecord:
        tokens = self.vocabulary.encode(document.text)
        if not len(tokens):
            return BadRecord("the text is empty or blank, it has no tokens", document.place)
        if tokens.max() >= self.vocabulary.vocab_size - self.vocabulary.num_sentinels:
            # In training it could not be told from a sentinel that the objective put in.
            return BadRecord("the text contains a sentinel like <extra_id_0>", document.place)
        return cache.encode_record(
            self.corpus.name,
            split,
            document.position,
            tokens=tokens,
            num_bytes=len(document.text.encode("utf-8")),
            metadata=document.metadata,
            dtype=cache.token_dtype(self.vocabulary.vocab_size),
        )

    def write(self, split: str, shard: int, records: Iterable[cache.Record | BadRecord]) -> None:
        """Writes one shard, and beside it what the manifest is to say of it."""
        good, skipped = [], collections.Counter()
        for record in records:
            if isinstance(record, BadRecord):
                skipped[record.reason] += 1
            else:
                good.append(record)
        entry = cache.write_shard(self.folder, split, shard, self.num_shards, good)
        self._entry_path(split, shard).write_text(json.dumps({"shard": entry, "skipped": skipped}))

    def finish(self) -> None:
        """Collects the shards' entries and writes the manifest. Raises UserError if a split has no document."""
        splits = {split: self._split_entry(split) for split in self.corpus.source.splits}
        manifest = {
            "corpus": self.corpus.name,
            "version": self.corpus.version,
            "vocabulary": {**self.vocabulary.description, "fingerprint": self.vocabulary.fingerprint},
            "token_dtype": cache.token_dtype(self.vocabulary.vocab_size).str,
            "source": self.corpus.source.describe(),
            "splits": splits,
        }
        cache.write_manifest(self.folder, manifest)

    def _split_entry(self, split: str) -> dict:
        shards, skipped = [], collections.Counter()
        for shard in range(self.num_shards):
            path = self._entry_path(split, shard)
            entry = json.loads(path.read_text())
            path.unlink()
            shards.append(entry["shard"])
            skipped.update(entry["skipped"])
        totals = {count: sum(shard[count] for shard in shards) for count in ("documents", "tokens", "bytes")}
        if not totals["documents"]:
            raise no_documents(self.corpus.source, split)
        fields = sorted(set().union(*(shard.pop("metadata_fields") for shard in shards)))
        return {**totals, "skipped": dict(sorted(skipped.items())), "metadata_fields": fields, "shards": shards}

    def _entry_path(self, split: str, shard: int) -> Path:
        return self.folder / f"{split}-{shard:05d}.entry.json"


def write_cache(
    corpus: Corpus,
    vocabulary: Vocabulary | ByteVocabulary,
    cache_dir: str | Path,
    *,
    num_shards: int,
    beam_flags: Sequence[str] | None = None,
) -> None:
    """Tokenises all splits of a corpus into `<cache_dir>/<corpus.name>`, replacing what is there once it is complete.

    Args:
      corpus: what to read.
      vocabulary: how to tokenise.
      cache_dir: a local or shared folder: all Beam workers must see it under this path.
      num_shards: shards of each split.
      beam_flags: None reads in this process, otherwise the command-line flags of a Beam pipeline.

    Raises:
      UserError: as `Source.read`; a document has no tokens; a split has no document; Beam is not installed.
    """
    with cache.writing(cache_dir, corpus.name) as folder:
        writer = CacheWriter(corpus, vocabulary, folder.resolve(), num_shards)
        if beam_flags is None:
            for split in corpus.source.splits:
                _write_split(writer, split)
        else:
            _run_beam(writer, beam_flags)
        writer.finish()


def _write_split(writer: CacheWriter, split: str) -> None:
    """Spills the records of a split to one file a shard, then sorts and writes shard by shard."""
    spills = [writer.folder / f"{split}-{shard:05d}.spill" for shard in range(writer.num_shards)]
    progress = tqdm.tqdm(
        desc=f"{writer.corpus.name} {split}", unit=" documents", mininterval=2, disable=None
    )  # None: a terminal only
    with contextlib.ExitStack() as stack:
        stack.enter_context(progress)
        files = [stack.enter_context(open(spill, "wb")) for spill in spills]
        for part_number, part in enumerate(writer.corpus.source.parts(split)):
            for _, document in writer.read(split, part_number, part):
                (_, shard), record = writer.tokenize(split, document)
                pickle.dump(record, files[shard], pickle.HIGHEST_PROTOCOL)
                progress.update()
    for shard, spill in enumerate(spills):
        writer.write(split, shard, _unpickle(spill))
        spill.unlink()


def _unpickle(path: Path) -> Iterator[cache.Record | BadRecord]:
    with open(path, "rb") as file:
        while file.peek(1):
            yield pickle.load(file)


def _run_beam(writer: CacheWriter, flags: Sequence[str]) -> None:
    try:
        import apache_beam as beam
    except ImportError as error:
        raise UserError("--runner needs Apache Beam; install it with: pip install 't5x_domain[beam]'.") from error
    source = writer.corpus.source
    parts = [(split, *part) for split in source.splits for part in enumerate(source.parts(split))]
    shards = [(split, shard) for split in source.splits for shard in range(writer.num_shards)]
    try:
        with _beam_pipeline(flags) as pipeline:
            records = (
                pipeline
                | "parts" >> beam.Create(parts)
                | "spread parts" >> beam.Reshuffle()
                | "read" >> beam.FlatMapTuple(writer.read)
                | "spread documents" >> beam.Reshuffle()
                | "tokenize" >> beam.MapTuple(writer.tokenize)
            )
            # Every shard is written, also one that no record falls into.
            empty = pipeline | "shards" >> beam.Create([(shard, None) for shard in shards])
            (
                (records, empty)
                | beam.Flatten()
                | beam.GroupByKey()
                | "write" >> beam.MapTuple(functools.partial(_write_group, writer))
            )
    except Exception as error:
        # Beam hands on the text of a worker's error, not its type.
        if message := re.search(r"UserError: (.+?)(?: \[while running|\n|$)", f"{type(error).__name__}: {error}"):
            raise UserError(message[1]) from error
        raise


def _write_group(writer: CacheWriter, key: tuple[str, int], records: Iterable[cache.Record | BadRecord | None]) -> None:
    writer.write(*key, (record for record in records if record is not None))


def _beam_pipeline(flags: Sequence[str]) -> "beam.Pipeline":
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    options = PipelineOptions(list(flags))
    # Beam's DirectRunner would first download a Prism binary; its own Python runner does the same work without.
    local = options.view_as(StandardOptions).runner == "DirectRunner"
    return beam.Pipeline(runner=FnApiRunner() if local else None, options=options)
