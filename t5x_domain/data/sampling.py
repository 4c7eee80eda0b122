"""Which tokens go into which row: a pure function of (seed, row), so that nothing has to be replayed to resume.

A component's corpus is a line of tokens: its documents joined in stored order. A row is a list of pieces of such lines.
`ConcatAndSplit` fills a row with one piece that pays no heed to documents, as T5 did; `first_fit.FirstFit` fills it
with whole documents. Both walk through epochs whose order is a keyed permutation, evaluated only where it is needed.
"""

import abc
import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from grain.experimental import index_shuffle


class Piece(NamedTuple):
    """Tokens [start, stop) of a component's line in one epoch; a `stop` beyond the line's end wraps to its start."""

    component: int
    epoch: int
    start: int
    stop: int


class Sampler(abc.ABC):
    """Deals the tokens of a mixture's components to rows 0, 1, 2, …

    Where a sampler begins in each of its sources is a number per source; `consumed` says where the next sampler over
    the same sources goes on, so that what one phase of a run has seen does not come again in the next.
    """

    @abc.abstractmethod
    def rows(self, start: int, stop: int) -> list[list[Piece]]:
        """Pieces of rows [start, stop), one list a row."""

    @abc.abstractmethod
    def num_rows(self, epochs: float, components: Sequence[int]) -> int:
        """Rows in which components of one source pass over it `epochs` times; the last ones may be short or empty."""

    @abc.abstractmethod
    def begin_at(self, starts: Mapping[tuple[int, ...], int]) -> None:
        """Begins where an earlier sampler's `consumed` left; sources that are not named begin at their start."""

    @abc.abstractmethod
    def consumed(self, num_rows: int) -> dict[tuple[int, ...], int]:
        """{source: position} after `num_rows` rows."""

    def dropped(self, start: int, stop: int) -> list[Piece]:
        """Pieces that found no room in rows [start, stop) and the other rows of their windows."""
        return []


class ConcatAndSplit(Sampler):
    """One piece of exactly `raw_length` tokens a row, cut without regard to documents (Raffel et al. 2020, 3.1.1).

    In every epoch the line is a ring that is turned at random and then cut into chunks, so chunk borders differ between
    epochs, and every token comes once: all chunks are full but one, which holds the remainder.
    """

    def __init__(
        self,
        num_tokens: Sequence[int],
        raw_lengths: Sequence[int],
        rates: Sequence[float],
        seed: int,
        keys: Sequence[tuple[int, ...]] | None = None,
        first_row: int = 0,
    ):
        """`keys` name the components among those of all phases; by default they are numbered. The components take turns
        as they would from row `first_row` on, so that lanes that begin apart are not all at the same component."""
        self._lines = list(zip(num_tokens, raw_lengths, strict=True))
        self._shares = [rate / sum(rates[component:]) for component, rate in enumerate(rates)]
        self._seed = seed
        self._keys = keys or [(component,) for component in range(len(rates))]
        self._starts = [0] * len(rates)
        self._first_row = first_row
        self._before = self._counts(first_row)

    def rows(self, start: int, stop: int) -> list[list[Piece]]:
        turns = map(self._component, range(self._first_row + start, self._first_row + stop))
        return [[self._piece(component, nth - self._before[component])] for component, nth in turns]

    def num_rows(self, epochs: float, components: Sequence[int]) -> int:
        if len(self._lines) == 1:  # Chunks of an epoch are full but one.
            return math.ceil(epochs * _num_chunks(*self._lines[0]))
        tokens_per_row = sum(self._share(component) * self._lines[component][1] for component in components)
        return math.ceil(epochs * self._lines[components[0]][0] / tokens_per_row)

    def begin_at(self, starts: Mapping[tuple[int, ...], int]) -> None:
        self._starts = [starts.get(key, 0) for key in self._keys]

    def consumed(self, num_rows: int) -> dict[tuple[int, ...], int]:
        positions = zip(self._keys, self._starts, self._counts(self._first_row + num_rows), self._before, strict=True)
        return {key: start + count - before for key, start, count, before in positions}

    def _share(self, component: int) -> float:
        return self._shares[component] * math.prod(1 - share for share in self._shares[:component])

    def _component(self, row: int) -> tuple[int, int]:
        """The component that feeds a row, and how many earlier rows it fed.

        The first component takes row i whenever floor((i + 1) share) > floor(i share), and the others share the rest in
        the same way: after any number of rows, every component is within one row per component of its exact share.
        """
        index = row
        for component, share in enumerate(self._shares[:-1]):
            taken = math.floor(index * share)
            if math.floor((index + 1) * share) > taken:
                return component, taken
            index -= taken
        return len(self._shares) - 1, index

    def _counts(self, num_rows: int) -> list[int]:
        """How many of the first rows each component feeds."""
        counts, rest = [], num_rows
        for share in self._shares[:-1]:
            counts.append(math.floor(rest * share))
            rest -= counts[-1]
        return [*counts, rest]

    def _piece(self, component: int, index: int) -> Piece:
        num_tokens, raw_length = self._lines[component]
        num_chunks = _num_chunks(num_tokens, raw_length)
        epoch, nth = divmod(self._starts[component] + index, num_chunks)
        key = self._keys[component]
        chunk = permuted(nth, num_chunks, self._seed, *key, epoch)
        length = min(raw_length, num_tokens - chunk * raw_length)
        turn = random_bits(self._seed, *key, epoch, 1)
        start = (chunk * raw_length + turn) % num_tokens
        return Piece(component, epoch, start, start + length)


def _num_chunks(num_tokens: int, raw_length: int) -> int:
    return -(-num_tokens // raw_length)


@functools.lru_cache(maxsize=1024)
def random_bits(*key: int) -> int:
    """64 random bits for a key of non-negative integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def permuted(index: int, size: int, *key: int) -> int:
    """Where a keyed pseudo-random permutation of range(size) takes `index`, in constant time (a Feistel cipher)."""
    return index_shuffle(index, max_index=size - 1, seed=random_bits(*key) >> 32, rounds=4)


class ExampleRandom:
    """Random numbers that depend on (seed, key, epoch, position in the line) only: Philox, a counter-based generator
    (Salmon et al. 2011), set to a counter. Not to be shared between threads."""

    def __init__(self, seed: int):
        self._bits = np.random.Philox(key=seed)
        self._generator = np.random.Generator(self._bits)
        self._state = self._bits.state

    def at(self, piece: Piece, key: int) -> np.random.Generator:
        """The generator for a piece's example; valid until the next call. `key` names the component and its line."""
        # The lowest word of the counter counts the numbers that are drawn.
        self._state["state"]["counter"][:] = 0, key, piece.start, piece.epoch
        self._bits.state = self._state
        return self._generator
