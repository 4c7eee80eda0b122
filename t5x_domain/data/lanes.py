"""Batches of which every host reads its own shards only.

The rows of a global batch are divided into lanes, and every corpus into as many parts of equal size, which follow one
another in the cache. Lane n walks through part n in a random order, epoch after epoch. A host has some whole lanes, so
on H hosts each reads its 1/H of the corpus and of its index through the whole run. As documents lie in the cache in a
random order, every part is a random sample of the corpus.

The batch at a step is a pure function of (seed, number of lanes, step), on any number of hosts that divides the lanes.
"""

import functools
from collections.abc import Callable, Mapping

import numpy as np

from t5x_domain.data.loader import Batches, Seen
from t5x_domain.data.packing import Batch
from t5x_domain.errors import UserError


class Lanes:
    """This host's rows of every global batch, by step, with what a `Curriculum` asks of `Batches`."""

    def __init__(
        self,
        open_lane: Callable[..., Batches],
        num_lanes: int,
        *,
        batch_size: int,
        host: int = 0,
        num_hosts: int = 1,
    ):
        """`open_lane` makes the endless `Batches` of a `lane`, which has `batch_size` rows of a batch.

        Raises:
          UserError: the lanes do not divide the batch, or the hosts not the lanes; and what `Batches` raises.
        """
        if num_lanes < 1 or batch_size % num_lanes or num_lanes % num_hosts:
            raise UserError(
                f"Run.lanes = {num_lanes} must divide the batch of {batch_size} rows (Run.batch_size) and be a "
                f"multiple of the {num_hosts} hosts."
            )
        self._open = functools.partial(open_lane, batch_size=batch_size // num_lanes)
        self._num_lanes = num_lanes
        mine = range(host * num_lanes // num_hosts, (host + 1) * num_lanes // num_hosts)
        self._lanes = [self._open(lane=(number, num_lanes)) for number in mine]

    @property
    def num_steps(self) -> None:
        """They go on for ever."""
        return None

    @functools.cached_property
    def _first(self) -> Batches:
        """What every host can count epochs in and come to the same: lane 0, as large as every other."""
        return self._open(lane=(0, self._num_lanes))

    def steps_of_epochs(self, epochs: float, corpus: str) -> int:
        """See `Batches`; counted in the first lane, from which others differ by a document or by chance."""
        return self._first.steps_of_epochs(epochs, corpus)

    @property
    def subsets(self) -> list[tuple[str, int, int]]:
        """See `Batches`."""
        return self._lanes[0].subsets

    def begin_at(self, starts: Mapping[tuple[int, ...], int]) -> None:
        """See `Batches`."""
        for lane in self._lanes:
            lane.begin_at(starts)

    def consumed(self, num_steps: int) -> dict[tuple[int, ...], int]:
        """See `Batches`; of this host's lanes."""
        return {source: position for lane in self._lanes for source, position in lane.consumed(num_steps).items()}

    def __getitem__(self, step: int) -> Batch:
        """Features of this host's rows, as `Layout.batch`."""
        parts = [lane[step] for lane in self._lanes]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def seen(self, step: int) -> list[Seen]:
        """See `Batches`."""
        return [seen for lane in self._lanes for seen in lane.seen(step)]

    def raw_tokens(self, step: int) -> dict[str, int]:
        """See `Batches`."""
        counts = [lane.raw_tokens(step) for lane in self._lanes]
        return {name: sum(count[name] for count in counts) for name in counts[0]}
