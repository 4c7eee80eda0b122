"""Batches by step number: `batches[step]` reads the token cache, applies the objectives and lays out the rows.

The batch at a step is a pure function of (seed, step): not of the steps before it, of threads, processes or hosts. So a
resumed run goes on bit for bit, at any step, and on another number of hosts.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import gin
import grain
import numpy as np
from absl import flags

from t5x_domain.data.cache import CachedSplit
from t5x_domain.data.first_fit import FirstFit, Line
from t5x_domain.data.packing import Batch, Example, Layout
from t5x_domain.data.sampling import ConcatAndSplit, ExampleRandom, Piece, Sampler
from t5x_domain.data.tasks import Component, Mixture
from t5x_domain.data.vocabulary import Vocabulary
from t5x_domain.errors import UserError


class Seen(NamedTuple):
    """Tokens [start_token, stop_token) of a corpus, in stored order, that a step saw in its n-th epoch (from 0)."""

    corpus: str
    epoch: int
    start_token: int
    stop_token: int


@dataclasses.dataclass(frozen=True)
class PackingStats:
    """How full some steps' rows are: non-padding shares of all positions, and what found no room."""

    encoder: float  # NaN for a layout without encoder.
    decoder: float
    both: float
    dropped_examples: int
    dropped_tokens: int
    dropped_share: float  # of raw tokens


class _TokenLine:
    """The documents of a split as one line of token ids, with an EOS after each if asked."""

    def __init__(self, split: CachedSplit, separator: int | None):
        self._split = split
        self._separator = separator
        self.offsets = split.offsets
        if separator is not None:
            self.offsets = split.offsets + np.arange(len(split.offsets))

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), int32."""
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        documents = self._split.documents(first, int(np.searchsorted(self.offsets, stop, side="left")))
        if self._separator is not None:
            end = np.array([self._separator], np.int32)
            documents = [part for document in documents for part in (document, end)]
        begin = int(self.offsets[first])
        return np.concatenate(documents)[start - begin : stop - begin]

    def stored(self, position: int) -> int:
        """Tokens of the split before a position, separators not counted."""
        if self._separator is None:
            return position
        document = int(np.searchsorted(self.offsets, position, side="right")) - 1
        return min(position - document, int(self._split.offsets[min(document + 1, len(self.offsets) - 1)]))


@gin.configurable(denylist=["splits", "mixture", "vocabulary", "host", "num_hosts", "epochs"])
class Batches:
    """This host's rows of every global batch, by step.

    Args:
      splits: the cached split of every corpus in the mixture; `corpus_ids` in a batch are indices into it.
      mixture: components whose rates are shares of rows.
      vocabulary: gives EOS and sentinels.
      lengths: {'inputs': …, 'targets': …}, the sequence lengths.
      layout: how examples become features.
      batch_size: rows of a global batch; host h of H has rows [h B/H, (h + 1) B/H) of it.
      seed: non-negative.
      packing: 'concat_and_split' (one full row of running text an example) or 'first_fit' (several documents a row).
      separator: close every document with EOS; for 'concat_and_split' only, T5 did without.
      rows_per_window, fill: of `FirstFit`; a larger `fill` leaves less padding but drops text when nothing fits.
      epochs: passes over the corpus, for a mixture of one component; None goes on for ever. The last batch is padded
        with zero rows.

    Raises:
      UserError: settings that do not go together, or an objective that overruns lengths or vocabulary.
    """

    def __init__(
        self,
        splits: Sequence[CachedSplit],
        mixture: Mixture,
        vocabulary: Vocabulary,
        *,
        lengths: Mapping[str, int],
        layout: Layout,
        batch_size: int,
        seed: int,
        packing: str = "concat_and_split",
        separator: bool = False,
        rows_per_window: int = 64,
        fill: float = 0.98,
        host: int = 0,
        num_hosts: int = 1,
        epochs: int | None = None,
    ):
        _check_rows(batch_size, num_hosts, rows_per_window, fill, seed)
        if epochs is not None and len(mixture.components) > 1:
            raise UserError(f"mixture {mixture.name}: epochs={epochs} needs a mixture of one component; set no epochs.")
        if packing not in ("concat_and_split", "first_fit"):
            raise UserError(f"packing={packing!r} is not one of concat_and_split, first_fit.")
        if separator and packing == "first_fit":
            raise UserError("separator=True is for packing='concat_and_split'; first_fit does not join documents.")
        self.corpora = tuple(split.corpus for split in splits)
        self._vocabulary = vocabulary
        self._lengths = dict(lengths)
        self._layout = layout
        self._seed = seed
        self._batch_size = batch_size
        self._host_rows = (host * batch_size // num_hosts, (host + 1) * batch_size // num_hosts)
        self._objectives = [component.objective for component in mixture.components]
        self._corpus_ids = [self._corpus_id(component) for component in mixture.components]
        for objective in self._objectives:
            layout.check(objective, lengths, vocabulary)
        eos = vocabulary.eos_id if separator else None
        self._lines = [_TokenLine(splits[corpus], eos) for corpus in self._corpus_ids]
        rates = [component.rate for component in mixture.components]
        if packing == "first_fit":
            self._sampler: Sampler = self._first_fit(rates, rows_per_window, fill, epochs)
        else:
            raw_lengths = [layout.raw_length(objective, lengths) for objective in self._objectives]
            self._sampler = ConcatAndSplit([line.num_tokens for line in self._lines], raw_lengths, rates, seed)
        self._num_rows = None if epochs is None else self._sampler.num_rows(epochs)

    def _corpus_id(self, component: Component) -> int:
        if component.corpus.name not in self.corpora:
            raise UserError(f"corpus {component.corpus.name} has no cached split here, only {', '.join(self.corpora)}.")
        return self.corpora.index(component.corpus.name)

    def _first_fit(self, rates: Sequence[float], rows_per_window: int, fill: float, epochs: int | None) -> FirstFit:
        lines = []
        for objective, line in zip(self._objectives, self._lines, strict=True):
            longest = self._layout.raw_length(objective, self._lengths)
            costs = [self._layout.cost(objective, num_raw) for num_raw in range(longest + 1)]
            lines.append(Line(line.offsets, np.array(costs, np.int64).T, self._layout.capacity(self._lengths)))
        return FirstFit(lines, rates, rows_per_window=rows_per_window, fill=fill, seed=self._seed, epochs=epochs)

    @property
    def num_steps(self) -> int | None:
        """Batches in all epochs; None if they go on for ever."""
        return None if self._num_rows is None else -(-self._num_rows // self._batch_size)

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError("batches without epochs go on for ever")
        return self.num_steps

    def __getitem__(self, step: int) -> Batch:
        """Features of this host's rows, as `Layout.batch`. Raises IndexError beyond the last step."""
        rows = self._rows(step)
        tokens = self._read({piece for row in rows for piece in row})
        random = ExampleRandom(self._seed)
        examples = [[self._example(piece, tokens[piece], random) for piece in row] for row in rows]
        return self._layout.batch(examples, self._lengths)

    def seen(self, step: int) -> list[Seen]:
        """Which tokens this host's rows of a step hold, in the order of the rows."""
        result = []
        for piece in (piece for row in self._rows(step) for piece in row):
            corpus = self.corpora[self._corpus_ids[piece.component]]
            line = self._lines[piece.component]
            for start, stop in self._parts(piece):
                result.append(Seen(corpus, piece.epoch, line.stored(start), line.stored(stop)))
        return result

    def packing_stats(self, steps: Sequence[int]) -> PackingStats:
        """How full this host's rows are at some steps, and what found no room in the windows that they belong to."""
        filled, size = np.zeros((2, 2))
        dropped, raw_tokens = set(), 0
        for step in steps:
            batch = self[step]
            for i, name in enumerate(("encoder_segment_ids", "decoder_segment_ids")):
                if name in batch:
                    filled[i] += np.count_nonzero(batch[name])
                    size[i] += batch[name].size
            start, stop = self._row_range(step)
            dropped.update(self._sampler.dropped(start, stop))
            raw_tokens += sum(piece.stop - piece.start for row in self._rows(step) for piece in row)
        dropped_tokens = sum(piece.stop - piece.start for piece in dropped)
        return PackingStats(
            *(
                float(a / b) if b else float("nan")
                for a, b in (*zip(filled, size, strict=True), (filled.sum(), size.sum()))
            ),
            dropped_examples=len(dropped),
            dropped_tokens=dropped_tokens,
            dropped_share=dropped_tokens / max(1, dropped_tokens + raw_tokens),
        )

    def _row_range(self, step: int) -> tuple[int, int]:
        if step < 0 or (self.num_steps is not None and step >= self.num_steps):
            raise IndexError(f"step {step} of {self.num_steps}")
        return tuple(step * self._batch_size + row for row in self._host_rows)

    def _rows(self, step: int) -> list[list[Piece]]:
        start, stop = self._row_range(step)
        if self._num_rows is None:
            return self._sampler.rows(start, stop)
        end = min(stop, max(start, self._num_rows))
        return self._sampler.rows(start, end) + [[] for _ in range(stop - end)]

    def _example(self, piece: Piece, tokens: np.ndarray, random: ExampleRandom) -> Example:
        features = self._objectives[piece.component](tokens, random.at(piece), self._vocabulary)
        return Example(features["inputs"], features["targets"], self._corpus_ids[piece.component])

    def _parts(self, piece: Piece) -> list[tuple[int, int]]:
        """(start, stop) within the line: two if the piece wraps."""
        end = self._lines[piece.component].num_tokens
        return [(piece.start, piece.stop)] if piece.stop <= end else [(piece.start, end), (0, piece.stop - end)]

    def _read(self, pieces: set[Piece]) -> dict[Piece, np.ndarray]:
        """Tokens of all pieces, int32; neighbours in the cache are read together, which costs less than one by one."""
        result = {}
        run: list[Piece] = []
        for piece in sorted(pieces, key=lambda piece: (piece.component, piece.start)):
            if run and (piece.component, piece.start) != (run[-1].component, run[-1].stop):
                result.update(self._read_run(run))
                run = []
            run.append(piece)
        return result | (self._read_run(run) if run else {})

    def _read_run(self, run: list[Piece]) -> dict[Piece, np.ndarray]:
        line = self._lines[run[0].component]
        whole = Piece(run[0].component, run[0].epoch, run[0].start, run[-1].stop)
        parts = [line.read(start, stop) for start, stop in self._parts(whole)]
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return {piece: tokens[piece.start - whole.start : piece.stop - whole.start] for piece in run}


def _check_rows(batch_size: int, num_hosts: int, rows_per_window: int, fill: float, seed: int) -> None:
    if batch_size < 1 or batch_size % num_hosts:
        raise UserError(f"batch_size={batch_size} must be a positive multiple of the {num_hosts} hosts.")
    if rows_per_window < 1:
        raise UserError(f"Batches.rows_per_window={rows_per_window} must be at least 1.")
    if not 0 < fill <= 1:
        raise UserError(f"Batches.fill={fill} must be above 0 and at most 1.")
    if seed < 0:
        raise UserError(f"seed={seed} must not be negative.")


def _numbered(batches: Batches, step: int) -> tuple[int, Batch]:
    return step, batches[step]


def iterate(
    batches: Batches,
    start_step: int = 0,
    *,
    stop_step: int | None = None,
    num_workers: int = 0,
    num_threads: int = 1,
    prefetch: int = 4,
) -> Iterator[tuple[int, Batch]]:
    """(step, batch) from `start_step` on, made ahead of time in the background, always in order.

    Args:
      batches: what to iterate over.
      start_step: first step; starting late costs nothing.
      stop_step: step to stop before; by default the last one of `batches`.
      num_workers: processes; 0 makes the batches in threads of this process.
      num_threads: threads in each process.
      prefetch: batches that each process holds ready.
    """
    end = batches.num_steps if stop_step is None else stop_step
    steps = grain.MapDataset.range(start_step, sys.maxsize if end is None else end)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    dataset = steps.map(functools.partial(_numbered, batches)).to_iter_dataset(options)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags, which our command lines do not use.
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return iter(dataset)
