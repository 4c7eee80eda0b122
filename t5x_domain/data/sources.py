"""Where documents come from: JSONL, plain text, Parquet, TFRecord and TFDS, read as a stream in constant memory.

A source has splits; a split is a list of parts (files), and a part is read from its start to its end. Parts are what a
Beam pipeline reads in parallel, and (part, record) is a document's position, which fixes its place in the token cache.
"""

import abc
import collections
import dataclasses
import glob
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin

from t5x_domain import files
from t5x_domain.cli import gin_search_paths
from t5x_domain.data.lines import read_lines
from t5x_domain.data.whole_files import at_hand
from t5x_domain.errors import UserError


@dataclasses.dataclass(frozen=True)
class Document:
    """A text with its metadata, and where it was read."""

    text: str
    metadata: dict[str, Any]
    position: tuple[int, int]  # (part of the split from 0, record in the part: a line from 1)
    place: str  # for messages: "corpus.jsonl.gz, line 12"


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that is no document. `reason` is what skipped records are counted by."""

    reason: str
    place: str


@dataclasses.dataclass(frozen=True)
class Source(abc.ABC):
    """What all sources share. A subclass says how the parts of a split are named and how one part is read.

    Attributes:
      text_field: the field that holds the text.
      metadata_fields: fields kept as metadata; empty keeps every other field that is a scalar, string or list.
      skip_bad_records: leave out and count records that are no documents, instead of stopping at the first.
    """

    text_field: str = dataclasses.field(default="text", kw_only=True)
    metadata_fields: Sequence[str] = dataclasses.field(default=(), kw_only=True)
    skip_bad_records: bool = dataclasses.field(default=False, kw_only=True)

    @property
    @abc.abstractmethod
    def splits(self) -> list[str]:
        """Names of the splits."""

    @abc.abstractmethod
    def sized_parts(self, split: str) -> list[tuple[str, int]]:
        """What can be read independently, in a fixed order, e.g. files, and how large it is.

        The size is in bytes, or another number that changes with the content: a cache made from another size is stale.

        Raises:
          UserError: there is no part.
        """

    def parts(self, split: str) -> list[str]:
        """`sized_parts` without the sizes."""
        return [part for part, _ in self.sized_parts(split)]

    @abc.abstractmethod
    def _records(self, split: str, part: str) -> Iterator[tuple[int, str, Mapping | BadRecord]]:
        """Yields (number of the record in the part, its place, its fields) in the part's order."""

    def describe(self) -> dict:
        """What the cache's manifest says of the source. Folders are left out, so a moved corpus stays the same."""
        knobs = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "files"}
        parts = {split: [[Path(part).name, size] for part, size in self.sized_parts(split)] for split in self.splits}
        return json.loads(json.dumps({"kind": type(self).__name__, **knobs, "parts": parts}))

    def read(self, split: str, part_number: int, part: str) -> Iterator[Document | BadRecord]:
        """Documents of one part, in order; bad records stand where they were found.

        Raises:
          UserError: the part is missing, empty or damaged, or a record is bad and `skip_bad_records` is off.
        """
        for number, place, fields in self._records(split, part):
            result = fields if isinstance(fields, BadRecord) else self._document(fields, (part_number, number), place)
            if isinstance(result, BadRecord):
                self.check_skippable(result)
            yield result

    def check_skippable(self, bad: BadRecord) -> None:
        """Raises UserError unless bad records are to be skipped."""
        if not self.skip_bad_records:
            raise UserError(
                f"{bad.place}: {bad.reason}. Mend it, or leave such records out with "
                f"{type(self).__name__}.skip_bad_records = True."
            )

    def documents(self, split: str) -> Iterator[Document]:
        """All documents of a split, as a stream. What was skipped is logged at the end.

        Raises:
          UserError: as `read`, or there is no document at all.
        """
        skipped, found = collections.Counter(), False
        for part_number, part in enumerate(self.parts(split)):
            for record in self.read(split, part_number, part):
                if isinstance(record, BadRecord):
                    skipped[record.reason] += 1
                else:
                    found = True
                    yield record
        if skipped:
            logging.getLogger(__name__).warning("%s, split '%s': skipped %s", type(self).__name__, split, dict(skipped))
        if not found:
            raise no_documents(self, split)

    def _document(self, fields: Mapping, position: tuple[int, int], place: str) -> Document | BadRecord:
        text = fields.get(self.text_field)
        if text is None:
            return BadRecord(f"there is no field '{self.text_field}'", place)
        if isinstance(text, bytes):
            return BadRecord(f"field '{self.text_field}' is not UTF-8", place)
        if not isinstance(text, str):
            return BadRecord(f"field '{self.text_field}' is no string but {type(text).__name__}", place)
        if not _is_unicode(text):
            return BadRecord(f"field '{self.text_field}' holds half of a surrogate pair", place)
        names = self.metadata_fields or [name for name in fields if name not in self._not_metadata]
        metadata = {name: fields[name] for name in names if _is_metadata(fields.get(name))}
        return Document(text, metadata, position, place)

    @property
    def _not_metadata(self) -> tuple[str, ...]:
        return (self.text_field,)


def no_documents(source: Source, split: str) -> UserError:
    """The error for a split in which nothing was found."""
    parts = ", ".join(source.parts(split))
    return UserError(
        f"{parts}: no document in split '{split}'; look at the files and the split of {type(source).__name__}."
    )


@dataclasses.dataclass(frozen=True)
class FileSource(Source):
    """A source of files.

    Attributes:
      files: for each split a file or glob pattern, or a list of them; in a bucket, or relative to the working
        directory, else to the checkout or the installed package.
    """

    files: Mapping[str, str | Sequence[str]]

    def __post_init__(self) -> None:
        """Raises UserError if `files` does not say which files are which split's."""
        if not isinstance(self.files, Mapping):
            raise UserError(
                f"{type(self).__name__}.files = {self.files!r}: name the files of each split, "
                "{'train': 'train-*.jsonl', 'validation': 'validation.jsonl'}."
            )

    @property
    def splits(self) -> list[str]:
        return list(self.files)

    def sized_parts(self, split: str) -> list[tuple[str, int]]:
        if split not in self.files:
            raise UserError(f"{type(self).__name__}.files has no split '{split}', only {', '.join(self.files)}.")
        patterns = [self.files[split]] if isinstance(self.files[split], str) else self.files[split]
        return [found for pattern in patterns for found in sized_files(pattern)]


def resolve_files(pattern: str, setting: str = "the source's `files`") -> list[str]:
    """`sized_files` without the sizes."""
    return [path for path, _ in sized_files(pattern, setting)]


def sized_files(pattern: str, setting: str = "the source's `files`") -> list[tuple[str, int]]:
    """(file, bytes) where a path or glob pattern matches, in a bucket or the first of `gin_search_paths` that has any.

    They are sorted. `setting` is where the pattern was given, for messages.

    Raises:
      UserError: nothing matches.
    """
    if files.is_remote(pattern):
        if found := files.matching(pattern):
            return found
        raise UserError(f"{pattern}: no such object; mend {setting} in gin.")
    for root in gin_search_paths():
        paths = [Path(root, match) for match in glob.glob(pattern, root_dir=root, recursive=True)]
        if found := sorted((str(path), path.stat().st_size) for path in paths if path.is_file()):
            return found
    raise UserError(f"{pattern}: no such file (working directory {Path.cwd()}); mend {setting} in gin.")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class JsonlSource(FileSource):
    """One JSON object a line; files may end in .gz or .zst.

    Attributes:
      split_field: if set, only records whose field of this name equals the split are read, so that one file can serve
        several splits.
    """

    split_field: str | None = None

    def _records(self, split: str, part: str) -> Iterator[tuple[int, str, Mapping | BadRecord]]:
        for number, line in enumerate(read_lines(part), 1):
            if not line.strip():
                continue
            place = f"{part}, line {number}"
            fields = _json_object(line, place)
            if self.split_field and not isinstance(fields, BadRecord):
                if self.split_field not in fields:
                    fields = BadRecord(f"there is no field '{self.split_field}'", place)
                elif fields[self.split_field] != split:
                    continue
            yield number, place, fields

    @property
    def _not_metadata(self) -> tuple[str, ...]:
        return (self.text_field, self.split_field)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class TextSource(FileSource):
    """Plain UTF-8 text; files may end in .gz or .zst. The only metadata is `file`.

    Attributes:
      document: what one document is: a "line", a "paragraph" (ended by a blank line) or the whole "file".
    """

    document: str = "paragraph"

    def _records(self, split: str, part: str) -> Iterator[tuple[int, str, Mapping | BadRecord]]:
        lines = ((number, _decode(line, f"{part}, line {number}")) for number, line in enumerate(read_lines(part), 1))
        if self.document == "line":
            groups = ([line] for line in lines)
        elif self.document == "paragraph":
            groups = _paragraphs(lines)
        elif self.document == "file":
            groups = iter([list(lines)])
        else:
            raise UserError(f"TextSource.document is '{self.document}'; it may be 'line', 'paragraph' or 'file'.")
        for group in groups:
            number, place = group[0][0], f"{part}, line {group[0][0]}"
            bad = next((text for _, text in group if isinstance(text, BadRecord)), None)
            text = bad or "\n".join(text for _, text in group).strip()
            if text:
                yield number, place, bad or {self.text_field: text, "file": Path(part).name}


@gin.configurable
@dataclasses.dataclass(frozen=True)
class ParquetSource(FileSource):
    """Rows of Parquet files; a record's number is its row from 1. Dates become ISO 8601 strings."""

    def _records(self, split: str, part: str) -> Iterator[tuple[int, str, Mapping | BadRecord]]:
        import pyarrow
        import pyarrow.parquet

        number = 0
        try:
            with files.path(part).open("rb") as file, pyarrow.parquet.ParquetFile(file) as table:
                rows = (row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
                for number, row in enumerate(rows, 1):
                    yield number, f"{part}, row {number}", python_fields(row)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{part}: damaged after row {number} or no Parquet file ({error}); fetch it again."
            ) from error


@gin.configurable
@dataclasses.dataclass(frozen=True)
class TFRecordSource(FileSource):
    """tf.train.Example protos in TFRecord files (.gz allowed); needs TensorFlow. One-element lists become scalars."""

    def _records(self, split: str, part: str) -> Iterator[tuple[int, str, Mapping | BadRecord]]:
        import tensorflow as tf
        from google.protobuf.message import DecodeError

        number = 0
        try:
            with at_hand(files.path(part)) as copy:  # TensorFlow has no credentials of fsspec's
                compression = "GZIP" if part.endswith(".gz") else ""
                records = tf.data.TFRecordDataset(str(copy), compression).as_numpy_iterator()
                for number, record in enumerate(records, 1):
                    features = tf.train.Example.FromString(record).features.feature
                    fields = {name: _feature_values(feature) for name, feature in features.items()}
                    yield number, f"{part}, record {number}", python_fields(fields)
        except (tf.errors.OpError, DecodeError) as error:
            raise UserError(f"{part}: damaged after record {number} ({error}); fetch it again.") from error


@gin.configurable
@dataclasses.dataclass(frozen=True)
class TfdsSource(Source):
    """A TensorFlow Datasets dataset that has been prepared on disk; needs TensorFlow. A part is a TFDS split.

    Attributes:
      name: TFDS name, e.g. "wikipedia/20230601.en", of a dataset that is already below `data_dir`.
      tfds_splits: our split -> TFDS split, slices allowed, e.g. {"train": "train[:99%]", "validation": "train[99%:]"}.
      data_dir: where TFDS looks; None is its default folder.
    """

    name: str
    tfds_splits: Mapping[str, str]
    data_dir: str | None = None

    @property
    def splits(self) -> list[str]:
        return list(self.tfds_splits)

    def sized_parts(self, split: str) -> list[tuple[str, int]]:
        if split not in self.tfds_splits:
            raise UserError(f"TfdsSource.tfds_splits has no split '{split}', only {', '.join(self.tfds_splits)}.")
        part = self.tfds_splits[split]
        return [(part, self._builder().info.splits[part].num_bytes)]

    def _builder(self):  # noqa: ANN202
        import tensorflow_datasets as tfds

        try:
            return tfds.builder(self.name, data_dir=self.data_dir)
        except tfds.core.DatasetNotFoundError as error:
            raise UserError(f"TfdsSource.name '{self.name}' is not below data_dir {self.data_dir}: {error}") from error

    def _records(self, split: str, part: str) -> Iterator[tuple[int, str, Mapping | BadRecord]]:
        import tensorflow_datasets as tfds

        for number, fields in enumerate(tfds.as_numpy(self._builder().as_dataset(split=part)), 1):
            yield number, f"{self.name}, split {part}, record {number}", python_fields(fields)


def _decode(line: bytes, place: str) -> str | BadRecord:
    try:
        return line.decode("utf-8-sig").rstrip("\r")
    except UnicodeDecodeError:
        return BadRecord("not UTF-8", place)


def _json_object(line: bytes, place: str) -> dict | BadRecord:
    text = _decode(line, place)
    if isinstance(text, BadRecord):
        return text
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = None
    return fields if isinstance(fields, dict) else BadRecord("not a JSON object", place)


def _paragraphs(lines: Iterable[tuple[int, str | BadRecord]]) -> Iterator[list[tuple[int, str | BadRecord]]]:
    paragraph = []
    for number, line in lines:
        if isinstance(line, BadRecord) or line.strip():
            paragraph.append((number, line))
        elif paragraph:
            yield paragraph
            paragraph = []
    if paragraph:
        yield paragraph


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_metadata(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, str | int | float) for item in value)
    return isinstance(value, str | int | float)


def _feature_values(feature: Any) -> Any:
    """The values of a tf.train.Feature: a list, or the value itself if there is one."""
    kind = feature.WhichOneof("kind")
    values = list(getattr(feature, kind).value) if kind else []
    return values[0] if len(values) == 1 else values


def python_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as plain Python values: bytes in UTF-8 become strings, numpy arrays lists, dates ISO 8601 strings."""
    return {name: _python_value(value) for name, value in fields.items()}


def _python_value(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_python_value(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    return value.isoformat() if hasattr(value, "isoformat") else value
