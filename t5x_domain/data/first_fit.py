"""First-fit packing: rows of several whole documents, planned from lengths alone before a token is read."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from t5x_domain.data.sampling import Piece, Sampler, permuted, random_bits

# Costs are integers in this fraction of a row, so that sums and rates are exact at any step.
_UNITS_PER_ROW = 1 << 20
# Where a document must be cut to fit into what is left of the rows, fewer tokens are not worth a segment of their own.
_SHORTEST_CUT = 16


class Window(NamedTuple):
    """The pieces of some consecutive rows, and those that found no room in them."""

    rows: list[list[Piece]]
    dropped: list[Piece]


class FirstFit(Sampler):
    """Deals whole documents, and full-length pieces of long ones, to rows; attention does not cross them.

    Window w is rows [w R, (w + 1) R). It takes from each component a stretch of documents whose cost is `fill` R rows
    times the component's rate, and deals the pieces out, longest first, each to the first row where its inputs and its
    targets both fit. A piece that fits nowhere is cut into what room is left. So a rate is an exact share of the rows,
    objectives of different shapes fill each other's gaps, and row i costs the work of one window whatever i is. An
    epoch of a component is a permutation of blocks of its documents with equal costs, about one window's stretch
    each.
    """

    def __init__(
        self,
        lines: Sequence["Line"],
        rates: Sequence[float],
        *,
        rows_per_window: int,
        fill: float,
        seed: int,
        epochs: int | None = None,
    ):
        self._lines = lines
        window = fill * rows_per_window * _UNITS_PER_ROW
        self._budgets = [max(1, round(rate / sum(rates) * window)) for rate in rates]
        self._num_blocks = [
            max(1, round(line.cost / budget)) for line, budget in zip(lines, self._budgets, strict=True)
        ]
        self._rows_per_window = rows_per_window
        self._seed = seed
        self._epochs = epochs

    def rows(self, start: int, stop: int) -> list[list[Piece]]:
        rows = [row for window in self._windows(start, stop) for row in window.rows]
        skip = start % self._rows_per_window
        return rows[skip : skip + stop - start]

    def dropped(self, start: int, stop: int) -> list[Piece]:
        return [piece for window in self._windows(start, stop) for piece in window.dropped]

    def num_rows(self, epochs: int) -> int:
        cost = epochs * self._num_blocks[0] * self._block(0)
        return -(-cost // self._budgets[0]) * self._rows_per_window

    def _windows(self, start: int, stop: int) -> list[Window]:
        return [
            _plan(self, index) for index in range(start // self._rows_per_window, -(-stop // self._rows_per_window))
        ]

    def _block(self, component: int) -> int:
        """Cost of a block: equal for all, so the last one may lack up to a unit per block, 2^-20 of a row."""
        return -(-self._lines[component].cost // self._num_blocks[component])

    def plan(self, window: int) -> Window:
        """Deals the pieces of a window to its rows; a pure function of the seed and the window's index."""
        queue = [
            entry
            for component, line in enumerate(self._lines)
            for epoch, start, stop in self._stretches(component, window)
            for entry in line.pieces(component, epoch, start, stop)
        ]
        queue.sort(key=lambda entry: -entry[0])
        rows = [[] for _ in range(self._rows_per_window)]
        dropped = []
        room = Room(self._rows_per_window, self._lines[0].capacity)
        for _, piece in queue:
            line = self._lines[piece.component]
            while piece.start < piece.stop:
                length = piece.stop - piece.start
                row = room.first_fit(*line.lengths[:, length])
                if row is None:
                    row, length = room.longest_cut(line.lengths)
                    if length < _SHORTEST_CUT:
                        dropped.append(piece)
                        break
                room.take(row, *line.lengths[:, length])
                rows[row].append(piece._replace(stop=piece.start + length))
                piece = piece._replace(start=piece.start + length)
        # First fit leaves the longest documents in the first rows and the padding in the last.
        order = np.random.default_rng(random_bits(self._seed, len(self._lines), window)).permutation(len(rows))
        return Window([rows[row] for row in order], dropped)

    def _stretches(self, component: int, window: int) -> list[tuple[int, int, int]]:
        """(epoch, start token, stop token) of what a window takes from a component, one for each block it touches."""
        line, budget, num_blocks = self._lines[component], self._budgets[component], self._num_blocks[component]
        block = self._block(component)
        start, stop = window * budget, (window + 1) * budget
        if self._epochs is not None:
            stop = min(stop, self._epochs * num_blocks * block)
        result = []
        while start < stop:
            nth, offset = divmod(start, block)
            epoch, index = divmod(nth, num_blocks)
            taken = min(block - offset, stop - start)
            begin = permuted(index, num_blocks, self._seed, component, epoch) * block + offset
            result.append((epoch, line.token_at(begin), line.token_at(begin + taken)))
            start += taken
        return result


@functools.lru_cache(maxsize=64)
def _plan(sampler: FirstFit, window: int) -> Window:
    """Small batches and several threads ask for the same window again. Samplers are told apart by identity."""
    return sampler.plan(window)


class Line:
    """A component's documents as first fit sees them: what they cost, and where a given cost has been reached.

    Args:
      offsets: int64 [documents + 1], tokens before each document.
      lengths: int64 [2, n + 1], room in the (encoder, decoder) sequence that a piece of 0, 1, … n tokens takes; longer
        documents are cut into pieces of n and a rest.
      capacity: length of a row's (encoder, decoder) sequence.
    """

    def __init__(self, offsets: np.ndarray, lengths: np.ndarray, capacity: tuple[int, int]):
        self.lengths = lengths
        self.capacity = capacity
        self._offsets = offsets
        self._longest = lengths.shape[1] - 1
        # A piece costs its share of the sequence that it fills more of. A layout without encoder has capacity 0 there.
        shares = lengths * _UNITS_PER_ROW / np.maximum(capacity, 1)[:, None]
        self._costs = np.ceil(shares.max(axis=0)).astype(np.int64)
        full, rest = np.divmod(np.diff(offsets), self._longest)
        costs = full * self._costs[-1] + np.where(rest > 0, self._costs[rest], 0)
        self._cost_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(costs)])

    @property
    def cost(self) -> int:
        return int(self._cost_before[-1])

    def token_at(self, cost: int) -> int:
        """Start of the first piece that begins at `cost` or later."""
        if cost >= self.cost:
            return int(self._offsets[-1])
        document = int(np.searchsorted(self._cost_before, cost, side="right")) - 1
        pieces = -((int(self._cost_before[document]) - cost) // int(self._costs[-1]))
        return min(int(self._offsets[document]) + pieces * self._longest, int(self._offsets[document + 1]))

    def pieces(self, component: int, epoch: int, start: int, stop: int) -> list[tuple[int, Piece]]:
        """(cost, piece) of the pieces in [start, stop); both are borders of pieces."""
        first = np.searchsorted(self._offsets, start, side="right") - 1
        last = np.searchsorted(self._offsets, stop, side="left")
        begins = np.maximum(self._offsets[first:last], start)
        ends = np.minimum(self._offsets[first + 1 : last + 1], stop)
        counts = -((begins - ends) // self._longest)
        nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(begins, counts) + nth * self._longest
        stops = np.minimum(starts + self._longest, np.repeat(ends, counts))
        same = itertools.repeat
        pieces = map(Piece, same(component), same(epoch), starts.tolist(), stops.tolist())
        return list(zip(self._costs[stops - starts].tolist(), pieces, strict=True))


class Room:
    """What is left of the (encoder, decoder) sequences of some rows."""

    def __init__(self, rows: int, capacity: tuple[int, int]):
        self._free = np.tile(np.array(capacity, np.int64)[:, None], (1, rows))  # [2, rows]

    def first_fit(self, encoder: int, decoder: int) -> int | None:
        """The first row with this much room in both sequences."""
        fits = (self._free[0] >= encoder) & (self._free[1] >= decoder)
        row = int(fits.argmax())
        return row if fits[row] else None

    def longest_cut(self, lengths: np.ndarray) -> tuple[int, int]:
        """The row that can hold the longest piece, and that piece's raw tokens; `lengths` as in `Line`."""
        fits = [
            np.searchsorted(length, free, side="right") - 1 for length, free in zip(lengths, self._free, strict=True)
        ]
        longest = np.minimum(*fits)
        row = int(longest.argmax())
        return row, int(longest[row])

    def take(self, row: int, encoder: int, decoder: int) -> None:
        self._free[:, row] -= encoder, decoder
