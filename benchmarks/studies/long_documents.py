"""The long documents of the study of long rows: of software, and parts of books."""

import gzip
import itertools
import json
import re

from t5x_domain.errors import UserError

BOOKS = ("austen", "moby-dick", "kjv")  # sources of the general corpus whose records are the sections of books
CHARACTERS = 5  # a token has fewer on average, so a document of 5 times as many characters fills a row
HELD_OUT = 5  # of so many documents one is held out


def write_documents(software, general, files, length, limit):
    """The corpora {name: file}: long documents of the one, parts of books of the other; every fifth is held out.

    Args:
      software: gzipped JSON lines with `text`.
      general: the same, with `source`, `title` and the section's number at the end of `id`.
      files: to be written, "software" and "books".
      length: tokens that a document should have, at least.
      limit: documents of each corpus at most.
    """
    characters = CHARACTERS * length
    found = {
        "software": (r["text"] for r in records(software) if len(r["text"]) >= characters),
        "books": parts_of_books(general, characters),
    }
    for name, file in files.items():
        texts = list(itertools.islice(found[name], limit))
        if len(texts) < 2 * HELD_OUT:
            raise UserError(
                f"{name}: {len(texts)} documents of {characters} characters are too few; give a larger file."
            )
        with gzip.open(file, "wt", encoding="utf-8") as out:
            for i, text in enumerate(texts):
                split = "validation" if i % HELD_OUT == 0 else "train"
                out.write(json.dumps({"id": f"{name}/{i}", "split": split, "text": text}) + "\n")


def records(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def parts_of_books(path, characters):
    """Consecutive sections of each book, put together until they are long enough.

    What is left at a book's end is lost, and so are sections without a number, as an epilogue.
    """
    books = {}
    for record in records(path):
        number = re.search(r"(\d+)\D*$", record["id"])
        if record["source"] in BOOKS and number:
            books.setdefault((record["source"], record["title"]), []).append((int(number[1]), record["text"]))
    for _, sections in sorted(books.items()):
        part = ""
        for _, text in sorted(sections):
            part += text + "\n\n"
            if len(part) >= characters:
                yield part
                part = ""
