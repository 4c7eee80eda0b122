"""The pictures and tables of docs/attention.md: block maps, skewed tables and block sizes as the kernels have them."""

# ruff: noqa: ANN201, D101, D103 -- a part of make_figures.py

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from drawing import (
    BLUE,
    CARD,
    EDGE,
    FAINT,
    GREEN,
    MARGIN,
    ORANGE,
    PAPER,
    PURPLE,
    SLATE,
    TINTS,
    Drawing,
    pill_width,
    text_width,
)
from results import result, source

from t5x_domain.kernels.attention import visible_keys
from t5x_domain.kernels.mask import Mask, SegmentIds
from t5x_domain.kernels.relative_bias import RelativeBias, diagonals, saturation
from t5x_domain.kernels.tpu.block_map import ACTIVE, NEAR, PARTIAL, Far, block_map, read
from t5x_domain.kernels.tpu.blocks import LANES, Blocks, chip
from t5x_domain.kernels.tpu.skewed_bias import SkewedLayout, skew

TOKENS, BLOCK, PAIR = 4096, Blocks(256, 256, 256), 12
T5_BIAS = {True: RelativeBias(jnp.arange(32.0)[:, None], True), False: RelativeBias(jnp.arange(32.0)[:, None], False)}


def masks():
    """(title, what it is, flags [query blocks, key blocks] of the kernels' block map) of some masks with T5's bias."""
    ids = np.repeat([1, 2, 3, 0], [1500, 900, 1450, 246])[None]
    prefix = np.concatenate([np.arange(n) < m for n, m in ((1500, 620), (900, 300), (1450, 700), (246, 0))])[None]
    kinds = [
        ("Causal", "keys up to the query", Mask(causal=True), None, None),
        ("Window", "512 each side, 32 global tokens", Mask(window=(512, 512), global_tokens=32), None, None),
        ("Packed, prefix LM", "3 segments, then padding", Mask(causal=True), ids, prefix),
        ("Bidirectional", "every query sees every key", Mask(), None, None),
    ]
    side = TOKENS // BLOCK.queries
    like = jax.ShapeDtypeStruct((1, TOKENS, 1, 64), jnp.float32)
    for title, note, mask, ids, prefix in kinds:
        pairs = None if ids is None else SegmentIds(jnp.asarray(ids), jnp.asarray(ids))
        prefix = None if prefix is None else jnp.asarray(prefix)
        intervals = visible_keys(mask, like, like, segment_ids=pairs, prefix=prefix)
        built = block_map(intervals, side, side, BLOCK, far=Far(*saturation(T5_BIAS[not mask.causal])))
        row, column, flags = read(np.asarray(built.entries), slice(int(built.steps)))
        found = np.zeros((side, side), np.int32)
        found[row, column] = flags
        yield title, note, found


def pair_fill(flags):
    colour = ORANGE if flags & PARTIAL else BLUE
    return colour if flags & NEAR else TINTS[colour]


def blocks():
    """Block maps as the kernels of attention visit them."""
    drawing = Drawing("Pairs of blocks that attention visits, for four masks")
    drawing.text(MARGIN, 32, f"{TOKENS:,} queries (down) by {TOKENS:,} keys (across), in blocks of 256.", size=12)
    swatches = [("skipped", PAPER)]
    swatches += [
        (f"{mask}, {place}", pair_fill(kind | flag))
        for kind, mask in ((0, "open"), (PARTIAL, "partial"))
        for flag, place in ((0, "far bias"), (NEAR, "near bias"))
    ]
    x = MARGIN
    for label, fill in swatches:
        drawing.rect(x, 45, 13, 13, fill, stroke=EDGE)
        drawing.text(x + 19, 55.5, label, size=12, fill=FAINT)
        x += 19 + text_width(label, 12) + 22
    top, extent = 110, PAIR * (TOKENS // BLOCK.queries)
    for i, (title, note, flags) in enumerate(masks()):
        left = MARGIN + i * (extent + 29)
        drawing.bold(left, top - 24, title, size=14)
        drawing.text(left, top - 8, note, size=11.5, fill=FAINT)
        drawing.rect(left - 1, top - 1, extent + 1, extent + 1, PAPER, stroke=EDGE)
        active = flags & ACTIVE != 0
        fills = {}
        for row, column in np.argwhere(active).tolist():
            place = (left + column * PAIR, top + row * PAIR, PAIR - 1, PAIR - 1)
            fills.setdefault(pair_fill(flags[row, column]), []).append(place)
        for fill, places in fills.items():
            drawing.rects(places, fill)
        far = active & (flags & (PARTIAL | NEAR) == 0)
        if far[0, -1]:  # on both sides of the diagonal
            drawing.text(left + 0.24 * extent, top + 0.8 * extent, "before", size=11.5, fill=BLUE, anchor="middle")
            drawing.text(left + 0.76 * extent, top + 0.24 * extent, "after", size=11.5, fill=BLUE, anchor="middle")
        notes = [
            f"{active.sum()} of {active.size} pairs visited",
            f"{(active & (flags & PARTIAL != 0)).sum()} with mask arithmetic",
            f"{(active & (flags & NEAR != 0)).sum()} read bias from the table",
        ]
        for line, text in enumerate(notes):
            drawing.text(left, top + extent + 20 + 17 * line, text, size=12)
    return drawing.finish(top + extent + 70)


def bucket_colour(bucket):
    """Blue for keys before the query, orange after; the paler the farther."""
    colour, far = (BLUE, bucket / 15) if bucket < 16 else (ORANGE, (bucket - 16) / 15)
    parts = [(int(colour[i : i + 2], 16), int(PAPER[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * 0.88 * far):02x}" for a, b in parts)


def mosaic(drawing, x, y, buckets, scale, step=4):
    """Every `step`-th row of buckets [rows, lanes], in runs of one colour."""
    runs = {}
    for row in range(0, len(buckets), step):
        edges = [0, *(np.flatnonzero(np.diff(buckets[row])) + 1).tolist(), buckets.shape[1]]
        for left, right in itertools.pairwise(edges):
            place = (x + left * scale, y + row * scale, (right - left) * scale, step * scale)
            runs.setdefault(int(buckets[row, left]), []).append(place)
    for bucket, places in sorted(runs.items()):
        drawing.rects(places, bucket_colour(bucket))


BLOCKS_READ = {"B": (PURPLE, -256), "A": (GREEN, 0)}  # colour, first key; of 256 queries by 256 keys


def skewed_table():
    """(layout, buckets [128, width]) of a small skewed table."""
    layout = SkewedLayout(BLOCK.chunk, Far(*saturation(T5_BIAS[True])))
    vector = diagonals(T5_BIAS[True], layout.far.before + 1, layout.far.after + 1)
    return layout, np.asarray(skew(vector, layout))[0].astype(np.int32)


def strips_read():
    """(name, colour, number, first key, lane, buckets) of the strips of 128 queries that two blocks read."""
    layout, table = skewed_table()
    result = []
    for block, (colour, key) in BLOCKS_READ.items():
        for i in range(2):
            lane = int(layout.offset(key - i * LANES))
            result.append((f"{block}{i + 1}", colour, i, key, lane, table[:, lane : lane + layout.lanes]))
    return result


def skewed():
    """The skewed table of a small layout, and the strips that two blocks read from it."""
    (layout, table), scale, strips = skewed_table(), 0.9375, strips_read()
    drawing = Drawing("The skewed table of biases and the slices that two blocks of logits read")
    shades = "Shades are T5's 32 buckets: blue for keys up to the query, orange for later ones, paler farther away."
    drawing.text(MARGIN, 32, shades, size=12, fill=FAINT)
    left, top, height = 118, 84, LANES * scale
    place = {key: left + i * layout.lanes * scale for i, (_, key) in enumerate(BLOCKS_READ.values())}
    for name, colour, i, key, _, buckets in strips:
        mosaic(drawing, place[key], top + i * height, buckets, scale)
        frame = (place[key] + 1, top + i * height + 1, layout.lanes * scale - 2, height - 2)
        drawing.rect(*frame, "none", stroke=colour, stroke_width=2)
        drawing.pill(place[key] + 8, top + i * height + 22, name, colour)
    for block, (colour, key) in BLOCKS_READ.items():
        title = f"block {block}: keys {key} to {key + layout.lanes - 1}".replace("-", "−")
        drawing.bold(place[key], top - 10, title, size=12, fill=colour)
    drawing.text(left - 10, top - 10, "queries", size=11.5, fill=FAINT, anchor="end")
    for i in range(2):
        queries = f"{i * LANES} to {(i + 1) * LANES - 1}"
        drawing.text(left - 10, top + (i + 0.5) * height + 4, queries, size=11.5, fill=FAINT, anchor="end")
    notes = ["Each strip of 128 queries is one", "slice of the table below, whose", "first lane is a multiple of 128:"]
    notes += ["no lane has to be moved.", "", "Strips at one distance are the", "same slice, in whatever block."]
    for i, note in enumerate(notes):
        drawing.text(left + 2 * layout.lanes * scale + 20, top + 22 + 19 * i, note, size=13)

    top += 2 * height + 92
    drawing.bold(MARGIN, top - 62, f"table[r, x] = bias(x − {layout.origin} − r)", size=13)
    mosaic(drawing, MARGIN, top, table, scale)
    for lane in range(0, layout.width + 1, LANES):
        x = MARGIN + lane * scale
        drawing.line((x, top), (x, top + height), stroke=SLATE, stroke_width=0.5)
        drawing.text(x, top + height + 16, str(lane), size=11, fill=FAINT, anchor="middle")
    for name, colour, i, key, lane, _ in strips:  # those of block A above the table
        y, tick = (top - 12 - 20 * i, 5) if key == 0 else (top + height + 36 + 20 * i, -5)
        x, right = MARGIN + lane * scale, MARGIN + (lane + layout.lanes) * scale
        drawing.line((x + 1, y + tick), (x + 1, y), (right - 1, y), (right - 1, y + tick), stroke=colour)
        drawing.pill((x + right - pill_width(name)) / 2, y + 4, name, colour)
    return drawing.finish(top + height + 76)


def gradient():
    """How the gradient of a block of logits comes to the table of biases."""
    bias, size, cell = T5_BIAS[True], 4, 46
    before, after = saturation(bias)
    layout = SkewedLayout(size * LANES, Far(after, before))
    drawing = Drawing("From the gradient of a block of logits to the gradient of the table of biases")
    legend = "A number is the lane of the skewed sum at which a tile is added. The block lies on the diagonal, others "
    drawing.text(MARGIN, 32, legend + "add farther to a side.", size=12, fill=FAINT)
    left, top = MARGIN, 84
    drawing.bold(left, top - 24, "gradient of a block", size=13)
    drawing.text(left, top - 8, "512 keys (down) by 512 queries", size=11.5, fill=FAINT)
    colours = {}
    for i in range(size):
        for j in range(size):
            lane = int(layout.window((j - i) * LANES))
            colours[lane] = DIAGONALS[j - i]
            drawing.rect(left + j * cell, top + i * cell, cell, cell, colours[lane], stroke=CARD, stroke_width=1.5)
            drawing.text(left + (j + 0.5) * cell, top + (i + 0.5) * cell + 4, str(lane), size=11.5, anchor="middle")
    notes = ["Tiles are 128 by 128. Those of one", "diagonal are added up, and the", "result once to the sum."]
    for line, note in enumerate(notes):
        drawing.text(left, top + size * cell + 20 + 16 * line, note, size=12)

    left, places = left + size * cell + 70, layout.width // LANES
    drawing.bold(left, top - 24, "skewed sum of a head", size=13)
    note = f"128 by {layout.width:,} float32, in vector memory through all blocks and rows of the batch"
    drawing.text(left, top - 8, note, size=11.5, fill=FAINT)
    for i in range(places):
        fill = colours.get(i * LANES, TINTS[FAINT])
        drawing.rect(left + i * cell, top, cell, cell, fill, stroke=CARD, stroke_width=1.5)
        drawing.text(left + (i + 0.5) * cell, top + cell / 2 + 4, str(i * LANES), size=11.5, anchor="middle")
    arrow(drawing, (left - 62, top + cell / 2), (left - 8, top + cell / 2))
    ends = [(0.5, "start", "all tiles of far pairs, keys after"), (places - 0.5, "end", "of far pairs, keys before")]
    for place, anchor, text in ends:
        x = left if anchor == "start" else left + places * cell
        drawing.line((left + place * cell, top + cell + 4), (left + place * cell, top + cell + 12), stroke=FAINT)
        drawing.text(x, top + cell + 25, text, size=11.5, fill=FAINT, anchor=anchor)

    middle, width = left + places * cell / 2, 2 * (before + after + 1)
    vector = np.asarray(diagonals(bias, before + 1, after + 1)).astype(np.int32)
    y = top + cell + 68
    arrow(drawing, (middle, top + cell + 6), (middle, y - 4))
    drawing.text(middle + 12, y - 14, "summed along diagonals", size=12)
    mosaic(drawing, middle - width / 2, y, np.repeat(vector[:, ::-1], 5, axis=0), 2, 5)
    drawing.text(middle + width / 2 + 10, y + 9, f"{before + after + 1} diagonals", size=12, fill=FAINT)
    arrow(drawing, (middle, y + 15), (middle, y + 52))
    drawing.text(middle + 12, y + 38, "times their one-hot buckets", size=12)
    for bucket in range(32):
        drawing.rect(middle - 176 + 11 * bucket, y + 57, 11, 16, bucket_colour(bucket), stroke=CARD, stroke_width=1)
    drawing.text(middle + 186, y + 69, "32 buckets", size=12, fill=FAINT)
    return drawing.finish(top + size * cell + 74)


# Of 128 x 128 tiles, by how many tiles their queries are ahead of their keys.
DIAGONALS = dict(
    zip(range(-3, 4), ("#f3c9a8", "#f6d7bf", "#fae3d3", "#d9eee2", "#dbe8f5", "#c3d9ee", "#a9c8e6"), strict=True)
)


def arrow(drawing, start, end):
    """A line to the right or downwards with a head."""
    drawing.line(start, end, stroke=FAINT, stroke_width=1.4)
    (x, y), down = end, start[0] == end[0]
    wings = [(x - 4, y - 6), (x + 4, y - 6)] if down else [(x - 6, y - 4), (x - 6, y + 4)]
    drawing.line(wings[0], end, wings[1], stroke=FAINT, stroke_width=1.4)


# Tables

CHIPS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
DIRECTIONS = ("forward", "backward")


def bundle_table():
    """Static cost of a pair of blocks, and how many of them some masks take."""
    found = result("tpu_static_cost")
    peer = found["peer"]["tile"]
    lines = [source("tpu_static_cost", found["environment"] | found["peer"]["environment"]), ""]
    lines += ["| chip, head size | pass | bundles | of tokamax's | far bias | near bias | near bias and mask |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    for where, dim in ((chip_, dim) for chip_, dims in found["tile"].items() for dim in dims):
        for direction in DIRECTIONS:
            kinds = found["tile"][where][dim][direction]
            plain = kinds["plain"]["bundles"]
            share = plain / peer[where][dim][direction]["bundles"]
            more = [f"{100 * kinds[kind]['bundles'] / plain - 100:+.0f} %" for kind in ("far", "near", "masked near")]
            lines.append(f"| {where}, {dim} | {direction} | {plain:,} | {100 * share:.0f} % | {' | '.join(more)} |")
    lines += ["", "| mask | pairs visited, of 64 | with mask arithmetic |", "|---|---:|---:|"]
    return lines + [f"| {mask} | {visited} | {masked} |" for mask, (visited, _, masked) in found["steps"].items()]


def compiled_table():
    """Memory of compiled gradients by chip and length."""
    found = result("tpu_aot")
    programs = {(p["chip"], p["length"], p["head_dim"]): p for p in found["attention"].values() if "error" not in p}
    lengths, dims = (sorted({key[i] for key in programs}) for i in (1, 2))
    lines = [source("tpu_aot", found["environment"]), ""]
    lines += [f"| chip | {' | '.join(f'{length:,}' for length in lengths)} |", "|---|" + "---:|" * len(lengths)]
    for name in CHIPS:
        cells_ = []
        for length in lengths:
            sizes = [programs.get((name, length, dim)) for dim in dims]
            cells_.append(" / ".join(f"{p['temporary_bytes'] / 1e6:.1f}" if p else "–" for p in sizes))
        lines.append(f"| {name} | {' | '.join(cells_)} |")
    square = sum(bool(p["quadratic_buffers"]) for p in programs.values())
    lines += ["", f"{len(programs)} programs; arrays of queries times keys are in {square or 'none'} of them.", ""]
    lines += ["| train step | slice | mesh | keys | rows | GB a device |", "|---|---|---|---|---:|---:|"]
    for name, p in found["models"].items():
        mesh = ", ".join(f"{axis} {size}" for axis, size in p["arguments"]["mesh"].items())
        keys = p["arguments"]["changes"].get("sequence_attention", "all at hand")
        cells_ = [name.partition(" on ")[0], p["topology"], mesh, keys, p["arguments"]["batch_size"]]
        lines.append(f"| {' | '.join(map(str, cells_))} | {p['device_bytes'] / 1e9:.1f} |")
    return lines


def block_table():
    """Block sizes by chip, chips of the same sizes in one row, and what other sizes would cost."""
    rows = {}
    for name, kind in CHIPS.items():
        for direction in DIRECTIONS:
            sizes = getattr(chip(kind), direction)
            cells_ = [f"{b.queries} × {b.keys}, {b.chunk}" for b in sizes.values()]
            resident = [chip(kind).resident_queries(dim) // b.queries * b.queries for dim, b in sizes.items()]
            cells_.append("/".join(f"{n:,}" for n in dict.fromkeys(resident)) if direction == "backward" else "all")
            rows.setdefault((direction, *cells_), []).append(name)
    dims = list(chip(kind).forward)
    lines = [f"| chips | pass | {' | '.join(f'head size {dim}' for dim in dims)} | queries at once |"]
    lines += ["|---|---|" + "---|" * len(dims) + "---:|"]
    lines += [f"| {', '.join(names)} | {' | '.join(row)} |" for row, names in rows.items()]
    return [*lines, "", tuned_blocks()]


def tuned_blocks():
    """How the blocks compare with other sizes, in a sentence."""
    found, excess = result("tune_blocks") or {"bundles": {}}, []
    for name, dims in found["bundles"].items():
        for dim, directions in dims.items():
            for direction, counts in directions.items():
                blocks = getattr(chip(CHIPS[name]), direction)[int(dim)]
                used = counts.get(f"{blocks.queries}x{blocks.keys}x{blocks.chunk}")
                excess += [used / min(counts.values()) - 1] if used else []
    if not excess:
        return "The bundles of other sizes have not been counted yet (`benchmarks/tune_blocks.py`)."
    most = f"at most {100 * max(excess):.0f} %" if max(excess) >= 0.005 else "none"
    return f"Bundles more than with the best sizes counted: {most} {source('tune_blocks', found['environment'])}."
