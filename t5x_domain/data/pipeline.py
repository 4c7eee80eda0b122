"""Writes the token cache of a corpus, in this process or with Apache Beam. Both give the same bytes.

    source -> tasks (a file each, or one of several turns through a large one) -> a spill file each, by shard -> shards

Tasks and shards are pieces of work that are done or not, and what is done is not done again when an interrupted
preparation is started anew. Documents stream through; what is held in memory at once is one shard of each worker, so
large corpora want many shards.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import tqdm
from etils import epath

from t5x_domain import files
from t5x_domain.data.cache import MANIFEST, token_dtype
from t5x_domain.data.cache_writer import Record, encode_record, work_folder, write_manifest, write_shard, writing
from t5x_domain.data.sources import BadRecord, Document, no_documents
from t5x_domain.data.spill import read_spill, skipped_in, write_spill
from t5x_domain.data.tasks import Corpus
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError

if TYPE_CHECKING:
    import apache_beam as beam

# A larger part of a source is read in several turns: by workers side by side, each of which tokenises its share.
_TURN_BYTES = 256 << 20
_MOST_TURNS = 16


class Task(NamedTuple):
    """The records of a part whose number among its records leaves `turn` when it is divided by `turns`."""

    split: str
    part_number: int
    part: str
    turn: int
    turns: int


@dataclasses.dataclass(frozen=True)
class CacheWriter:
    """What both engines do. Pickles, so that Beam can send it to its workers; all of them must see both folders."""

    corpus: Corpus
    vocabulary: Vocabulary | ByteVocabulary
    folder: epath.Path
    work: epath.Path  # for what is thrown away in the end
    num_shards: int
    tasks: Sequence[Task]

    @property
    def shards(self) -> list[tuple[str, int]]:
        """(split, number) of all shards."""
        return [(split, shard) for split in self.corpus.source.splits for shard in range(self.num_shards)]

    def waiting(self) -> tuple[list[Task], list[tuple[str, int]]]:
        """Tasks and shards that are still to be done."""
        done = {path.name for path in self.work.iterdir()} if self.work.exists() else ()
        tasks = [task for task in self.tasks if self._spill_path(task).name not in done]
        return tasks, [shard for shard in self.shards if self._entry_path(*shard).name not in done]

    def spill(self, task: Task) -> None:
        """Reads and tokenises the documents of a task.

        Raises:
          UserError: as `Source.read`; a document has no tokens, or holds a sentinel.
        """
        write_spill(self._spill_path(task), self.num_shards, self._records(task))

    def _records(self, task: Task) -> Iterator[Record | BadRecord]:
        documents = self.corpus.source.read(task.split, task.part_number, task.part)
        for number, document in enumerate(documents):
            if number % task.turns != task.turn:
                continue
            record = document if isinstance(document, BadRecord) else self._record(task.split, document)
            if isinstance(record, BadRecord):
                self.corpus.source.check_skippable(record)
            yield record

    def _record(self, split: str, document: Document) -> Record | BadRecord:
        tokens = self.vocabulary.encode(document.text)
        if not len(tokens):
            return BadRecord("the text is empty or blank, it has no tokens", document.place)
        if tokens.max() >= self.vocabulary.vocab_size - self.vocabulary.num_sentinels:
            # In training it could not be told from a sentinel that the objective put in.
            return BadRecord("the text contains a sentinel like <extra_id_0>", document.place)
        return encode_record(
            self.corpus.name,
            split,
            document.position,
            tokens=tokens,
            num_bytes=len(document.text.encode("utf-8")),
            metadata=document.metadata,
            dtype=token_dtype(self.vocabulary.vocab_size),
        )

    def write(self, split: str, shard: int) -> None:
        """Writes one shard from the spills, and beside it what the manifest is to say of it."""
        spills = [self._spill_path(task) for task in self.tasks if task.split == split]
        records = (record for spill in spills for record in read_spill(spill, shard))
        with self._while_nobody_clears():
            entry = write_shard(self.folder, split, shard, self.num_shards, records)
            files.write_atomically(self._entry_path(split, shard), json.dumps(entry).encode())

    @contextlib.contextmanager
    def _while_nobody_clears(self) -> Iterator[None]:
        """Explains that files which were written are gone: in a bucket there are no locks."""
        try:
            yield
        except FileNotFoundError as error:
            raise UserError(
                f"{self.folder}: what was written is gone ({error}); another `prepare` has finished or cleared this "
                "cache. See that only one writes it, and start the same command again."
            ) from error

    def finish(self, source: Mapping[str, Any]) -> None:
        """Collects the shards' entries and writes the manifest, which says of the source what it was at the beginning.

        Raises:
          UserError: a split has no document; the source is no longer what it was, `Source.describe`, at the beginning.
        """
        with self._while_nobody_clears():
            splits = {split: self._split_entry(split) for split in self.corpus.source.splits}
        if (now := self.corpus.source.describe()) != source:
            raise UserError(
                f"corpus {self.corpus.name}: {_changed_part(source, now)} has changed since this was begun; when "
                "nothing changes it any more, start the same command again."
            )
        manifest = {
            "corpus": self.corpus.name,
            "version": self.corpus.version,
            "vocabulary": {**self.vocabulary.description, "fingerprint": self.vocabulary.fingerprint},
            "token_dtype": token_dtype(self.vocabulary.vocab_size).str,
            "source": source,
            "splits": splits,
        }
        write_manifest(self.folder, manifest)

    def _split_entry(self, split: str) -> dict:
        shards = [json.loads(self._entry_path(split, shard).read_text()) for shard in range(self.num_shards)]
        totals = {count: sum(shard[count] for shard in shards) for count in ("documents", "tokens", "bytes")}
        if not totals["documents"]:
            raise no_documents(self.corpus.source, split)
        skipped = collections.Counter()
        for task in self.tasks:
            if task.split == split:
                skipped.update(skipped_in(self._spill_path(task)))
        fields = sorted(set().union(*(shard.pop("metadata_fields") for shard in shards)))
        return {**totals, "skipped": dict(sorted(skipped.items())), "metadata_fields": fields, "shards": shards}

    def _spill_path(self, task: Task) -> epath.Path:
        name = f"{task.split}-{task.part_number:05d}-{task.turn:02d}-of-{task.turns:02d}.records"
        return self.work / name

    def _entry_path(self, split: str, shard: int) -> epath.Path:
        return self.work / f"{split}-{shard:05d}.json"


def write_cache(
    corpus: Corpus,
    vocabulary: Vocabulary | ByteVocabulary,
    cache_dir: str | os.PathLike,
    *,
    num_shards: int,
    beam_flags: Sequence[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Tokenises all splits of a corpus into `<cache_dir>/<corpus.name>`, replacing what is there once it is complete.

    What an interrupted call with the same arguments has done is not done again, whichever engine did it.

    Args:
      corpus: what to read.
      vocabulary: how to tokenise.
      cache_dir: a folder of this machine, a shared one or a bucket's; all Beam workers must see it under this path.
      num_shards: shards of each split.
      beam_flags: None reads in this process, otherwise the command-line flags of a Beam pipeline.
      overwrite: write again in a bucket, too, where all was done but for some cleaning up.

    Raises:
      UserError: as `Source.read`; a document has no tokens; a split has no document; the source has changed meanwhile;
        Beam is not installed; another process is writing the same cache; its folder holds something else.
    """
    if beam_flags is not None:
        _require_beam()
    plan = {
        "version": corpus.version,
        "vocabulary": vocabulary.fingerprint,
        "source": corpus.source.describe(),
        "shards": num_shards,
    }
    with writing(cache_dir, corpus.name, plan, overwrite=overwrite) as folder:
        if (folder / MANIFEST).exists():
            return  # interrupted when all was done
        work = work_folder(folder, plan)
        writer = CacheWriter(
            corpus, vocabulary, _seen_anywhere(folder), _seen_anywhere(work), num_shards, _tasks(corpus)
        )
        tasks, shards = writer.waiting()
        if len(tasks) < len(writer.tasks):
            print(
                f"{folder}: goes on where it was interrupted, with {len(tasks)} of {len(writer.tasks)} tasks and "
                f"{len(shards)} of {len(writer.shards)} shards to do",
                file=sys.stderr,
            )
        if beam_flags is None:
            _run_here(writer, tasks, shards)
        else:
            _run_beam(writer, tasks, shards, beam_flags)
        writer.finish(plan["source"])


def _changed_part(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A part of a source, as `Source.describe` names it, that is not what it was."""
    for split, parts in before["parts"].items():
        for one, other in itertools.zip_longest(parts, now["parts"][split]):
            if one != other:
                return (one or other)[0]
    raise AssertionError("only parts change while a source is read")


def _seen_anywhere(folder: epath.Path) -> epath.Path:
    """Not relative to a working directory, since workers have another."""
    return folder if files.is_remote(folder) else folder.resolve()


def _tasks(corpus: Corpus) -> list[Task]:
    source, tasks = corpus.source, []
    for split in source.splits:
        for number, (part, size) in enumerate(source.sized_parts(split)):
            turns = min(max(1, -(-size // _TURN_BYTES)), _MOST_TURNS)
            tasks += [Task(split, number, part, turn, turns) for turn in range(turns)]
    return tasks


def _run_here(writer: CacheWriter, tasks: Sequence[Task], shards: Sequence[tuple[str, int]]) -> None:
    name = writer.corpus.name
    for task in tqdm.tqdm(tasks, f"{name}: tokenising", disable=None):  # None: a bar on a terminal only
        writer.spill(task)
    for split, shard in tqdm.tqdm(shards, f"{name}: writing shards", disable=None):
        writer.write(split, shard)


def _require_beam() -> None:
    try:
        import apache_beam  # noqa: F401
    except ImportError as error:
        raise UserError("--runner needs Apache Beam; install it with: pip install 't5x_domain[beam]'.") from error


def _run_beam(
    writer: CacheWriter, tasks: Sequence[Task], shards: Sequence[tuple[str, int]], flags: Sequence[str]
) -> None:
    try:
        with beam_pipeline(flags) as pipeline:
            add_work(pipeline, writer, tasks, shards)
    except Exception as error:
        # Beam hands on the text of a worker's error, not its type.
        if message := re.search(r"UserError: (.+?)(?: \[while running|\n|$)", f"{type(error).__name__}: {error}"):
            raise UserError(message[1]) from error
        raise


def add_work(
    pipeline: "beam.Pipeline", writer: CacheWriter, tasks: Sequence[Task], shards: Sequence[tuple[str, int]]
) -> None:
    """Adds the steps to a pipeline: all tasks, and when they are done all shards, each spread over the workers."""
    import apache_beam as beam

    spilled = (
        pipeline
        | "tasks" >> beam.Create([tuple(task) for task in tasks], reshuffle=False)
        | "spread tasks" >> beam.Reshuffle()
        | "tokenize" >> beam.Map(lambda task: writer.spill(Task(*task)))
        | "all tasks" >> beam.combiners.Count.Globally()
    )
    (
        pipeline
        | "shards" >> beam.Create(shards, reshuffle=False)
        | "spread shards" >> beam.Reshuffle()
        | "write" >> beam.Map(lambda shard, _: writer.write(*shard), beam.pvalue.AsSingleton(spilled))
    )


def beam_pipeline(flags: Sequence[str]) -> "beam.Pipeline":
    """An empty pipeline that will run as the flags say."""
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    options = PipelineOptions(list(flags))
    # Beam's DirectRunner would first download a Prism binary; its own Python runner does the same work without.
    local = options.view_as(StandardOptions).runner == "DirectRunner"
    return beam.Pipeline(runner=FnApiRunner() if local else None, options=options)
