"""First-fit packing: rows of several whole documents, planned from lengths alone before a token is read."""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from t5x_domain.data.sampling import Piece, Sampler, permuted, random_bits

# Where a document must be cut to fit into what is left of the rows, fewer tokens are not worth a segment of their own.
_SHORTEST_CUT = 8
# Documents stand in stored order within a block and blocks in random order; a block is read together. Small corpora
# have at least this many blocks, of this many tokens or more, so that their epochs differ.
_BLOCK_TOKENS = 1 << 15
_LEAST_BLOCKS, _LEAST_BLOCK_TOKENS = 64, 1 << 10
# A long document may be divided between two windows at multiples of this many tokens.
_GRID = 128
# A sequence is scarce if the text fills at least this share of what it fills of the fuller one.
_SCARCE = 0.9
# Pieces are not cut below this share of the longest that a row holds to make room beside them.
_LEAST_CUT = 0.25


class Window(NamedTuple):
    """The pieces of some consecutive rows, those that found no room in them, and how full (encoder, decoder) are."""

    rows: list[list[Piece]]
    dropped: list[Piece]
    filled: tuple[float, float]


class Source:
    """The documents of a corpus, or of a subset, as a line of tokens that its components share.

    Every epoch permutes blocks of documents. A position counts tokens over all epochs.
    """

    def __init__(self, key: tuple[int, ...], offsets: np.ndarray):
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
        document = int(np.searchsorted(self.offsets, token, side="right")) - 1
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
        full, rest = np.divmod(np.diff(source.offsets), self.longest)
        rests = np.bincount(rest, minlength=self.longest + 1)
        rests[0] = 0
        rests[-1] += full.sum()  # counts of pieces by their length; a rest is shorter than the longest
        # Exactly rounded sums, so that every machine plans the same windows.
        room = np.array([math.fsum(mean * rests) for mean in self._mean])
        return (room + self._prefix_cost * (self._mean_prefix * float(rests.sum()))) / source.num_tokens

    def pieces(self, source: Source, component: int, epoch: int, start: int, stop: int) -> list[tuple]:
        """(piece, encoder, decoder, metadata tokens) of the pieces in [start, stop)."""
        offsets = source.offsets
        first = np.searchsorted(offsets, start, side="right") - 1
        last = np.searchsorted(offsets, stop, side="left")
        begins = np.maximum(offsets[first:last], start)
        ends = np.minimum(offsets[first + 1 : last + 1], stop)
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


class FirstFit(Sampler):
    """Deals whole documents, and pieces of long ones, to rows; attention does not cross them.

    Window w is rows [w R, (w + 1) R). It takes the next stretch of every source and divides it among the source's
    components by their rates, so a rate is a share of the text, and no document comes twice in an epoch whatever its
    denoiser. A window takes as much text as fills `fill` of the encoder's or the decoder's positions, whichever is full
    first. Rows are filled one after the other with the longest piece that fits, taken from those that need more of the
    encoder or from those that need more of the decoder, whichever the row has more of (after the permutation packing of
    Leinberger et al. 1999); so objectives of different shapes fill each other's gaps. What is left over is cut into
    what room there is. Row i costs the work of one window whatever i is.

    Where a full-length piece would leave a row that nothing could fill, long documents are cut into shorter pieces, see
    `Shape.longest_beside`.
    """

    def __init__(
        self,
        components: Sequence[tuple[Source, Shape]],
        rates: Sequence[float],
        capacity: tuple[int, int],
        *,
        rows_per_window: int,
        fill: float,
        seed: int,
        epochs: int | None = None,
    ):
        self._capacity = capacity
        self._rows_per_window = rows_per_window
        self._seed = seed
        self._epochs = epochs
        shares = [rate / sum(rates) for rate in rates]
        full = self._row_shares(components, shares)
        if all(capacity):
            scarce = [share >= _SCARCE * max(full) for share in full]
            ratios = [shape.ratio for _, shape in components]
            longest = [shape.longest_beside((min(ratios), max(ratios)), capacity, scarce) for _, shape in components]
            components = [
                (source, shape.cut_to(size)) for (source, shape), size in zip(components, longest, strict=True)
            ]
            full = self._row_shares(components, shares)
        self._components = components
        tokens = fill * rows_per_window / max(full)
        self._budgets = [max(1, round(share * tokens)) for share in shares]
        self._sources = list({source.key: source for source, _ in components}.values())
        self._starts = {source.key: 0 for source in self._sources}

    def _row_shares(self, components: Sequence[tuple[Source, Shape]], shares: Sequence[float]) -> list[float]:
        """Room by raw token of the mixture, as a share of a row's (encoder, decoder); no encoder has capacity 0."""
        uses = [shape.use(source) for source, shape in components]
        return [
            sum(share * float(use[i]) for share, use in zip(shares, uses, strict=True)) / max(size, 1)
            for i, size in enumerate(self._capacity)
        ]

    @property
    def longest(self) -> list[int]:
        """Tokens of each component's longest piece."""
        return [shape.longest for _, shape in self._components]

    def rows(self, start: int, stop: int) -> list[list[Piece]]:
        rows = [row for window in self._windows(start, stop) for row in window.rows]
        skip = start % self._rows_per_window
        return rows[skip : skip + stop - start]

    def dropped(self, start: int, stop: int) -> list[Piece]:
        return [piece for window in self._windows(start, stop) for piece in window.dropped]

    def num_rows(self, epochs: float, component: int = 0) -> int:
        source = self._components[component][0]
        return math.ceil(epochs * source.num_tokens / self._budget(source)) * self._rows_per_window

    def begin_at(self, starts: Mapping[tuple[int, ...], int]) -> None:
        self._starts = {source.key: starts.get(source.key, 0) for source in self._sources}

    def consumed(self, num_rows: int) -> dict[tuple[int, ...], int]:
        windows = -(-num_rows // self._rows_per_window)
        return {source.key: self._starts[source.key] + windows * self._budget(source) for source in self._sources}

    def _budget(self, source: Source) -> int:
        """Tokens that a window takes from a source."""
        return sum(
            budget for (own, _), budget in zip(self._components, self._budgets, strict=True) if own.key == source.key
        )

    def _windows(self, start: int, stop: int) -> list[Window]:
        return [
            _plan(self, index) for index in range(start // self._rows_per_window, -(-stop // self._rows_per_window))
        ]

    def plan(self, window: int) -> Window:
        """Deals the pieces of a window to its rows; a pure function of the seed and the window's index."""
        queue = self._queue(window)
        room = Room(self._rows_per_window, self._capacity)
        rows, left = room.fill([entry[1:3] for entry in queue])
        rows = [[queue[number][0] for number in row] for row in rows]
        dropped = []
        for piece, *_, prefix in (queue[number] for number in left):
            shape = self._components[piece.component][1]
            while piece.start < piece.stop:
                row, length = room.longest_cut(shape.at_most(prefix))
                length = min(length, piece.stop - piece.start)
                if length < _SHORTEST_CUT:
                    dropped.append(piece)
                    break
                cut = piece._replace(stop=piece.start + length)
                room.take(row, *shape.room(cut, prefix).tolist())
                rows[row].append(cut)
                piece = piece._replace(start=cut.stop)
        # The longest documents are in the first rows and the padding in the last.
        order = np.random.default_rng(random_bits(self._seed, len(self._components), window)).permutation(len(rows))
        return Window([rows[row] for row in order], dropped, room.filled)

    def _queue(self, window: int) -> list[tuple]:
        """(piece, encoder, decoder, metadata tokens) of all that a window takes."""
        result = []
        offsets = dict.fromkeys(self._starts, 0)
        for component, ((source, shape), budget) in enumerate(zip(self._components, self._budgets, strict=True)):
            start = self._starts[source.key] + window * self._budget(source) + offsets[source.key]
            offsets[source.key] += budget
            stop = start + budget
            if self._epochs is not None:
                stop = min(stop, self._epochs * source.num_tokens)
            for stretch in source.stretches(start, stop, self._seed):
                result += shape.pieces(source, component, *stretch)
        return result


@functools.lru_cache(maxsize=64)
def _plan(sampler: FirstFit, window: int) -> Window:
    """Small batches and several threads ask for the same window again. Samplers are told apart by identity."""
    return sampler.plan(window)


class Room:
    """What is left of the (encoder, decoder) sequences of some rows."""

    def __init__(self, rows: int, capacity: tuple[int, int]):
        self._size = np.array(capacity, np.int64)
        self._free = np.tile(self._size[:, None], (1, rows))  # [2, rows]

    def fill(self, needs: Sequence[tuple[int, int]]) -> tuple[list[list[int]], list[int]]:
        """Deals pieces that need (encoder, decoder) room to the rows.

        Returns:
          Numbers of the pieces in each row, and of those that fit nowhere, the longest first.
        """
        sizes = np.maximum(self._size, 1)
        need = np.array(needs, np.int64).reshape(-1, 2).T
        order = np.argsort(-(need / sizes[:, None]).max(axis=0), kind="stable")
        need = need[:, order]
        needs_encoder = need[0] * sizes[1] >= need[1] * sizes[0]
        waiting = np.ones(len(order), bool)
        rows: list[list[int]] = []
        for free in self._free.T:
            row = []
            while waiting.any():
                fits = waiting & (need[0] <= free[0]) & (need[1] <= free[1])
                # The first of the kind that the row has more room for, else the first of the other.
                suits = fits & (needs_encoder == (free[0] * sizes[1] >= free[1] * sizes[0]))
                chosen = int(suits.argmax())
                if not suits[chosen]:
                    chosen = int(fits.argmax())
                    if not fits[chosen]:
                        break
                free -= need[:, chosen]  # a view of what the row has left
                waiting[chosen] = False
                row.append(int(order[chosen]))
            rows.append(row)
        return rows, order[waiting].tolist()

    def longest_cut(self, lengths: np.ndarray) -> tuple[int, int]:
        """The row that can hold the longest piece, and that piece's raw tokens; `lengths` as in `Shape`."""
        fits = [
            np.searchsorted(length, free, side="right") - 1 for length, free in zip(lengths, self._free, strict=True)
        ]
        longest = np.minimum(*fits)
        row = int(longest.argmax())
        return row, int(longest[row])

    def take(self, row: int, encoder: int, decoder: int) -> None:
        self._free[:, row] -= encoder, decoder

    @property
    def filled(self) -> tuple[float, float]:
        """Share of the (encoder, decoder) positions that are taken."""
        size = np.maximum(self._size, 1) * self._free.shape[1]
        return tuple((1 - self._free.sum(axis=1) / size).tolist())
