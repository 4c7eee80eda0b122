"""Batches made ahead of time, by Grain: in threads of this process, or in processes of their own."""

import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator

import grain
from absl import flags

from t5x_domain.data.loader import Batches
from t5x_domain.data.packing import Batch


def iterate(
    batches: Batches,
    start_step: int = 0,
    *,
    stop_step: int | None = None,
    num_workers: int = 0,
    num_threads: int = 1,
    prefetch: int = 4,
) -> Iterator[tuple[int, Batch, dict[str, int]]]:
    """(step, batch, `Batches.raw_tokens`) from `start_step` on, made ahead of time in the background, always in order.

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
        options = grain.MultiprocessingOptions(num_workers=num_workers)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_live_as_long_as_parent)
    return iter(dataset)


def _numbered(batches: Batches, step: int) -> tuple[int, Batch, dict[str, int]]:
    return step, batches[step], batches.raw_tokens(step)


def _live_as_long_as_parent(*_: int) -> None:
    """In a worker: what tells a whole group to stop must leave it to the trainer, which saves first and needs batches
    until then; and a trainer that is killed cannot stop its workers."""
    for told in (signal.SIGTERM, signal.SIGINT):
        signal.signal(told, signal.SIG_IGN)  # Grain itself sets an event, or kills

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
