"""What first-fit packing knows of a corpus: where its documents are, and how much room pieces of them take."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from t5x_domain.data.offsets import Offsets
from t5x_domain.data.sampling import Piece, permuted

# Documents stand in stored order within a block and blocks in random order; a block is read together. Small corpora
# have at least this many blocks, of this many tokens or more, so that their epochs differ.
_BLOCK_TOKENS = 1 << 15
_LEAST_BLOCKS, _LEAST_BLOCK_TOKENS = 64, 1 << 10
# A long document may be divided between two windows at multiples of this many tokens.
_GRID = 128
# Pieces are not cut below this share of the longest that a row holds to make room beside them.
_LEAST_CUT = 0.25
# Lengths of documents are counted this many at a time.
_DOCUMENTS_AT_ONCE = 1 << 20


class Source:
    """The documents of a corpus, or of a subset, as a line of tokens that its components share.

    Every epoch permutes blocks of documents. A position counts tokens over all epochs.
    """

    def __init__(self, key: tuple[int, ...], offsets: Offsets):
        """`key` tells it from other sources; `offsets` is int64 [documents + 1], tokens before each document."""
        self.key = key
        self.offsets = offsets
        self.num_tokens = int(offsets[-1])
        small = min(_LEAST_BLOCKS, self.num_tokens // _LEAST_BLOCK_TOKENS)
        num_blocks = max(1, round(self.num_tokens / _BLOCK_TOKENS), small)
        # Equal blocks, so the last may lack up to a token per block.
        self._block = -(-self.num_tokens // num_blocks)
        self._num_blocks = -(-self.num_tokens // self._block)

    def stretches(self, start: int, stop: int, seed: int) -> list[tuple[int, int, int]]:
        """(epoch, start token, stop token) of positions [start, stop), one for each block they touch.

        Positions are rounded up to the next place where a document may be divided, so stretches that follow one another
        lose and repeat nothing.
        """
        result = []
        while start < stop:
            epoch, offset = divmod(start, self.num_tokens)
            nth, offset = divmod(offset, self._block)
            last = self._num_blocks - 1  # shorter than the others, so it stays last
            block = last if nth == last else permuted(nth, max(last, 1), seed, *self.key, epoch)
            size = min(self._block, self.num_tokens - block * self._block)
            taken = min(size - offset, stop - start)
            begin = block * self._block + offset
            result.append((epoch, self._border(begin), self._border(begin + taken)))
            start += taken
        return result

    def _border(self, token: int) -> int:
        """The first token at or after `token` where a document begins or may be divided."""
        document = int(self.offsets.searchsorted(token, side="right")) - 1
        if document == len(self.offsets) - 1:
            return self.num_tokens
        begin = int(self.offsets[document])
        return min(begin - (begin - token) // _GRID * _GRID, int(self.offsets[document + 1]))


class Shape:
    """What a component's pieces take of a row.

    Args:
      lengths: int64 [2, n + 1], room in the (encoder, decoder) sequence that a piece of 0, 1, … n tokens takes at most.
      mean: float64 [2, n + 1], what it takes on average; by default the same.
      draw: (pieces) -> int64 [2, pieces], what they take if that is random.
      prefix_cost: room in (encoder, decoder) for each token of a document's metadata.
      prefixes: (epoch, documents) -> int64, tokens of each document's metadata in that epoch; None for no metadata.
      mean_prefix: expected tokens of metadata of a piece.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        mean: np.ndarray | None = None,
        draw: Callable[[Sequence[Piece]], np.ndarray] | None = None,
        prefix_cost: tuple[int, int] = (0, 0),
        prefixes: Callable[[int, np.ndarray], np.ndarray] | None = None,
        mean_prefix: float = 0.0,
    ):
        self.lengths = lengths
        self.longest = lengths.shape[1] - 1
        self._mean = lengths if mean is None else mean
        self._draw = draw
        self._prefix_cost = np.array(prefix_cost)
        self._prefixes = prefixes
        self._mean_prefix = mean_prefix

    def longest_beside(self, ratios: tuple[float, float], capacity: tuple[int, int], scarce: Sequence[bool]) -> int:
        """Tokens of the longest piece beside which the rest of a row can be filled.

        A row whose decoder is full has no use for what is left of its encoder. So a piece may take as much of a row as
        leaves decoder for the encoder's rest, at the smallest ratio of the two among all components, and the other way
        round; where the sequence in question is scarce.

        Args:
          ratios: smallest and largest ratio of decoder to encoder among the mixture's pieces.
          capacity: length of a row's (encoder, decoder) sequence.
          scarce: whether (encoder, decoder) are.
        """
        low, high = ratios
        encoder, decoder = np.array(capacity)[:, None] - self._mean
        stranded = (encoder - decoder / low, decoder - encoder * high)
        fits = np.ones(self.longest + 1, bool)
        for rest, counts in zip(stranded, scarce, strict=True):
            if counts:
                fits &= rest <= 0
        fits[: math.ceil(_LEAST_CUT * self.longest)] = False
        return int(np.flatnonzero(fits)[-1]) if fits.any() else self.longest

    def cut_to(self, longest: int) -> "Shape":
        """The same with pieces of at most `longest` tokens."""
        result = copy.copy(self)
        result.lengths, result._mean = self.lengths[:, : longest + 1], self._mean[:, : longest + 1]
        result.longest = longest
        return result

    @property
    def ratio(self) -> float:
        """Decoder to encoder room of the longest piece."""
        encoder, decoder = self._mean[:, -1]
        return float(decoder / max(encoder, 1.0))  # causal LM has no inputs

    def use(self, source: Source) -> np.ndarray:
        """Mean room in (encoder, decoder) by raw token, if every document is cut into longest pieces; float64 [2]."""
        rests = np.zeros(self.longest + 1, np.int64)  # counts of pieces by their length
        for start in range(0, len(source.offsets), _DOCUMENTS_AT_ONCE):
            lengths = np.diff(source.offsets[start : start + _DOCUMENTS_AT_ONCE + 1])
            full, rest = np.divmod(lengths, self.longest)
            rests += np.bincount(rest, minlength=self.longest + 1)
            rests[-1] += full.sum()  # a rest is shorter than the longest
        rests[0] = 0
        # Exactly rounded sums, so that every machine plans the same windows.
        room = np.array([math.fsum(mean * rests) for mean in self._mean])
        return (room + self._prefix_cost * (self._mean_prefix * float(rests.sum()))) / source.num_tokens

    def pieces(self, source: Source, component: int, epoch: int, start: int, stop: int) -> list[tuple]:
        """(piece, encoder, decoder, metadata tokens) of the pieces in [start, stop)."""
        offsets = source.offsets
        first = offsets.searchsorted(start, side="right") - 1
        last = offsets.searchsorted(stop, side="left")
        borders = offsets[first : last + 1]
        begins, ends = np.maximum(borders[:-1], start), np.minimum(borders[1:], stop)
        counts = -((begins - ends) // self.longest)
        nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(begins, counts) + nth * self.longest
        stops = np.minimum(starts + self.longest, np.repeat(ends, counts))
        same = itertools.repeat
        pieces = list(map(Piece, same(component), same(epoch), starts.tolist(), stops.tolist()))
        prefix = np.zeros(len(pieces), np.int64)
        if self._prefixes is not None:
            prefix = np.repeat(self._prefixes(epoch, np.arange(first, last)), counts)
        room = self.lengths[:, stops - starts] if self._draw is None else self._draw(pieces)
        room = room + self._prefix_cost[:, None] * prefix
        return list(zip(pieces, *room.tolist(), prefix.tolist(), strict=True))

    def room(self, piece: Piece, prefix: int) -> np.ndarray:
        """Room in (encoder, decoder) that a piece takes, its metadata included."""
        room = self.lengths[:, piece.stop - piece.start] if self._draw is None else self._draw([piece])[:, 0]
        return room + self._prefix_cost * prefix

    def at_most(self, prefix: int) -> np.ndarray:
        """Like `lengths`, with metadata."""
        return self.lengths + (self._prefix_cost * prefix)[:, None]
