"""The picture of docs/attention.md that shows who sees whom in local layers with global tokens."""

# ruff: noqa: ANN201, D101, D103 -- a part of make_figures.py

import jax.numpy as jnp
import numpy as np
from drawing import BLUE, EDGE, FAINT, GREEN, MARGIN, ORANGE, PAPER, PURPLE, Drawing

from t5x_domain.kernels.global_blocks import every_nth, transient
from t5x_domain.kernels.mask import Mask, SegmentIds, key_intervals

IDS, SIZE, WINDOW, CELL = np.repeat([1, 2, 0], [14, 7, 3])[None], 4, 2, 10


def inside(start, stop):
    """[S, S] bool of intervals [1, S]."""
    key = np.arange(IDS.shape[1])
    return (np.asarray(start)[0][:, None] <= key) & (key < np.asarray(stop)[0][:, None])


def at_the_side(place):
    """[queries, keys] bool of a `SidePlace` of one row."""
    query, query_segment, key, key_segment, hidden = (np.asarray(a).squeeze() for a in place)
    same = (query_segment[:, None] == key_segment) & (query_segment[:, None] != 0)
    return same & (abs(key - query[:, None]) > hidden)


def panels():
    """(title, note, layers) where a layer is (colour, [queries, keys] bool); keys of blocks follow the tokens."""
    ids, length = jnp.asarray(IDS), IDS.shape[1]
    segments = SegmentIds(ids, ids)
    near = inside(*key_intervals(Mask(window=(WINDOW, WINDOW)), length, length, segment_ids=segments)[:2])
    leading = key_intervals(Mask(window=(WINDOW, WINDOW), global_tokens=2), length, length, segment_ids=segments)
    first = inside(*leading[:2]) | inside(*leading[2:])
    yield "global_tokens = 2", "the first of each example", [(ORANGE, first), (BLUE, near)]

    tokens = every_nth(SIZE, ids, window=WINDOW)
    index = np.asarray(tokens.index)[0]
    nth = np.zeros((length + 1, length + 1), bool)  # the last row and column take what stands nowhere
    nth[:length, index] = at_the_side(tokens.place)
    nth[index, :length] |= at_the_side(tokens.own)
    yield '"every"', "the last of each 4 tokens", [(GREEN, nth[:length, :length]), (BLUE, near)]

    blocks = at_the_side(transient(SIZE, ids).place)
    beside = np.hstack([np.zeros((length, length + 1), bool), blocks])
    yield '"transient"', "a key more for each 4 tokens", [(BLUE, near), (PURPLE, beside)]


def sparse():
    """Tokens that a query sees beyond its window, by option."""
    drawing = Drawing("Which keys a query sees in a local layer with global tokens, for three options")
    note = f"{IDS.shape[1]} queries (down) by keys (across): examples of 14 and 7 tokens, then padding. "
    drawing.text(MARGIN, 32, f"{note}The window is {WINDOW} each side, drawn in blue.", size=12, fill=FAINT)
    top, left, extent = 84, MARGIN, CELL * IDS.shape[1]
    for title, note, layers in panels():
        drawing.bold(left, top - 24, title, size=14)
        drawing.text(left, top - 8, note, size=11.5, fill=FAINT)
        drawing.rect(left - 1, top - 1, extent + 1, extent + 1, PAPER, stroke=EDGE)
        if layers[-1][1].shape[1] > IDS.shape[1]:
            blocks = (layers[-1][1].shape[1] - IDS.shape[1] - 1) * CELL
            drawing.rect(left + extent + CELL - 1, top - 1, blocks + 1, extent + 1, PAPER, stroke=EDGE)
        for colour, visible in layers:
            cells = [(left + j * CELL, top + i * CELL, CELL - 1, CELL - 1) for i, j in np.argwhere(visible).tolist()]
            drawing.rects(cells, colour)
        left += extent + 40
    return drawing.finish(top + extent + 22)
