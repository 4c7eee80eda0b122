"""First-fit packing: rows of several whole documents, planned from lengths alone before a token is read."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_domain.data.sampling import Piece, Sampler, random_bits
from t5x_domain.data.shapes import Shape, Source

# Where a document must be cut to fit into what is left of the rows, fewer tokens are not worth a segment of their own.
_SHORTEST_CUT = 8
# A sequence is scarce if the text fills at least this share of what it fills of the fuller one.
_SCARCE = 0.9


class Window(NamedTuple):
    """The pieces of some consecutive rows, those that found no room in them, and how full (encoder, decoder) are."""

    rows: list[list[Piece]]
    dropped: list[Piece]
    filled: tuple[float, float]


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
        lane: tuple[int, int] | None = None,
    ):
        """`lane` sets the order of a window's rows apart from that of other lanes."""
        self._capacity = capacity
        self._rows_per_window = rows_per_window
        self._seed = seed
        self._epochs = epochs
        self._order_key = (seed, len(components)) if lane is None else (seed, len(components), *lane)
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
        self._planned: dict[int, Window] = {}

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

    def num_rows(self, epochs: float, components: Sequence[int]) -> int:
        source = self._components[components[0]][0]  # Its other components take their part of the same budget.
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
        """Small batches and threads ask for the same windows again, so those of the last rows stay, and one more."""
        indices = range(start // self._rows_per_window, -(-stop // self._rows_per_window))
        known = self._planned
        windows = {index: known.get(index) or self.plan(index) for index in indices}
        others = [index for index in known if index not in windows]
        self._planned = windows | {index: known[index] for index in others[:1]}  # at once: other threads read it
        return list(windows.values())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_planned": {}}

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
        order = np.random.default_rng(random_bits(*self._order_key, window)).permutation(len(rows))
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
