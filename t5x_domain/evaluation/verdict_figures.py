"""The figures of a verdict: an interval beside its numbers, before and after, and shares of wins, ties and losses.

Each is a small SVG that stands in a cell of a table, so that text wraps, is selected and is read aloud as text. Win,
tie and loss differ in colour (blue, none, orange: told apart with any colour blindness) and, for black and white, in
shape.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_domain.evaluation.report import PALETTE

OUTCOME_COLOURS = {"win": PALETTE[0], "tie": "currentColor", "loss": PALETTE[1]}
MARKS = {"win": "▲", "tie": "○", "loss": "▼"}

_WIDTH, _HEIGHT, _MARGIN = 240, 26, 12
_MIDDLE = _HEIGHT / 2
# The line at 0 is drawn beyond the picture; the cell of the table cuts it to its own height, so that rows join.
_BEYOND = 200


class Forest:
    """Intervals of differences on one scale, 0 in the middle."""

    def __init__(self, entries: Sequence[Mapping[str, Any]], *, unit: float = 1, lower_is_better: bool = False) -> None:
        """Scales to the widest interval.

        Args:
          entries: comparisons with `difference`, `low`, `high` and `outcome`.
          unit: factor of the numbers on the axis, e.g. 100 for percentage points.
          lower_is_better: which side of 0 is the adapted model's.
        """
        self._unit, self._lower_is_better = unit, lower_is_better
        self._reach = _round_up(max((abs(entry[end]) for entry in entries for end in ("low", "high")), default=0.0))

    def cell(self, entry: Mapping[str, Any]) -> str:
        """One row: the interval as a bar, the difference as a mark."""
        low, middle, high = (self._x(entry[key]) for key in ("low", "difference", "high"))
        colour = OUTCOME_COLOURS[entry["outcome"]]
        label = (
            f"{entry['outcome']}: {signed(entry['difference'] * self._unit)}, "
            f"interval {signed(entry['low'] * self._unit)} to {signed(entry['high'] * self._unit)}"
        )
        bar = (
            f"<path d='M{low:.1f} {_MIDDLE}H{high:.1f}M{low:.1f} {_MIDDLE - 4}v8M{high:.1f} {_MIDDLE - 4}v8' "
            f"stroke='{colour}' stroke-width='2' fill='none'/>"
        )
        return _svg(label, f"{self._zero}{bar}{_mark(entry['outcome'], middle)}")

    def axis(self) -> str:
        """The scale, for the foot of the table."""
        ticks = []
        for share in (-1, -0.5, 0, 0.5, 1):
            x, value = self._x(share * self._reach), share * self._reach * self._unit
            ticks += [f"<path d='M{x:.1f} 0v4' stroke='currentColor'/>", _text(signed(value), x, 15, 10)]
        return _svg("scale of the differences", "".join(ticks))

    @property
    def sides(self) -> tuple[str, str]:
        """What the left and the right side of 0 mean."""
        worse, better = "← adapted worse", "adapted better →"
        return ("← adapted better", "adapted worse →") if self._lower_is_better else (worse, better)

    @property
    def _zero(self) -> str:
        x = self._x(0)
        return (
            f"<path d='M{x} {-_BEYOND}V{_HEIGHT + _BEYOND}' stroke='currentColor' stroke-dasharray='2 2' opacity='.6'/>"
        )

    def _x(self, value: float) -> float:
        return _WIDTH / 2 + value / self._reach * (_WIDTH / 2 - _MARGIN)


class BeforeAfter:
    """Two positive values of each entry, base and adapted, on one logarithmic scale."""

    def __init__(self, values: Sequence[tuple[float, float]]) -> None:
        """Scales to the smallest and the largest value."""
        logs = [math.log(max(value, 1e-12)) for pair in values for value in pair]
        middle, half = (max(logs) + min(logs)) / 2, max((max(logs) - min(logs)) / 2, 0.05)
        self._start, self._length = middle - half, 2 * half

    def cell(self, base: float, adapted: float, outcome: str) -> str:
        """A ring for the base, the mark of the outcome for the adapted model, a line between them."""
        before, after = self._x(base), self._x(adapted)
        line = (
            f"<path d='M{before:.1f} {_MIDDLE}H{after:.1f}' stroke='{OUTCOME_COLOURS[outcome]}' stroke-width='2'/>"
            f"<circle cx='{before:.1f}' cy='{_MIDDLE}' r='3' fill='currentColor'/>"
        )
        return _svg(f"from {base:.4g} to {adapted:.4g}, {outcome}", line + _mark(outcome, after))

    def _x(self, value: float) -> float:
        return _MARGIN + (math.log(max(value, 1e-12)) - self._start) / self._length * (_WIDTH - 2 * _MARGIN)


def tally_bar(tally: Mapping[str, Any]) -> str:
    """Shares of wins, ties and losses as one bar; `tally` is an entry of the verdict's `summary`."""
    parts, x = [], 0.0
    for outcome, mark in MARKS.items():
        width, colour = 600 * tally[outcome] / tally["count"], OUTCOME_COLOURS[outcome]
        if width:
            ink, opacity = ("currentColor", 0.12) if outcome == "tie" else ("#fff", 1)
            place = f"x='{x + 1:.1f}' y='1' width='{width - 2:.1f}' height='24' rx='3'"
            parts.append(f"<rect {place} fill='{colour}' fill-opacity='{opacity}' stroke='{colour}'/>")
            parts.append(_text(f"{mark} {tally[outcome]}", x + width / 2, 17.5, 13, ink))
        x += width
    label = ", ".join(f"{outcome} {tally[outcome]}" for outcome in ("win", "tie", "loss"))
    return _svg(label, "".join(parts), width=600, height=26)


def signed(value: float) -> str:
    """A number with its sign, three significant digits, "0" without."""
    text = f"{value:+.3g}"
    if abs(value) < 1e-9:
        return "0"
    return text.replace("-", "−")


def _mark(outcome: str, x: float) -> str:
    """▲, a ring or ▼, like the letters of `MARKS`, but drawn, so that no font moves them."""
    if outcome == "tie":
        place = f"cx='{x:.1f}' cy='{_MIDDLE}' r='4.5'"
        return f"<circle {place} fill='var(--paper, #fff)' stroke='currentColor' stroke-width='1.5'/>"
    tip = -6 if outcome == "win" else 6
    return f"<path d='M{x:.1f} {_MIDDLE + tip}l6 {-2 * tip}h-12z' fill='{OUTCOME_COLOURS[outcome]}'/>"


def _text(text: str, x: float, y: float, size: int, colour: str = "currentColor") -> str:
    return f"<text x='{x:.1f}' y='{y}' font-size='{size}' text-anchor='middle' fill='{colour}'>{text}</text>"


def _svg(label: str, content: str, *, width: int = _WIDTH, height: int = _HEIGHT) -> str:
    return (
        f"<svg role='img' aria-label='{html.escape(label)}' viewBox='0 0 {width} {height}' overflow='visible'>"
        f"{content}</svg>"
    )


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 6, 10 times a power of ten, whose half is as round."""
    if value <= 0:
        return 0.01
    power = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 6, 10, 20) if step * power >= value * (1 - 1e-9))
