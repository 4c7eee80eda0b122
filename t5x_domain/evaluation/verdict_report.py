"""report.html of a verdict: one page that needs neither network nor JavaScript, see `evaluation.verdict`."""

import html
import itertools
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from etils import epath

from t5x_domain import files
from t5x_domain.evaluation.figures import Curve, figure_of
from t5x_domain.evaluation.report import PALETTE, STYLE, legend, shown_number
from t5x_domain.evaluation.verdict_figures import MARKS, OUTCOME_COLOURS, BeforeAfter, Forest, signed, tally_bar
from t5x_domain.files import write_atomically

# {title: {name of a run: [(step, value)]}}
Curves = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]

_SAID = {
    "tasks": "{count} prompted task{s}",
    "fine_tuned": "{count} fine-tuned task{s}",
    "domain": "{count} corp{us} of the domain",
    "general": "{count} general corp{us}",
}


def write_report(verdict: Mapping[str, Any], folder: epath.PathLike, *, curves: Curves | None = None) -> epath.Path:
    """Writes `folder`/report.html, whole or not at all.

    Args:
      verdict: the contents of verdict.json.
      folder: where the page goes.
      curves: learning curves to draw, each title a figure.

    Returns:
      The path of the page.
    """
    path = files.path(folder) / "report.html"
    write_atomically(path, _page(verdict, curves or {}).encode())
    return path


def _page(verdict: Mapping[str, Any], curves: Curves) -> str:
    base, adapted = (html.escape(PurePath(verdict[model]).name or verdict[model]) for model in ("base", "adapted"))
    sections = [
        _section("Tasks, asked with prompts", _tasks(verdict["tasks"])),
        _section("Held-out text, before and after", _perplexity(verdict["perplexity"])),
        _section("Tasks, after fine-tuning", _fine_tuned(verdict["fine_tuned"])),
        _section("Learning curves", _curves(curves)),
        _section("What to keep in mind", _warnings(verdict)),
        _section("How this was found", _method(verdict)),
        _section("Prompts", _prompts(verdict["tasks"])),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{adapted} against {base} – verdict</title>
<style>{STYLE}{_MORE_STYLE}</style>
</head>
<body>
<header>
<p class="kicker">Head to head</p>
<h1>{adapted} <small>against</small> {base}</h1>
<p class="headline">{_headline(verdict["summary"])}</p>
{_bars(verdict["summary"])}
<p class="facts">base: {html.escape(verdict["base"])} · adapted: {html.escape(verdict["adapted"])} ·
{html.escape(verdict["date"])}</p>
</header>
<main>
{"".join(sections)}</main>
</body>
</html>
"""


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>\n" if content else ""


def _what(group: str, count: int) -> str:
    return _SAID[group].format(count=count, s="" if count == 1 else "s", us="us" if count == 1 else "ora")


def _headline(summary: Mapping[str, Any]) -> str:
    verbs = {"win": "wins", "tie": "ties", "loss": "loses"}
    clauses = []
    for group, tally in summary.items():
        if tally["count"] == 1:
            shares = next(verb for outcome, verb in verbs.items() if tally[outcome])
        else:
            shares = ", ".join(
                f"{verb} {tally[outcome]} ({tally['percent'][outcome]:.1f}&nbsp;%)" for outcome, verb in verbs.items()
            )
        clauses.append(f"On {_what(group, tally['count'])} the adapted model {shares}.")
    return " ".join(clauses)


def _bars(summary: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{_what(group, tally['count'])}</th><td class='bar'>{tally_bar(tally)}</td></tr>"
        for group, tally in summary.items()
    )
    key = " ".join(f"<span><b style='color:{OUTCOME_COLOURS[o]}'>{MARKS[o]}</b> {o}</span>" for o in MARKS)
    return f"<table class='tally'><tbody>{rows}</tbody></table><p class='legend'>{key}</p>"


def _tasks(entries: Sequence[Mapping[str, Any]]) -> str:
    if not entries:
        return ""
    names = [
        f"{html.escape(e['name'])} <small>{html.escape(e['metric'])}, {e['items']:,} items</small>" for e in entries
    ]
    return _forest_table("Task", names, entries) + _others(entries)


def _fine_tuned(entries: Sequence[Mapping[str, Any]]) -> str:
    if not entries:
        return ""
    names = [
        f"{html.escape(e['name'])} <small>{html.escape(e['metric'])}, {e['items']:,} items, "
        f"{len(e['seeds']['base'])} and {len(e['seeds']['adapted'])} seeds</small>"
        for e in entries
    ]
    return _forest_table("Task", names, entries)


def _forest_table(heading: str, names: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> str:
    forest = Forest(entries, unit=100)
    rows = "".join(
        f"<tr><th scope='row'>{name}</th><td><span>{100 * entry['base']:.1f}&nbsp;→</span> "
        f"<b>{100 * entry['adapted']:.1f}</b></td><td class='forest'>{forest.cell(entry)}</td>"
        f"<td>{_difference(entry, 100)}</td>{_outcome(entry)}</tr>"
        for name, entry in zip(names, entries, strict=True)
    )
    return f"""<table class="compared">
<thead><tr><th scope="col">{heading}</th><th scope="col">Base → adapted</th>
<th scope="col" class="forest">{_sides(forest)}</th><th scope="col">Difference</th>
<th scope="col" class="outcome">Outcome</th></tr></thead>
<tbody>{rows}</tbody>
<tfoot><tr><td></td><td></td><td class="forest axis">{forest.axis()}</td><td></td><td></td></tr></tfoot>
</table>
<p class="note">In hundredths; differences are adapted minus base with their interval. A bar that touches the line at 0
is a tie. p is two-sided; pₕ is p after Holm’s correction for the number of rows, and where that makes the outcome a
tie it is said.</p>"""


def _perplexity(entries: Sequence[Mapping[str, Any]]) -> str:
    if not entries:
        return ""
    shown = [_shown(entry) for entry in entries]
    scale, forest = BeforeAfter(shown), Forest(entries, lower_is_better=True)
    rows = "".join(
        f"<tr><th scope='row'>{html.escape(entry['corpus'])} <small>{entry['role']}, {entry['documents']:,} documents"
        f"</small></th><td><span>{shown_number(base)}&nbsp;→</span> <b>{shown_number(adapted)}</b></td>"
        f"<td class='picture'>{scale.cell(base, adapted, entry['outcome'])}</td>"
        f"<td class='forest'>{forest.cell(entry)}</td><td>{_difference(entry, 1)}</td>{_outcome(entry)}</tr>"
        for entry, (base, adapted) in zip(entries, shown, strict=True)
    )
    tokens = all(entry["measure"] == "nats_per_token" for entry in entries)
    value, unit = ("Perplexity", "nats per token") if tokens else ("Bits per byte", "bits per byte")
    return f"""<table class="compared">
<thead><tr><th scope="col">Corpus</th><th scope="col">{value}</th><th scope="col" class="picture">● base, then
adapted</th><th scope="col" class="forest">{_sides(forest)}</th><th scope="col">Difference</th>
<th scope="col" class="outcome">Outcome</th></tr></thead>
<tbody>{rows}</tbody>
<tfoot><tr><td></td><td></td><td class="picture"></td><td class="forest axis">{forest.axis()}</td><td></td><td></td>
</tr></tfoot>
</table>
<p class="note">Less is better. Differences are in {unit}, resampled by document. A loss on a general corpus is
forgetting, and its interval says how much.</p>"""


def _shown(entry: Mapping[str, Any]) -> tuple[float, float]:
    values = entry["perplexity"] or entry
    return values["base"], values["adapted"]


def _sides(forest: Forest) -> str:
    left, right = forest.sides
    return f"<span class='sides'><span>{left}</span><span>{right}</span></span>"


def _difference(entry: Mapping[str, Any], unit: float) -> str:
    low, high = (signed(unit * entry[end]) for end in ("low", "high"))
    return f"<b>{signed(unit * entry['difference'])}</b> <small>[{low}, {high}]</small>"


def _outcome(entry: Mapping[str, Any]) -> str:
    outcome = entry["outcome"]
    holm = "" if entry["outcome_holm"] == outcome else ", tie after Holm"
    return (
        f"<td class='outcome'><b style='color:{OUTCOME_COLOURS[outcome]}'>{MARKS[outcome]}</b> {outcome}{holm} "
        f"<small>p {_p(entry['p_value'])}, pₕ {_p(entry['p_holm'])}</small></td>"
    )


def _p(value: float) -> str:
    return "&lt; .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def _others(entries: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{html.escape(entry['name'])}</th><td>{html.escape(metric)}</td>"
        f"<td><span>{100 * scores['base']:.1f}&nbsp;→</span> <b>{100 * scores['adapted']:.1f}</b></td></tr>"
        for entry in entries
        for metric, scores in entry["other_metrics"].items()
    )
    if not rows:
        return ""
    return (
        f"<details><summary>Other metrics, which decide nothing</summary><table><tbody>{rows}</tbody></table></details>"
    )


def _curves(curves: Curves) -> str:
    names = dict.fromkeys(name for runs in curves.values() for name in runs)
    colours = dict(zip(names, itertools.cycle(PALETTE)))
    drawn = [
        figure_of(
            html.escape(title),
            "by update",
            [Curve(colours[name], [x for x, _ in points], [y for _, y in points]) for name, points in runs.items()],
            markers=max(len(points) for points in runs.values()) < 30,
        )
        for title, runs in curves.items()
    ]
    if not drawn:
        return ""
    key = legend(colours)
    return f"{key}<div class='figures'>{''.join(drawn)}</div>"


def _warnings(verdict: Mapping[str, Any]) -> str:
    entries = [*verdict["tasks"], *verdict["fine_tuned"]]
    said = [(entry["name"], text) for entry in entries for text in entry["warnings"]]
    lines = [html.escape(note) for note in verdict["notes"]]
    lines += [f"<b>{html.escape(name)}</b>: {html.escape(text)}." for name, text in said]
    return f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>" if lines else ""


def _method(verdict: Mapping[str, Any]) -> str:
    method = verdict["method"]
    parts = [
        "Each model was asked with the prompt, of all templates and few-shot draws, that scored best with it on "
        "validation data; then both answered the same test items. "
        if verdict["tasks"]
        else "",
        f"Differences are resampled {method['resamples']:,} times with the same test items (or documents) for both "
        f"models (paired percentile bootstrap, seed {method['seed']}); a win or a loss is an interval of "
        f"{100 * method['confidence']:g} % that excludes 0. "
        "Percentages of wins, ties and losses count rows, however large the difference. After Jeong et al. 2024.",
    ]
    facts = "".join(
        f"<tr><th scope='row'>{html.escape(str(key).replace('_', ' '))}</th><td>{html.escape(str(value))}</td></tr>"
        for key, value in method.items()
    )
    return f"<p>{''.join(parts)}</p><details><summary>Every setting</summary><table>{facts}</table></details>"


def _prompts(entries: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{html.escape(entry['name'])} <small>{model}</small></th>"
        f"<td><code>{html.escape(prompt['template'])}</code></td><td>{prompt['draw']}</td>"
        f"<td>{100 * prompt['validation_score']:.1f} <small>of {100 * prompt['validation_scores']['lowest']:.1f} to "
        f"{100 * prompt['validation_scores']['highest']:.1f}, {prompt['tried']} tried</small></td></tr>"
        for entry in entries
        for model, prompt in entry["prompts"].items()
    )
    if not rows:
        return ""
    return f"""<table class="prompts"><thead><tr><th scope="col">Task</th><th scope="col">Template chosen</th>
<th scope="col">Draw</th><th scope="col">Validation score</th></tr></thead><tbody>{rows}</tbody></table>"""


_MORE_STYLE = """
body { max-width: 62rem; }
h1 small { font-size: .6em; font-weight: normal; color: var(--muted); }
small { color: var(--muted); }
td small { display: block; white-space: nowrap; }
.tally th { width: 14rem; } .tally th, .tally td { vertical-align: middle; } .tally tbody tr { border: 0; }
.forest, .picture { width: 14rem; padding: 0 .4rem; overflow: hidden; vertical-align: middle; }
.picture { width: 9rem; }
.compared td, .compared th { vertical-align: middle; }
.sides { display: flex; justify-content: space-between; font-size: .72rem; }
tfoot td { padding-top: 0; }
.compared .outcome { white-space: nowrap; text-align: left; padding-left: 1rem; }
.prompts td, .prompts th { text-align: left; } code { white-space: pre-wrap; font-size: .85em; }
ul { padding-left: 1.2rem; }
b { font-weight: 600; }
details { margin-top: 1rem; } details table td { text-align: right; }
@media (max-width: 48rem) { .picture { display: none; } .forest { width: 8rem; } .sides { font-size: .55rem; }
  .compared small, .compared .outcome { white-space: normal; } }
"""
