"""What is asked and what was answered, as JSON lines; an interrupted file goes on where it stopped."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from t5x_domain import files
from t5x_domain.data.lines import read_lines
from t5x_domain.data.templates import fields_of, filled
from t5x_domain.errors import UserError
from t5x_domain.files import changed_keys, write_atomically


class Request(NamedTuple):
    """One input.

    Attributes:
      text: what the model reads.
      fields: of its record; metadata templates name them, and they are written beside the answer.
    """

    text: str
    fields: Mapping[str, Any]


def read_requests(path: str, template: str) -> Iterator[Request]:
    """Records of a JSONL file (.gz and .zst welcome), one JSON object a line.

    Args:
      path: the file.
      template: makes the text of a record's fields, see `data.templates`.

    Raises:
      UserError: a line is no JSON object or lacks a field of the template, named by its number.
    """
    if not files.path(path).is_file():
        needed = ", ".join(f"'{name}'" for name in fields_of(template, "--text_field"))
        raise UserError(f"--input={path}: there is no such file; give JSON lines with a field {needed}.")
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); mend or remove the line.") from error
        place = f"{path}, line {number}"
        if not isinstance(fields, dict):
            raise UserError(f'{place}: no JSON object; write a record as {{"text": …}}.')
        yield Request(filled(template, fields, place, mend="name the text's field with --text_field"), fields)


class Answers:
    """Lines that are appended and kept; complete under its own name only when `finish` was called.

    Until then they are in `<path>.partial`, whose first line says what was asked. The same command goes on after its
    last whole line.
    """

    def __init__(self, path: str, asked: Mapping[str, Any]) -> None:
        """Opens the answers to `asked`, which is plain JSON: the model, the inputs and how they are decoded.

        Raises:
          UserError: the file is complete already, belongs to something else, or cannot be written.
        """
        if files.is_remote(path):
            raise UserError(f"--output={path}: answers are appended, which buckets do not allow; give a local file.")
        self._path, self._partial = Path(path), Path(f"{path}.partial")
        header = {"asked": json.loads(json.dumps(asked, default=str))}
        if self._path.exists():
            raise UserError(f"--output={path}: exists and is complete; remove it or give another name.")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lines = self._whole_lines()
            if lines and json.loads(lines[0]) != header:
                changed = changed_keys(json.loads(lines[0])["asked"], header["asked"])
                raise UserError(
                    f"{self._partial}: holds answers to another question ({', '.join(changed)} changed); remove it, or "
                    "give another --output."
                )
            lines = lines or [json.dumps(header).encode()]
            self.done = len(lines) - 1
            write_atomically(self._partial, b"".join(line + b"\n" for line in lines))
            self._file = open(self._partial, "ab")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"--output={path}: {error.strerror}; give a file you may write.") from error

    def _whole_lines(self) -> list[bytes]:
        if not self._partial.exists():
            return []
        *lines, torn = self._partial.read_bytes().split(b"\n")
        del torn  # what a killed process had begun to write
        return lines

    def add(self, answers: Iterable[Mapping[str, Any]]) -> None:
        """Appends answers; when it returns they are on disk."""
        for answer in answers:
            self._file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
            self.done += 1
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Gives the answers their name, without the line that says what was asked."""
        self._file.close()
        lines = self._whole_lines()[1:]
        write_atomically(self._path, b"".join(line + b"\n" for line in lines))
        self._partial.unlink()


def fingerprint(requests: Iterable[Request]) -> str:
    """SHA-256 (hex, 16 digits) of requests."""
    digest = hashlib.sha256()
    for request in requests:
        digest.update(repr(request).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
