"""Records of CSV, TSV and JSONL files, each with the line it begins on; damage is an error that names its line."""

import csv
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from t5x_domain.data.lines import read_lines
from t5x_domain.errors import UserError

# TSV has no quoting (IANA's text/tab-separated-values); CSV quotes as RFC 4180 does.
_CSV = {"delimiter": ",", "strict": True}
_TSV = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}


class Record(NamedTuple):
    """Fields of a record, and the line it begins on, from 1."""

    line: int
    fields: dict[str, Any]


def read_records(path: str) -> Iterator[Record]:
    """Records of a .csv, .tsv or .jsonl file, each also with .gz or .zst after it; blank lines are left out.

    The first row of CSV and TSV names the fields, whose values are strings.

    Raises:
      UserError: another suffix, a damaged or empty file, text that is not UTF-8, bad JSON, bad quoting, a field named
        twice, or a row with another number of columns than the header.
    """
    suffix = path.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    if suffix == "jsonl":
        return _json_records(path)
    if suffix not in ("csv", "tsv"):
        raise UserError(
            f"{path}: cannot tell the format; name the file .csv, .tsv or .jsonl, or these with .gz or .zst."
        )
    return _table_records(path, _CSV if suffix == "csv" else _TSV)


def _json_records(path: str) -> Iterator[Record]:
    for number, line in enumerate(_texts(path), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); write one object a line.") from error
        if not isinstance(fields, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; write {{'field': value, …}} in each line.")
        yield Record(number, fields)


def _table_records(path: str, dialect: dict[str, Any]) -> Iterator[Record]:
    names = None
    for number, row in _rows(path, dialect):
        if names is None:
            names = row
            if repeated := next((name for name in names if names.count(name) > 1), None):
                raise UserError(f"{path}, line {number}: the header names '{repeated}' twice; rename a column.")
            continue
        if len(row) != len(names):
            raise UserError(
                f"{path}, line {number}: {len(row)} columns, but the header names {len(names)}; mend the row."
            )
        yield Record(number, dict(zip(names, row, strict=True)))


def _rows(path: str, dialect: dict[str, Any]) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the line it begins on: a quoted field may hold line ends."""
    reader = csv.reader((line + "\n" for line in _texts(path)), **dialect)
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}, line {number}: {error}; mend the quoting of the row that begins here.") from error
        if row is None:
            return
        if row:
            yield number, row


def _texts(path: str) -> Iterator[str]:
    """Lines as text, without line ends; a byte order mark is left out."""
    for number, line in enumerate(read_lines(path), 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: not UTF-8; save the file as UTF-8.") from error
