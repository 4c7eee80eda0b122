"""Draws the pictures of the guides and fills in their tables, from what the code does and what benchmarks printed.

    python docs/make_figures.py                     writes docs/figures/*.svg, and objectives, attention and scaling.md
    python docs/make_figures.py --output=DIR        the same into DIR

The objectives run on the words of a record of data/sample, and attention's block maps and tables are those of its
kernels, so what is drawn is what they return. Everything is text and depends on nothing but the code and
benchmarks/results: the same of both gives the same bytes.
"""

# ruff: noqa: ANN201, D101, D103 -- a script, like those of benchmarks/

import argparse
from pathlib import Path
from typing import NamedTuple

import attention_figures
import curricula_figures
import numpy as np
import scaling_tables
import sparse_figures
from drawing import (
    BLUE,
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
from t5x_domain.objectives.language_modeling import CausalLM, PrefixLM
from t5x_domain.objectives.prefix import Metadata
from t5x_domain.objectives.span_corruption import SpanCorruption
from t5x_domain.objectives.ul2 import PRESETS, RELEASED_MODES

DOCS = Path(__file__).parent
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
        "curricula.svg": curricula_figures.curricula(),
        "attention_blocks.svg": attention_figures.blocks(),
        "attention_sparse.svg": sparse_figures.sparse(),
        "attention_skew.svg": attention_figures.skewed(),
        "attention_gradient.svg": attention_figures.gradient(),
    }
    tables = {
        "objectives.md": {"presets": preset_table(), "lengths": length_table()},
        "attention.md": {
            "bundles": attention_figures.bundle_table(),
            "memory": attention_figures.compiled_table(),
            "blocks": attention_figures.block_table(),
        },
        "scaling.md": {"fsdp": scaling_tables.fsdp_table(), "plans": scaling_tables.plans_table()},
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
