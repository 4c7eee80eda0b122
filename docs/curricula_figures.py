"""The picture of docs/objectives.md that shows how recipes change in the course of a run."""

# ruff: noqa: ANN201, D101, D103 -- a part of make_figures.py

import numpy as np
from drawing import BLUE, CARD, EDGE, FAINT, GREEN, INK, MARGIN, ORANGE, PAPER, PURPLE, SLATE, TINTS, Drawing

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
