"""Documents of a corpus as one line of tokens, read by range: all of them, the first ones, or a lane's."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from t5x_domain.data.cache import CachedSplit
from t5x_domain.data.sampling import Piece
from t5x_domain.data.tasks import Mixture
from t5x_domain.errors import UserError

# Metadata of documents are read this many at a time.
_DOCUMENTS_AT_ONCE = 4096


class TokenLine:
    """Documents that follow one another in a split as one line of token ids, with an EOS after each if asked."""

    def __init__(self, split: CachedSplit, documents: range, separator: int | None = None, *, in_lane: bool = False):
        """`in_lane`: the line is one of several that divide the corpus, see data/lanes.py."""
        self.split, self.documents, self._separator, self._in_lane = split, documents, separator, in_lane
        self._first_token = split.offsets[documents.start]
        stored = split.offsets.part(documents.start, documents.stop)
        self.offsets = stored if separator is None else stored.with_separators()

    @property
    def num_documents(self) -> int:
        return len(self.documents)

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def key(self) -> tuple[int, ...]:
        """Tells the line from others in all phases of a run."""
        place = (self.documents.start,) if self._in_lane else ()
        return zlib.crc32(self.split.corpus.encode()), self.num_documents, *place

    def document(self, position: int) -> int:
        """The document that a token belongs to."""
        return self.offsets.searchsorted(position, side="right") - 1

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), int32."""
        first, last = self.document(start), self.offsets.searchsorted(stop, side="left")
        documents = self.split.documents(self.documents.start + first, self.documents.start + last)
        if self._separator is not None:
            end = np.array([self._separator], np.int32)
            documents = [part for document in documents for part in (document, end)]
        begin = self.offsets[first]
        return np.concatenate(documents)[start - begin : stop - begin]

    def metadata(self, documents: range) -> Iterator[dict]:
        """Metadata of some documents, counted from the line's first."""
        begin, end = self.documents.start + documents.start, self.documents.start + documents.stop
        for start in range(begin, end, _DOCUMENTS_AT_ONCE):
            yield from self.split.metadata(start, min(start + _DOCUMENTS_AT_ONCE, end))

    def parts(self, piece: Piece) -> list[tuple[int, int]]:
        """(start, stop) of a piece within the line: two if it wraps."""
        end = self.num_tokens
        return [(piece.start, piece.stop)] if piece.stop <= end else [(piece.start, end), (0, piece.stop - end)]

    def stored(self, position: int) -> int:
        """Tokens of the split before a position, separators not counted."""
        separators = 0 if self._separator is None else self.document(position)
        return self._first_token + position - separators

    def read_all(self, pieces: Iterable[Piece]) -> dict[Piece, np.ndarray]:
        """Tokens of all pieces, int32; neighbours in the cache are read together, which costs less than one by one."""
        result = {}
        run: list[Piece] = []
        for piece in sorted(pieces, key=lambda piece: piece.start):
            if run and piece.start != run[-1].stop:
                result.update(self._read_run(run))
                run = []
            run.append(piece)
        return result | (self._read_run(run) if run else {})

    def _read_run(self, run: list[Piece]) -> dict[Piece, np.ndarray]:
        whole = run[0]._replace(stop=run[-1].stop)
        parts = [self.read(start, stop) for start, stop in self.parts(whole)]
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return {piece: tokens[piece.start - whole.start : piece.stop - whole.start] for piece in run}


def used_documents(
    splits: Sequence[CachedSplit], mixture: Mixture, subset: Mapping[str, float]
) -> list[tuple[CachedSplit, int]]:
    """The split of every corpus of the mixture, and how many of its documents are used.

    Raises:
      UserError: a corpus has no split here, or a subset is larger than its corpus.
    """
    by_name = {split.corpus: split for split in splits}
    used = []
    for corpus in (corpus.name for corpus in mixture.corpora):
        if corpus not in by_name:
            raise UserError(f"corpus {corpus} has no cached split here, only {', '.join(by_name)}.")
        used.append((by_name[corpus], _num_documents(by_name[corpus], subset.get(corpus))))
    return used


def token_line(split: CachedSplit, documents: int, separator: int | None, lane: tuple[int, int] | None) -> TokenLine:
    """The line of the first `documents` of a split, or of the part of them that a lane (number, lanes) has.

    Raises:
      UserError: there are too many lanes for the documents.
    """
    if lane is None:
        return TokenLine(split, range(documents), separator)
    tokens, (number, lanes) = split.offsets[documents], lane
    start, stop = (split.offsets.searchsorted(border * tokens // lanes) for border in (number, number + 1))
    if start == stop:
        raise UserError(
            f"Run.lanes = {lanes} is too many for the {documents} documents of corpus {split.corpus}, split "
            f"{split.split}; set fewer."
        )
    return TokenLine(split, range(start, stop), separator, in_lane=True)


def _num_documents(split: CachedSplit, wanted: float | None) -> int:
    """How many documents of a split a subset holds."""
    documents = split.num_documents
    if wanted is None:
        return documents
    number = round(wanted * documents) if isinstance(wanted, float) else wanted
    if not 1 <= number <= documents:
        raise UserError(
            f"Phase.subset: {wanted} of corpus {split.corpus} is {number} documents, but there are {documents}; give "
            "an integer up to that, or a fraction up to 1.0."
        )
    return number
