"""Attention masks as intervals of keys for each query, never a (query, key) array.

Bidirectional, causal, prefix and sliding-window attention over packed segments, and their conjunctions, all admit a
contiguous run of keys for each query, because the tokens of a packed segment are contiguous. Global tokens beside a
window admit a second run.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query may see, by position.

    Attributes:
      causal: only keys up to the query, and the prefix of its segment where one is given.
      window: keys at most `window[0]` before and `window[1]` after the query; None for no limit.
      global_tokens: the first tokens of each segment, so many, that the window does not concern: all queries of the
        segment see them and they see all its keys, as far as `causal` allows (Beltagy et al. 2020, "Longformer",
        section 3.1).
    """

    causal: bool = False
    window: tuple[int, int] | None = None
    global_tokens: int = 0


BIDIRECTIONAL = Mask()
CAUSAL = Mask(causal=True)


class SegmentIds(NamedTuple):
    """Packed examples of a row: [B, Sq] and [B, Sk] int32, non-decreasing from 1, then 0 for padding at the end."""

    query: jax.Array
    key: jax.Array


class KeyIntervals(NamedTuple):
    """Query i of a row sees the keys `start[i] <= j < stop[i]`; [B or 1, Sq] int32. Empty for padding.

    With global tokens also those of a second interval, which never overlaps the first; None without.
    """

    start: jax.Array
    stop: jax.Array
    global_start: jax.Array | None = None
    global_stop: jax.Array | None = None

    def nonempty(self) -> jax.Array:
        """[B or 1, Sq] bool, queries that see a key."""
        result = self.stop > self.start
        return result if self.global_start is None else result | (self.global_stop > self.global_start)


def key_intervals(
    mask: Mask,
    query_length: int,
    key_length: int,
    *,
    segment_ids: SegmentIds | None = None,
    prefix: jax.Array | None = None,
) -> KeyIntervals:
    """The keys that each query sees.

    Args:
      mask: the rule by position. Causal masks and windows relate positions of one sequence to itself.
      segment_ids: queries see keys of their own segment only; queries with id 0 see none.
      prefix: [B, Sk] int or bool, 1 on the leading tokens of a segment that all its queries see (prefix LM). Only
        meaningful with `mask.causal`.

    Returns:
      Intervals of keys, [B, Sq], or [1, Sq] if neither segment_ids nor prefix is given.
    """
    position = jnp.arange(query_length, dtype=jnp.int32)[None]
    start, stop = jnp.zeros_like(position), jnp.full_like(position, key_length)
    if segment_ids is not None:
        start, stop = _segment_interval(segment_ids)
    first = start
    if mask.causal:
        visible = position + 1
        if prefix is not None:
            count = jnp.pad(jnp.cumsum(prefix.astype(jnp.int32), axis=1), ((0, 0), (1, 0)))
            start, stop = jnp.broadcast_arrays(start, stop)
            start, stop = (jnp.broadcast_to(a, (prefix.shape[0], query_length)) for a in (start, stop))
            in_segment = jnp.take_along_axis(count, stop, axis=1) - jnp.take_along_axis(count, start, axis=1)
            visible = jnp.maximum(visible, start + in_segment)
        stop = jnp.minimum(stop, visible)
    if mask.window is None:
        return KeyIntervals(start, stop)
    before, after = mask.window
    near = jnp.maximum(start, position - before), jnp.minimum(stop, position + after + 1)
    if not mask.global_tokens:
        return KeyIntervals(*near)
    # A global query keeps its whole interval; any other stands behind the global keys.
    border = first + mask.global_tokens
    local = position >= border
    global_stop = jnp.where(local, jnp.minimum(jnp.minimum(border, near[0]), stop), first)
    return KeyIntervals(
        jnp.where(local, near[0], start),
        jnp.where(local, near[1], stop),
        jnp.broadcast_to(first, global_stop.shape),
        global_stop,
    )


def _segment_interval(segment_ids: SegmentIds) -> tuple[jax.Array, jax.Array]:
    """First and one-past-last key of each query's segment, [B, Sq] int32; (0, 0) for padding queries."""
    last = jnp.iinfo(jnp.int32).max
    keys = jnp.where(segment_ids.key == 0, last, segment_ids.key)  # padding is at the end, so the row stays sorted

    def find(side: str) -> jax.Array:
        search = lambda row, values: jnp.searchsorted(row, values, side=side)  # noqa: E731
        return jax.vmap(search)(keys, segment_ids.query).astype(jnp.int32)

    start, stop = find("left"), find("right")
    return jnp.where(segment_ids.query == 0, 0, start), jnp.where(segment_ids.query == 0, 0, stop)
