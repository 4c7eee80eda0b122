"""Batches by step number: `batches[step]` reads the token cache, applies the objectives and lays out the rows.

The batch at a step is a pure function of (seed, step): not of the steps before it, of threads, processes or hosts. So a
resumed run goes on bit for bit, at any step, and on another number of hosts.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import gin
import numpy as np

from t5x_domain.data.cache import CachedSplit
from t5x_domain.data.examples import ExampleMaker
from t5x_domain.data.first_fit import FirstFit, Window
from t5x_domain.data.packing import Batch, Layout
from t5x_domain.data.sampling import ConcatAndSplit, ExampleRandom, Piece, Sampler
from t5x_domain.data.tasks import Component, Mixture
from t5x_domain.data.token_line import token_line, used_documents
from t5x_domain.data.vocabulary import Vocabulary
from t5x_domain.errors import UserError


class Seen(NamedTuple):
    """Tokens [start_token, stop_token) of a component's corpus, in stored order, that a step saw in the n-th epoch."""

    component: str
    epoch: int
    start_token: int
    stop_token: int


@dataclasses.dataclass(frozen=True)
class PackingStats:
    """How full some steps' rows are: non-padding shares of all positions, and what found no room."""

    encoder: float  # NaN for a layout without encoder.
    decoder: float  # NaN for a layout without decoder.
    both: float
    dropped_examples: int
    dropped_tokens: int
    dropped_share: float  # of raw tokens


@gin.configurable(
    denylist=[
        *("splits", "mixture", "vocabulary", "host", "num_hosts", "epochs", "component_names", "subset", "room_for"),
        "lane",
    ]
)
class Batches:
    """This host's rows of every global batch, by step.

    Args:
      splits: the cached split of every corpus in the mixture.
      mixture: components whose rates are shares of rows ('concat_and_split') or of the text ('first_fit').
      vocabulary: gives EOS, sentinels and mode tokens.
      lengths: {'inputs': …, 'targets': …}, the sequence lengths.
      layout: how examples become features.
      batch_size: rows of a global batch; host h of H has rows [h B/H, (h + 1) B/H) of it.
      seed: non-negative.
      packing: 'concat_and_split' (one full row of running text an example; every component walks through its corpus on
        its own) or 'first_fit' (several documents a row; the components of a corpus share it out among them).
      separator: close every document with EOS; for 'concat_and_split' only, T5 did without.
      rows_per_window, fill: of `FirstFit`; a larger `fill` leaves less padding but drops text when nothing fits.
      epochs: passes over the corpus, for a mixture of one component; None goes on for ever. The last batch is padded
        with zero rows.
      component_names: all components of the run; `component_ids` in a batch are indices into it. By default this
        mixture's.
      subset: {corpus: documents (an integer) or share of them (a fraction)}, the first ones of the stored order, which
        is a random one.
      room_for: rows keep room for the metadata and mode token of this component, whatever stands there, so that the
        same text can be scored under several conditions.
      lane: (number, lanes) of the part of every corpus that is read, see data/lanes.py; None reads all of it.

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
        component_names: Sequence[str] | None = None,
        subset: Mapping[str, float] | None = None,
        room_for: Component | None = None,
        lane: tuple[int, int] | None = None,
    ):
        _check_rows(batch_size, num_hosts, rows_per_window, fill, seed)
        if epochs is not None and len(mixture.components) > 1:
            raise UserError(f"mixture {mixture.name}: epochs={epochs} needs a mixture of one component; set no epochs.")
        if packing not in ("concat_and_split", "first_fit"):
            raise UserError(f"packing={packing!r} is not one of concat_and_split, first_fit.")
        if separator and packing == "first_fit":
            raise UserError("separator=True is for packing='concat_and_split'; first_fit does not join documents.")
        if packing != "first_fit" and any(component.metadata for component in mixture.components):
            raise UserError("metadata belong to whole documents: set Run.packing='first_fit'.")
        self._layout, self._lengths, self._seed = layout, dict(lengths), seed
        self._batch_size = batch_size
        self._host_rows = (host * batch_size // num_hosts, (host + 1) * batch_size // num_hosts)
        for component in mixture.components:
            layout.check_side(component.objective)
        if epochs is None:  # A component that is scored by itself may be causal.
            self._check_inputs(mixture)
        self._used = used_documents(splits, mixture, subset or {})
        eos = vocabulary.eos_id if separator else None
        lines = {split.corpus: token_line(split, documents, eos, lane) for split, documents in self._used}
        names = list(component_names or (component.name for component in mixture.components))
        self._makers = [
            ExampleMaker(
                c, names.index(c.name), lines[c.corpus.name], vocabulary, layout, self._lengths, seed, room_for
            )
            for c in mixture.components
        ]
        rates = [component.rate for component in mixture.components]
        if packing == "first_fit":
            self._sampler: Sampler = FirstFit(
                [(maker.source, maker.shape()) for maker in self._makers],
                rates,
                layout.capacity(self._lengths),
                rows_per_window=rows_per_window,
                fill=fill,
                seed=seed,
                epochs=epochs,
                lane=lane,
            )
        else:
            self._sampler = ConcatAndSplit(
                [maker.line.num_tokens for maker in self._makers],
                [maker.raw_length for maker in self._makers],
                rates,
                seed,
                [(*maker.key, maker.raw_length) for maker in self._makers],
                first_row=lane[0] * batch_size if lane else 0,
            )
        self._num_rows = None if epochs is None else self._sampler.num_rows(epochs, [0])

    def _check_inputs(self, mixture: Mixture) -> None:
        if self._layout.prefix_cost[0] and not any(c.objective.lengths(2)[0] for c in mixture.components):
            raise UserError(
                f"mixture {mixture.name} leaves an encoder without inputs; set MODEL = @DecoderOnly, or add an "
                "objective that has inputs."
            )

    @property
    def num_steps(self) -> int | None:
        """Batches in all epochs; None if they go on for ever."""
        return None if self._num_rows is None else -(-self._num_rows // self._batch_size)

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError("batches without epochs go on for ever")
        return self.num_steps

    def steps_of_epochs(self, epochs: float, corpus: str) -> int:
        """Steps that hold `epochs` passes over a corpus, by all its components together."""
        components = [i for i, maker in enumerate(self._makers) if maker.component.corpus.name == corpus]
        return -(-self._sampler.num_rows(epochs, components) // self._batch_size)

    @property
    def subsets(self) -> list[tuple[str, int, int]]:
        """(corpus, documents, tokens) of the corpora of which only a part is used, over all lanes."""
        return [
            (split.corpus, documents, split.offsets[documents])
            for split, documents in self._used
            if documents < split.num_documents
        ]

    def begin_at(self, starts: Mapping[tuple[int, ...], int]) -> None:
        """Begins where the `consumed` of an earlier phase left; to be called before any batch is made."""
        self._sampler.begin_at(starts)

    def consumed(self, num_steps: int) -> dict[tuple[int, ...], int]:
        """What `num_steps` steps have used up, for `begin_at` of the next phase."""
        return self._sampler.consumed(num_steps * self._batch_size)

    def __getitem__(self, step: int) -> Batch:
        """Features of this host's rows, as `Layout.batch`. Raises IndexError beyond the last step."""
        rows = self._rows(*self._row_range(step))
        tokens = {}
        for number, maker in enumerate(self._makers):
            tokens |= maker.line.read_all({piece for row in rows for piece in row if piece.component == number})
        random = ExampleRandom(self._seed)
        examples = [[self._makers[p.component].example(p, tokens[p], random) for p in row] for row in rows]
        return self._layout.batch(examples, self._lengths)

    def seen(self, step: int) -> list[Seen]:
        """Which tokens this host's rows of a step hold, in the order of the rows."""
        result = []
        for piece in (piece for row in self._rows(*self._row_range(step)) for piece in row):
            maker = self._makers[piece.component]
            for start, stop in maker.line.parts(piece):
                result.append(
                    Seen(maker.component.name, piece.epoch, maker.line.stored(start), maker.line.stored(stop))
                )
        return result

    def raw_tokens(self, step: int) -> dict[str, int]:
        """Raw tokens of each component in this host's rows of a step, by the component's name."""
        result = {maker.component.name: 0 for maker in self._makers}
        for piece in (piece for row in self._rows(*self._row_range(step)) for piece in row):
            result[self._makers[piece.component].component.name] += piece.stop - piece.start
        return result

    def plan_window(self, index: int) -> Window:
        """The rows that are planned together with row `index * rows_per_window`; of 'first_fit' only."""
        return self._sampler.plan(index)

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
            raw_tokens += sum(piece.stop - piece.start for row in self._rows(start, stop) for piece in row)
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

    def _rows(self, start: int, stop: int) -> list[list[Piece]]:
        if self._num_rows is None:
            return self._sampler.rows(start, stop)
        end = min(stop, max(start, self._num_rows))
        return self._sampler.rows(start, end) + [[] for _ in range(stop - end)]


def _check_rows(batch_size: int, num_hosts: int, rows_per_window: int, fill: float, seed: int) -> None:
    if batch_size < 1 or batch_size % num_hosts:
        raise UserError(f"batch_size={batch_size} must be a positive multiple of the {num_hosts} hosts.")
    if rows_per_window < 1:
        raise UserError(f"Batches.rows_per_window={rows_per_window} must be at least 1.")
    if not 0 < fill <= 1:
        raise UserError(f"Batches.fill={fill} must be above 0 and at most 1.")
    if seed < 0:
        raise UserError(f"seed={seed} must not be negative.")
