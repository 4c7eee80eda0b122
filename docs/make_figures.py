"""Draws the pictures of the guides and fills in their tables, from what the code does and what benchmarks printed.

    python docs/make_figures.py                     writes docs/figures/*.svg, docs/objectives.md and docs/attention.md
    python docs/make_figures.py --output=DIR        the same into DIR

The objectives run on the words of a record of data/sample, and attention's block maps and tables are those of its
kernels, so what is drawn is what they return. Everything is text and depends on nothing but the code and
benchmarks/results: the same of both gives the same bytes.
"""

# ruff: noqa: ANN201, D101, D103 -- a script, like those of benchmarks/

import argparse
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from drawing import (
    BLUE,
    CARD,
    EDGE,
    FAINT,
    GREEN,
    INK,
    MARGIN,
    ORANGE,
    PAPER,
    PURPLE,
    SLATE,
    TINTS,
    WIDTH,
    Drawing,
    pill_width,
    text_width,
)
from words import Words, records

from t5x_domain.data.packing import DecoderOnly, EncoderDecoder, Example
from t5x_domain.kernels.attention import visible_keys
from t5x_domain.kernels.mask import Mask, SegmentIds
from t5x_domain.kernels.relative_bias import RelativeBias, diagonals, saturation
from t5x_domain.kernels.tpu.block_map import ACTIVE, NEAR, PARTIAL, Far, block_map, read
from t5x_domain.kernels.tpu.blocks import LANES, Blocks, chip
from t5x_domain.kernels.tpu.skewed_bias import SkewedLayout, skew
from t5x_domain.objectives.language_modeling import CausalLM, PrefixLM
from t5x_domain.objectives.prefix import Metadata
from t5x_domain.objectives.span_corruption import SpanCorruption
from t5x_domain.objectives.ul2 import PRESETS, RELEASED_MODES

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks/results"
# ChEBI's royal jelly, 80 words; and two short records of the Gene Ontology and of MONDO.
LONG, SHORT = "CHEBI:78665", ("GO:0043670", "MONDO:0002436")


# What the denoisers do to a text


def spans(ids, words):
    """[(sentinel or None, words)] of `inputs` or `targets`, EOS left out."""
    result = [(None, [])]
    for token in ids[:-1]:
        if words.sentinel(token) is not None:
            result.append((words.sentinel(token), []))
        else:
            result[-1][1].append(words.word(token))
    return [(number, part) for number, part in result if number is not None or part]


class Item(NamedTuple):
    """A word of a text, the sentinel before it if there is one, and whether the inputs lack the word."""

    sentinel: int | None
    word: str
    hidden: bool


def span(sentinel, part, hidden):
    return [Item(None if i else sentinel, word, hidden) for i, word in enumerate(part)]


def whole_text(example, words):
    """The text of an example, put together from its `inputs` and `targets`."""
    hidden = dict(spans(example["targets"], words))
    rest = hidden.pop(None, [])  # of objectives without sentinels
    result = []
    for sentinel, part in spans(example["inputs"], words):
        result += span(sentinel, hidden.get(sentinel, []), True) + span(None, part, False)
    return result + span(None, rest, True)


LEFT, LEADING, SIZE, SEED = 152, 20, 13, 5


def flow(drawing, y, items, colour, start):
    """Sets items as lines of text from x = `start` on; returns the last line's y."""
    x, end = start, None  # `end`: where the highlight of the word before stops
    for number, word, hidden in items:
        pill = 0 if number is None else pill_width(str(number)) + 4
        width = text_width(word, SIZE)
        if x + pill + width > WIDTH - MARGIN:
            x, y, end = LEFT, y + LEADING, None
        if number is not None:
            drawing.pill(x, y, str(number), colour)
            x, end = x + pill, None
        if hidden:
            left = x - 1 if end is None else end - 1  # no seam between two words
            drawing.rect(left, y - 11.5, x + width + 1 - left, 15.5, TINTS[colour])
            drawing.line((left, y + 3.2), (x + width + 1, y + 3.2), stroke=colour, stroke_width=1.6)
        drawing.text(x, y, word, size=SIZE)
        end = x + width + 1 if hidden else None
        x += width + text_width(" ", SIZE) + 0.6
    return y


def denoiser_rows(title, rows, colour, text, legend):
    """A picture of what each of `rows` (label, two notes, objective, mode token or None) makes of `text`."""
    drawing = Drawing(title)
    drawing.text(MARGIN, 30, legend, size=12, fill=FAINT)
    y = 30
    for label, notes, objective, mode in rows:
        words = Words()
        example = objective(words.encode(text), np.random.default_rng(SEED), words)
        drawing.line((MARGIN, y + 17), (WIDTH - MARGIN, y + 17), stroke=EDGE)
        y += 40
        drawing.bold(MARGIN, y, label, size=15, fill=colour)
        items = whole_text(example, words)
        hidden = sum(item.hidden for item in items)
        sizes = f"{len(example['inputs'])} inputs, {len(example['targets'])} targets"
        notes = [*notes, f"{hidden} of {len(items)} words", sizes]
        for i, note in enumerate(notes):
            drawing.text(MARGIN, y + 18 + 15 * i, note, size=11, fill=FAINT)
        start = LEFT if mode is None else LEFT + drawing.pill(LEFT, y, mode, SLATE) + 6
        last = flow(drawing, y, items, colour, start) + 28
        drawing.text(LEFT, last, "targets", size=11, fill=FAINT)
        written = [item for number, part in spans(example["targets"], words) for item in span(number, part, False)]
        last = flow(drawing, last, [*written, Item(None, "EOS", False)], colour, LEFT + 46)
        y = max(last, y + 18 + 15 * (len(notes) - 1))
    return drawing.finish(y + 20)


def denoisers():
    """{file: picture} of the denoisers by family."""
    (record,) = records(LONG)
    rows = {"R": [], "X": []}
    for family, length, share, mode, _ in PRESETS["ul2_uniform7"]:
        if family in rows:
            notes = (f"spans of {length} on average,", f"{_percent(share)} of the text")
            rows[family].append((f"{family}({length}, {share:.2f})", notes, SpanCorruption(share, length), mode))
    mode = RELEASED_MODES["S"]
    rows["S"] = [
        ("S, 'suffix'", ("the last quarter", "is predicted"), PrefixLM("suffix"), mode),
        ("S, 'uniform'", ("from a random word on", "all is predicted"), PrefixLM("uniform"), mode),
        ("causal LM", ("all is predicted,", "nothing is given"), CausalLM(), None),
    ]
    hidden = (
        "Underlined: not in the inputs, which have a numbered sentinel in its place. Targets: what the model writes."
    )
    cut = "Underlined: not in the inputs. Targets: what the model writes."
    return {
        "denoisers_r.svg": denoiser_rows("UL2's R-denoisers", rows["R"], BLUE, record["text"], hidden),
        "denoisers_x.svg": denoiser_rows("UL2's X-denoisers", rows["X"], ORANGE, record["text"], hidden),
        "denoisers_s.svg": denoiser_rows("Prefix LM and causal LM", rows["S"], GREEN, record["text"], cut),
    }


# How examples lie in rows

STRIP_LEFT = 128
KINDS = {"metadata": PURPLE, "mode": SLATE, "inputs": BLUE, "targets": GREEN, "padding": FAINT}


class Rows:
    """Two examples of the sample in the rows that the layouts make of them."""

    def __init__(self):
        self.words = Words()
        self.kinds = {0: "padding"}
        objectives = [(SpanCorruption(0.4, 1.5), "[NLG]"), (PrefixLM("suffix"), "[S2S]")]
        metadata = Metadata(("Source: {source}",))
        self.examples = []
        for number, (record, (objective, mode)) in enumerate(zip(records(*SHORT), objectives, strict=True)):
            before, mode = self._tokens(metadata.text(record), "metadata"), self._tokens(mode, "mode")
            example = objective(self.words.encode(record["text"]), np.random.default_rng(2), self.words)
            self.examples.append(Example(example["inputs"], example["targets"], number, np.concatenate([before, mode])))
        text = self.words.encode(records(*SHORT)[0]["text"])
        causal = CausalLM()(text, np.random.default_rng(0), self.words)
        self.causal = Example(causal["inputs"], causal["targets"], 0, self.examples[0].prefix[:2])

    def _tokens(self, text, kind):
        tokens = self.words.encode(text)
        self.kinds.update(dict.fromkeys(tokens.tolist(), kind))
        return tokens

    def kind(self, token, segment, otherwise):
        return "padding" if segment == 0 else self.kinds.get(int(token), otherwise)

    def label(self, token):
        return str(self.words.sentinel(token) or self.words.word(token))


def cells(drawing, rows, y, tokens, segments, otherwise):
    """A strip of tokens; returns their (left, right)."""
    x, places = STRIP_LEFT, []
    for token, segment in zip(tokens, segments, strict=True):
        label, kind = rows.label(token) if segment else "", rows.kind(token, segment, otherwise)
        sentinel = rows.words.sentinel(token) is not None
        width = max(text_width(label, 11.5) + 9, 19)
        drawing.rect(
            x, y, width, 24, KINDS[kind] if sentinel else TINTS[KINDS[kind]], stroke=KINDS[kind], stroke_width=0.8
        )
        drawing.text(x + width / 2, y + 16, label, size=11.5, anchor="middle", fill=PAPER if sentinel else INK)
        places.append((x, x + width))
        x += width
    return places


def beneath(drawing, y, places, values, segments, name):
    drawing.text(MARGIN, y, name, size=11, fill=FAINT)
    for (left, right), value, segment in zip(places, values, segments, strict=True):
        colour = INK if segment else "#a3a7ad"
        drawing.text((left + right) / 2, y, str(int(value)), size=11, anchor="middle", fill=colour)


def key(drawing, names):
    x = MARGIN
    for kind, name in names.items():
        drawing.rect(x, 22, 13, 13, TINTS[KINDS[kind]], stroke=KINDS[kind], stroke_width=0.8)
        drawing.text(x + 18, 32, name, size=12)
        x += 18 + text_width(name, 12) + 20
    return x


NAMES = {"metadata": "metadata", "mode": "mode token", "inputs": "inputs", "targets": "targets"}


def encoder_decoder():
    """The features of one row of an encoder-decoder."""
    rows = Rows()
    features = EncoderDecoder().batch([rows.examples], {"inputs": 21, "targets": 12})
    batch = {name: row[0] for name, row in features.items()}
    drawing = Drawing("Two examples in one row of an encoder-decoder")
    x = key(drawing, NAMES | {"padding": "padding"})
    for colour in (BLUE, GREEN):
        drawing.rect(x, 22, 13, 13, colour)
        x += 15
    drawing.text(x + 5, 32, "sentinels", size=12)

    def strip(y, tokens, segments, kind, features, notes):
        drawing.bold(MARGIN, y + 16, segments.partition("_")[0], size=13)
        places = cells(drawing, rows, y, batch[tokens], batch[segments], kind)
        for i, (name, feature) in enumerate(features.items()):
            beneath(drawing, y + 40 + 17 * i, places, batch[feature], batch[segments], name)
        for i, note in enumerate(notes):
            drawing.text(STRIP_LEFT, y + 47 + 17 * (len(features) + i), note, size=12, fill=FAINT)

    strip(
        58,
        "encoder_input_tokens",
        "encoder_segment_ids",
        "inputs",
        {"example": "encoder_segment_ids", "position": "encoder_positions"},
        ["Every token sees all tokens of its own example, before and after it, metadata and mode token among them."],
    )
    strip(
        170,
        "decoder_target_tokens",
        "decoder_segment_ids",
        "targets",
        {"example": "decoder_segment_ids", "position": "decoder_positions", "loss weight": "decoder_loss_weights"},
        [
            "A target is predicted from the targets before it and from the encoder, both of its own example only.",
            "The loss is on all targets, sentinels and EOS among them; nothing in the encoder is predicted.",
        ],
    )
    return drawing.finish(306)


CELL, GRID = 13, "#eceae4"


def matrix(drawing, rows, x, y, batch, title):
    """Who sees whom in a decoder-only row: a line for each token read, a column for each token it may see."""
    read, target = batch["decoder_input_tokens"][0], batch["decoder_target_tokens"][0]
    segments, prefix, weights = (batch[f"decoder_{name}"][0] for name in ("segment_ids", "prefix", "loss_weights"))
    starts = batch["decoder_positions"][0] == 0
    length = np.count_nonzero(segments)
    inputs_end = [int(np.flatnonzero((segments == s) & (weights > 0))[0]) for s in range(1, segments.max() + 1)]
    kinds = []
    for i in range(length):
        otherwise = "targets" if i > inputs_end[segments[i] - 1] else "inputs"
        kinds.append("padding" if starts[i] else rows.kind(read[i], segments[i], otherwise))
    drawing.bold(x, y - 42, title, size=13)
    drawing.text(x - 6, y - 16, "reads", size=11, fill=FAINT, anchor="end")
    drawing.text(x + length * CELL + 8, y - 16, "predicts", size=11, fill=FAINT)
    for i in range(length + 1):
        here, side = i * CELL + 0.5, length * CELL + 0.5
        drawing.line((x + here, y), (x + here, y + side), stroke=GRID)
        drawing.line((x, y + here), (x + side, y + here), stroke=GRID)
    for i in range(length):
        drawing.rect(x + i * CELL + 1, y - 12, CELL - 1, 8, KINDS[kinds[i]])
        middle = y + i * CELL + CELL - 3
        drawing.text(x - 8, middle, "start" if starts[i] else rows.label(read[i]), size=10.5, anchor="end")
        for j in range(length):
            if segments[i] == segments[j] and (j <= i or prefix[j]):
                colour = KINDS[kinds[j]]
                fill = colour if j <= i else TINTS[colour]
                drawing.rect(x + j * CELL + 1, y + i * CELL + 1, CELL - 1, CELL - 1, fill)
        if weights[i]:
            drawing.text(x + length * CELL + 8, middle, rows.label(target[i]), size=10.5, fill=GREEN)
    return y + length * CELL


def decoder_only():
    """Who sees whom in a decoder-only model."""
    rows = Rows()
    drawing = Drawing("Two examples in one row of a decoder-only model, and one of causal LM")
    key(drawing, NAMES | {"padding": "start token"})
    both = DecoderOnly().batch([rows.examples], {"inputs": 20, "targets": 12})
    bottom = matrix(drawing, rows, 82, 112, both, "Two examples, inputs seen from both sides")
    alone = DecoderOnly().batch([[rows.causal]], {"inputs": 4, "targets": 12})
    middle = matrix(drawing, rows, 624, 112, alone, "Causal LM with metadata")
    notes = (
        "A line reads one token and predicts the next; the filled squares",
        "are the tokens that it sees. Dark: itself and those before it.",
        "Light: those after it, for metadata, mode token and inputs are",
        "seen from both sides. In causal LM nothing is.",
        "Lines without a prediction have no loss. Examples do not see",
        "each other, and positions start at 0 in each.",
    )
    for i, note in enumerate(notes):
        drawing.text(540, middle + 46 + 18 * i, note, size=12, fill=FAINT)
    return drawing.finish(bottom + 22)


# Curricula

BAR_LEFT, BAR_WIDTH, BAR_HEIGHT = 236, 642, 58


def bar(drawing, y, start, stop, layers):
    """A phase from `start` to `stop` of the run: layers (share, colour, label, whether it is pale), from the top."""
    left, width = BAR_LEFT + start * BAR_WIDTH, (stop - start) * BAR_WIDTH
    for share, colour, label, pale in layers:
        height = share * BAR_HEIGHT
        drawing.rect(left, y, width, height, TINTS[colour] if pale else colour, stroke=CARD, stroke_width=1.5)
        middle = y + height / 2 + 3.8
        drawing.text(left + width / 2, middle, label, size=10.5, anchor="middle", fill=INK if pale else PAPER)
        y += height


def cosine(start, stop, high, low, warm_up=0.05):
    """Points (share of the run, height) of a learning rate: a warm-up, then half a cosine."""
    steps = np.linspace(0, 1, 25)
    across = start + (stop - start) * (warm_up + (1 - warm_up) * steps)
    curve = low + (high - low) * (1 + np.cos(np.pi * steps)) / 2
    return [*([(start, 0.0)] if warm_up else []), *zip(across.tolist(), curve.tolist(), strict=True)]


def recipes():
    """(name, file, note, phases, learning rate) of every recipe."""

    def mix(general, domain_label="domain", general_label="general"):
        return [(1 - general, ORANGE, domain_label, False), (general, SLATE, general_label, True)]

    begin, epoch = 0.08, 0.15
    finished = (0, begin, [(1, FAINT, "", True)])
    meco = [(0, 0.9, [(1, PURPLE, "metadata before every document", False)]), (0.9, 1, [(1, PURPLE, "without", True)])]
    upsampling = [(0, 0.85, mix(0.65)), (0.85, 1, mix(0.35))]
    rewarm = [(0, 0.65, mix(0.35)), (0.65, 1, mix(0.35))]
    epochs = [
        (begin + epoch * i, begin + epoch * (i + 1), mix(0.35, f"subset, epoch {i + 1}", f"general, sample {i + 1}"))
        for i in range(4)
    ]
    stability_gap = [finished, *epochs, (begin + 4 * epoch, 1, mix(0.35, "whole domain"))]
    ul2r = [(0.5, GREEN, "S 50 %", False), (0.25, BLUE, "R 25 %", False), (0.25, ORANGE, "X 25 %", False)]
    whole, low = cosine(0, 1, 1, 0.1), cosine(begin, 1, 0.4, 0.4)
    again = cosine(0, 0.65, 1, 0.1) + cosine(0.65, 1, 0.6, 0.1, warm_up=0.12)[1:]
    return [
        ("MeCo", "meco.gin", "metadata, then none", meco, whole),
        ("Upsampling", "upsampling.gin", "more of the domain at the end", upsampling, whole),
        ("Replay", "replay.gin", "general text stays in the mix", [finished, (begin, 1, mix(0.35))], low),
        ("Re-warming", "rewarm.gin", "the rate rises once more", rewarm, again),
        ("Stability gap", "stability_gap.gin", "a subset, several times", stability_gap, low),
        ("UL2R", "ul2r.gin", "other denoisers", [finished, (begin, 1, ul2r)], cosine(begin, 1, 0.4, 0.02, warm_up=0)),
    ]


def curricula():
    """What the recipes change in the course of a run."""
    drawing = Drawing("What the recipes change in the course of a run")
    legend = "Time runs to the right, heights are shares of the text. Sketches: the numbers are set in the files."
    drawing.text(MARGIN, 32, legend, size=12, fill=FAINT)
    y = 54
    for name, file, note, phases, rate in recipes():
        drawing.bold(MARGIN, y + 14, name, size=14)
        drawing.text(MARGIN, y + 31, file, size=11.5, fill=BLUE)
        drawing.text(MARGIN, y + 47, note, size=11.5, fill=FAINT)
        for phase in phases:
            bar(drawing, y, *phase)
        drawing.text(BAR_LEFT - 8, y + BAR_HEIGHT + 20, "learning rate", size=10.5, fill=FAINT, anchor="end")
        bottom = y + BAR_HEIGHT + 23
        drawing.line(*((BAR_LEFT + x * BAR_WIDTH, bottom - 18 * height) for x, height in rate), stroke_width=1.5)
        y += 102
    drawing.rect(MARGIN, y - 4, 13, 13, TINTS[FAINT], stroke=EDGE)
    drawing.text(MARGIN + 19, y + 6, "a finished model, given with --init_from", size=12, fill=FAINT)
    return drawing.finish(y + 26)


# Attention

TOKENS, BLOCK, PAIR = 4096, Blocks(256, 256, 256), 12
T5_BIAS = {True: RelativeBias(jnp.arange(32.0)[:, None], True), False: RelativeBias(jnp.arange(32.0)[:, None], False)}


def attention_masks():
    """(title, what it is, flags [query blocks, key blocks] of the kernels' block map) of some masks with T5's bias."""
    ids = np.repeat([1, 2, 3, 0], [1500, 900, 1450, 246])[None]
    prefix = np.concatenate([np.arange(n) < m for n, m in ((1500, 620), (900, 300), (1450, 700), (246, 0))])[None]
    masks = [
        ("Causal", "keys up to the query", Mask(causal=True), None, None),
        ("Window", "512 each side, 32 global tokens", Mask(window=(512, 512), global_tokens=32), None, None),
        ("Packed, prefix LM", "3 segments, then padding", Mask(causal=True), ids, prefix),
        ("Bidirectional", "every query sees every key", Mask(), None, None),
    ]
    side = TOKENS // BLOCK.queries
    for title, note, mask, ids, prefix in masks:
        pairs = None if ids is None else SegmentIds(jnp.asarray(ids), jnp.asarray(ids))
        prefix = None if prefix is None else jnp.asarray(prefix)
        intervals = visible_keys(mask, TOKENS, TOKENS, segment_ids=pairs, prefix=prefix)
        built = block_map(intervals, side, side, BLOCK, far=Far(*saturation(T5_BIAS[not mask.causal])))
        row, column, flags = read(np.asarray(built.entries), slice(int(built.steps)))
        found = np.zeros((side, side), np.int32)
        found[row, column] = flags
        yield title, note, found


def pair_fill(flags):
    colour = ORANGE if flags & PARTIAL else BLUE
    return colour if flags & NEAR else TINTS[colour]


def attention_blocks():
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
    for i, (title, note, flags) in enumerate(attention_masks()):
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


def attention_skew():
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


def attention_gradient():
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


# Tables of docs/objectives.md


def label(denoiser):
    """'R(3, 0.15)', 'S', 'S, uniform', 'causal LM'."""
    if denoiser.family in "RX":
        return f"{denoiser.family}({denoiser.mean_span_length}, {denoiser.rate:.2f})"
    return "causal LM" if denoiser.family == "C" else "S" if denoiser.rate else "S, uniform"


def _percent(share):
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def preset_table():
    lines = ["| preset | weights of its denoisers | mode tokens |", "|---|---|---|"]
    for name, mix in PRESETS.items():
        by_weight = {}
        for denoiser in mix:
            by_weight.setdefault(_percent(denoiser.weight), []).append(label(denoiser))
        weights = "; ".join(
            f"{', '.join(names)}: {weight}{' each' if len(names) > 1 else ''}" for weight, names in by_weight.items()
        )
        modes = ", ".join(f"`{mode}`" for mode in dict.fromkeys(d.mode for d in mix) if mode) or "none"
        lines.append(f"| `{name}` | {weights} | {modes} |")
    return lines


def length_table():
    """The span corruption of all presets, S and causal LM, in rows whose inputs and targets are equally long."""
    corruption = {d[:3]: d for mix in PRESETS.values() for d in mix if d.family in "RX"}
    objectives = {label(corruption[key]): SpanCorruption(key[2], key[1]) for key in sorted(corruption)}
    objectives |= {"S, 'suffix'": PrefixLM("suffix"), "S, 'uniform'": PrefixLM("uniform"), "causal LM": CausalLM()}
    columns = "raw tokens | inputs | targets | sentinels"
    lines = [f"| denoiser | 512: {columns} | 1024: {columns} |", "|---|" + "---:|" * 8]
    for name, objective in objectives.items():
        cells_ = []
        for length in (512, 1024):
            raw = objective.raw_length({"inputs": length, "targets": length})
            most = "≤ " if objective.random_lengths else ""
            cells_ += [f"{raw:,}", *(f"{most}{size:,}" for size in objective.lengths(raw))]
            cells_ += [str(objective.sentinels_needed(raw) or "–")]
        lines.append(f"| {name} | {' | '.join(cells_)} |")
    return lines


# Tables of docs/attention.md

CHIPS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
DIRECTIONS = ("forward", "backward")


def result(name):
    """What benchmarks/`name`.py wrote; None if there is nothing yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def source(name, environment):
    """Where figures come from, in a line."""
    versions = ", ".join(f"{key} {environment[key]}" for key in ("jax", "libtpu", "tokamax") if key in environment)
    return f"(`benchmarks/{name}.py`; {versions}, {environment['date']})"


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
    return [*lines, "", f"{len(programs)} programs; arrays of queries times keys are in {square or 'none'} of them."]


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


# Files


def filled_in(name, tables):
    """A guide with its tables made anew."""
    guide = (DOCS / name).read_text(encoding="utf-8")
    for table, lines in tables.items():
        begin = f"<!-- made by make_figures.py: {table} -->\n"
        before, found, rest = guide.partition(begin)
        _, end, after = rest.partition("<!-- end -->")
        if not (found and end):
            raise SystemExit(f"docs/{name} lacks the line {begin.strip()}, or <!-- end --> after it.")
        guide = before + begin + "\n".join(lines) + "\n" + end + after
    return guide


def write(folder):
    """Writes all pictures to `folder`/figures and the guides to `folder`."""
    pictures = {
        **denoisers(),
        "encoder_decoder.svg": encoder_decoder(),
        "decoder_only.svg": decoder_only(),
        "curricula.svg": curricula(),
        "attention_blocks.svg": attention_blocks(),
        "attention_skew.svg": attention_skew(),
        "attention_gradient.svg": attention_gradient(),
    }
    tables = {
        "objectives.md": {"presets": preset_table(), "lengths": length_table()},
        "attention.md": {"bundles": bundle_table(), "memory": compiled_table(), "blocks": block_table()},
    }
    guides = {name: filled_in(name, made) for name, made in tables.items()}
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        (folder / "figures" / name).write_text(picture, encoding="utf-8")
    for name, guide in guides.items():
        (folder / name).write_text(guide, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DOCS)
    write(parser.parse_args().output)


if __name__ == "__main__":
    main()
