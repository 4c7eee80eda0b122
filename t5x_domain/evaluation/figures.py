"""The figures of a report: SVG that takes the font and the colour of the page around it."""

import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_domain.evaluation.perplexity import measures

# Matplotlib knows no currentColor, so it draws ink in a colour that nothing else has, which is then replaced.
INK = "#010203"


class Curve(NamedTuple):
    """A line of a figure; values that are None leave a gap."""

    colour: str
    steps: Sequence[int]
    values: Sequence[float | None]


def figures(
    metrics: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], colours: Mapping[str, str]
) -> str:
    """Loss, held-out scores, learning rate and throughput of a run as SVG figures.

    Args:
      metrics: lines of metrics.jsonl.
      evaluations: lines of evaluations.jsonl.
      colours: of what is scored: corpora, or components where a corpus is scored with several objectives.
    """

    def logged(key: str) -> Curve:
        return Curve(INK, [line["step"] for line in metrics], [line[key] for line in metrics])

    steps = [line["step"] for line in metrics]
    by_corpus = [
        Curve(colour, steps, [line["corpus_loss"].get(corpus) for line in metrics])
        for corpus, colour in colours.items()
    ]
    measure = measures(evaluations[-1]["corpora"][next(iter(colours))])[0]
    held_out = [
        Curve(
            colour,
            [line["step"] for line in evaluations],
            [line["corpora"][corpus][measure.key] for line in evaluations],
        )
        for corpus, colour in colours.items()
    ]
    # The curve of the only corpus would hide under that of all.
    loss = [*(by_corpus if len(colours) > 1 else []), logged("loss")]
    rate = [logged("tokens_per_second")]
    return "\n".join(
        [
            figure_of("Training loss", "nats per target; light: as logged, strong: moving average", loss, smooth=True),
            figure_of(f"Held-out {measure.name}", "logarithmic scale", held_out, log=True, markers=True),
            figure_of("Learning rate", "of each update", [logged("learning_rate")], zero=True),
            figure_of("Throughput", "tokens per second, padding left out", rate, smooth=True, zero=True),
        ]
    )


def figure_of(
    title: str,
    caption: str,
    curves: Sequence[Curve],
    *,
    smooth: bool = False,
    log: bool = False,
    markers: bool = False,
    zero: bool = False,
) -> str:
    """One chart over update numbers as inline SVG, its text in the page's font and colour."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,  # ids must differ between the figures of a page
        "text.parse_math": False,
        "font.size": 9,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
        ),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "ytick.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.alpha": 0.15,
        "lines.linewidth": 1.5,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.2, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for colour, steps, values in curves:
            y = np.array(values, np.float64)  # None becomes NaN
            known = np.abs(y) < 1e100  # neither NaN nor so large that the places of ticks overflow
            x, y = np.array(steps)[known], y[known]
            marker = "o" if markers or len(x) == 1 else None
            if smooth and len(x) > 1:
                axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8, clip_on=False)
                y = _moving_average(y)
            axes.plot(x, y, color=colour, marker=marker, markersize=3, clip_on=False)
        _scale(axes, log=log, zero=zero)
        drawn = io.StringIO()
        figure.savefig(
            drawn, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = drawn.getvalue().replace(INK, "currentColor")
    label = html.escape(f"{title}: {caption}")
    svg = svg[svg.index("<svg") :].replace("<svg", f"<svg role='img' aria-label='{label}'", 1)
    return f"<figure><figcaption><b>{title}</b> {caption}</figcaption>{svg}</figure>"


def _scale(axes: Any, *, log: bool, zero: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    round_steps = [1, 2, 2.5, 5, 10]
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=round_steps))
    if zero:
        axes.set_ylim(bottom=0)
    low, high = axes.dataLim.intervaly
    if log and low <= high:  # else there is no finite value to scale
        axes.set_yscale("log")
        # Less than a decade has too few round powers to be read; ticks then stand at even distances.
        decades = math.log10(high / low)
        subs = (1,) if decades > 3 else (1, 3) if decades > 1.5 else (1, 2, 5)
        axes.yaxis.set_major_locator(LogLocator(subs=subs) if decades > 0.7 else MaxNLocator(5))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("update")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=round_steps, integer=True, min_n_ticks=1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _moving_average(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a twentieth of the values, shorter at both ends."""
    window = np.ones(max(len(values) // 20, 1))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
