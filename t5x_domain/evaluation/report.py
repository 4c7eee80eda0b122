"""report.html: what a run learned, on one page that needs neither network nor JavaScript."""

import html
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from t5x_domain.conversion.stores import absolute
from t5x_domain.errors import UserError
from t5x_domain.evaluation.figures import INK, figures
from t5x_domain.evaluation.fill import Blank, Filled
from t5x_domain.evaluation.perplexity import BINARY, PERPLEXITY, Measure, measures
from t5x_domain.files import write_atomically
from t5x_domain.training.metrics import read_json_lines

MEANING = {
    PERPLEXITY: "Perplexity is the exponential of the mean loss of a target token; bits per byte divide that loss by "
    "the corpus’s UTF-8 bytes per token, so that vocabularies can be compared; accuracy is the share of targets to "
    "which the model gave the largest probability.",
    BINARY: "Binary cross-entropy is the mean loss, in nats, of telling replaced tokens from original ones; accuracy "
    "is the share of tokens that were told rightly.",
}
# Middle tones, which stand out from white and from black paper alike.
PALETTE = ("#3b82c4", "#d9762b", "#2a9d78", "#a86bc4", "#c9485b", "#a08a1f", "#2f9fb3", "#8a6f5c")


def write_report(run_dir: epath.PathLike, *, filled: Sequence[Filled] = ()) -> epath.Path:
    """Writes `run_dir`/report.html, whole or not at all, from the files that a finished run leaves there.

    Args:
      run_dir: holds metrics.jsonl, evaluations.jsonl, eval.json, phases.json and config.gin.
      filled: documents whose blanks the model filled, see `evaluation.fill`.

    Returns:
      The path of the report.

    Raises:
      UserError: one of the files is missing or damaged.
    """
    folder = absolute(run_dir)
    summary = _read(folder / "eval.json", lambda path: json.loads(path.read_text(encoding="utf-8")))
    metrics = _read(folder / "metrics.jsonl", read_json_lines)
    evaluations = _read(folder / "evaluations.jsonl", read_json_lines)
    phases = _read(folder / "phases.json", lambda path: json.loads(path.read_text(encoding="utf-8")))
    config = _read(folder / "config.gin", lambda path: path.read_text(encoding="utf-8"))
    page = _page(folder.name, summary, metrics, evaluations, phases, config, filled)
    write_atomically(folder / "report.html", page.encode())
    return folder / "report.html"


def _read(path: epath.Path, reader: Callable[[epath.Path], Any]) -> Any:
    if not path.exists():
        raise UserError(
            f"{path} is missing; a run writes it by its last step, so start the same training command again."
        )
    try:
        return reader(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or train again in an empty directory.") from error


def _page(
    name: str,
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    phases: Sequence[Mapping[str, Any]],
    config: str,
    filled: Sequence[Filled],
) -> str:
    after = summary["after"]
    corpora = [key for key in after if key != "step"]
    colours = dict(zip(corpora, itertools.cycle(PALETTE))) if len(corpora) > 1 else dict.fromkeys(corpora, INK)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(name)} – training report</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="kicker">Training report</p>
<h1>{html.escape(name)}</h1>
<p class="headline">{_headline(summary, corpora)}</p>
<p class="facts">{_facts(after["step"], metrics)}</p>
</header>
<main>
<section>
<h2>Held-out text, before and after</h2>
{_table(summary, corpora)}
</section>
<section>
<h2>Training</h2>
{legend(({"all corpora": "currentColor"} if len(colours) > 1 else {}) | colours)}
<div class="figures">{figures(metrics, evaluations, colours)}</div>
</section>
<section>
<h2>What was seen</h2>
{_seen(phases, metrics)}
</section>
{_passages(filled)}
<section>
<h2>Configuration</h2>
<details><summary>Every value the run was made with</summary><pre>{html.escape(config)}</pre></details>
</section>
</main>
</body>
</html>
"""


def _headline(summary: Mapping[str, Any], corpora: Sequence[str]) -> str:
    first, *others = _measures(summary, corpora)
    clauses = []
    for corpus in corpora:
        before, after = summary["before"][corpus], summary["after"][corpus]
        more = ", ".join(f"{shown_number(after[measure.key])} {measure.name}" for measure in others)
        clauses.append(
            f"from {shown_number(before[first.key])} to <b>{shown_number(after[first.key])}</b> "
            f"on <em>{html.escape(corpus)}</em>{f' ({more})' if more else ''}"
        )
    listed = " and ".join([", ".join(clauses[:-1]), clauses[-1]] if clauses[1:] else clauses)
    return f"In {_updates(summary['after']['step'])}, held-out {first.name} went {listed}."


def _measures(summary: Mapping[str, Any], corpora: Sequence[str]) -> list[Measure]:
    return measures(summary["after"][corpora[0]])


def _facts(steps: int, metrics: Sequence[Mapping[str, Any]]) -> str:
    facts = [_updates(steps)]
    if metrics:
        rate = statistics.median(line["tokens_per_second"] for line in metrics)
        facts += [
            f"final training loss {shown_number(metrics[-1]['loss'])}",
            f"{rate:,.0f} tokens per second (median)",
            f"{_updates(metrics[-1]['skipped'])} skipped",
        ]
    return " · ".join(facts)


def _table(summary: Mapping[str, Any], corpora: Sequence[str]) -> str:
    found = _measures(summary, corpora)
    columns = {measure.key: shown_number for measure in found} | {"accuracy": lambda share: f"{share:.1%}"}
    rows = []
    for corpus in corpora:
        before, after = summary["before"][corpus], summary["after"][corpus]
        cells = "".join(
            f"<td><span>{show(before[key])}&nbsp;→</span> <b>{show(after[key])}</b></td>"
            for key, show in columns.items()
        )
        name = f"{html.escape(corpus)} <small>{after['targets']:,} targets</small>"
        rows.append(f"<tr><th scope='row'>{name}</th>{cells}</tr>")
    titles = [*(measure.name.capitalize() for measure in found), "Accuracy"]
    head = "".join(f'<th scope="col">{title}</th>' for title in ("Corpus", *titles))
    return f"""<table>
<thead><tr>{head}</tr></thead>
<tbody>{"".join(rows)}</tbody>
</table>
<p class="note">Update {summary["before"]["step"]:,} → update {summary["after"]["step"]:,}. {MEANING[found[0]]}</p>"""


def _seen(phases: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> str:
    """Share of the text of each corpus and denoiser, by phase, and its training loss at the end."""
    last = metrics[-max(len(metrics) // 10, 1) :]
    columns = "".join(f"<th scope='col'>{html.escape(phase['name'])}</th>" for phase in phases)
    rows = []
    for group, losses in (("corpora", "corpus_loss"), ("denoisers", "denoiser_loss")):
        for name in dict.fromkeys(name for phase in phases for name in phase[group]):
            shares = "".join(f"<td>{phase[group].get(name, 0):.1%}</td>" for phase in phases)
            known = [line[losses][name] for line in last if line[losses].get(name) is not None]
            loss = shown_number(statistics.mean(known)) if known else "–"
            rows.append(f"<tr><th scope='row'>{html.escape(name)}</th>{shares}<td><b>{loss}</b></td></tr>")
    spans = "; ".join(
        f"{html.escape(phase['name'])}: updates {phase['start'] + 1:,} to {phase['stop']:,}, "
        f"{phase['raw_tokens']:,} tokens of text"
        for phase in phases
    )
    return f"""<table>
<thead><tr><th scope="col">Share of the text</th>{columns}<th scope="col">Loss</th></tr></thead>
<tbody>{"".join(rows)}</tbody>
</table>
<p class="note">{spans}. The loss is the training loss by target over the last tenth of the logged updates.</p>"""


def legend(colours: Mapping[str, str]) -> str:
    """What each colour of a figure stands for; nothing if there is one."""
    if len(colours) == 1:
        return ""
    return "<p class='legend'>{}</p>".format(
        " ".join(
            f"<span><i style='background:{colour}'></i>{html.escape(name)}</span>" for name, colour in colours.items()
        )
    )


def _passages(filled: Sequence[Filled]) -> str:
    if not filled:
        return ""
    blanks = [blank for document in filled for blank in document.blanks]
    texts = []
    for document in filled:
        parts = [html.escape(document.pieces[0])]
        for blank, piece in zip(document.blanks, document.pieces[1:], strict=True):
            parts += [_blank(blank), html.escape(piece)]
        texts.append(f"<blockquote>{''.join(parts)}</blockquote>")
    return f"""<section>
<h2>Filling in the blanks</h2>
<p>Held-out passages with spans taken out. The model wrote {sum(blank.correct for blank in blanks):,} of
{len(blanks):,} spans <mark class="same">exactly as the author did</mark>; where it wrote
<mark class="other">something else</mark>, <ins>the original</ins> follows.</p>
{"".join(texts)}
</section>"""


def _blank(blank: Blank) -> str:
    shown = blank.written.lstrip()
    space = blank.written[: len(blank.written) - len(shown)]
    if blank.correct:
        return f"{space}<mark class='same'>{html.escape(shown)}</mark>"
    written, original = html.escape(shown) or "<i>nothing</i>", html.escape(blank.original.strip())
    return f"{space or ' '}<mark class='other'>{written}</mark> <ins>{original}</ins>"


def shown_number(value: float) -> str:
    """With as many digits as a reader needs."""
    if value >= 1e7:
        return f"{value:.2e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _updates(count: int) -> str:
    return f"{count:,} update{'' if count == 1 else 's'}"


STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfb; --ink: #1d1f21; --muted: #6a6d70; --rule: #d9d9d4;
  --same: #cdeccf; --same-line: #2e8b3d; --other: #fbe3b3; --other-line: #b97a00; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17181a; --ink: #e4e4e0; --muted: #9a9da1; --rule: #38393c;
    --same: #1f4527; --same-line: #5fbf70; --other: #4f3a0d; --other-line: #e0a733; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 1.25rem 4rem; max-width: 54rem; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.6 Charter, "Bitstream Charter", "Iowan Old Style", Georgia, serif; }
.kicker, .facts, .note, .legend, table, figcaption, svg text, summary {
  font-family: system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif !important; }
.kicker { margin: 0; font-size: .8rem; letter-spacing: .08em; text-transform: uppercase; color: var(--muted); }
h1 { margin: .2rem 0 1rem; font-size: 2.2rem; line-height: 1.15; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--rule); font-size: 1.3rem; line-height: 1.3; }
.headline { margin: 0 0 .8rem; font-size: 1.3rem; line-height: 1.5; }
.facts, .note { font-size: .85rem; color: var(--muted); }
table { width: 100%; border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .4rem; text-align: right; font-weight: normal; vertical-align: baseline; }
th:first-child { min-width: 6.5em; padding-left: 0; text-align: left; overflow-wrap: anywhere; }
th small { display: block; white-space: nowrap; color: var(--muted); }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--muted); font-size: .8rem; border-bottom: 1px solid var(--ink); }
tbody tr { border-bottom: 1px solid var(--rule); }
td span { color: var(--muted); }
td b, td span { white-space: nowrap; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 0 0 1rem; font-size: .85rem; }
.legend i { display: inline-block; width: 1.2em; height: 3px; margin-right: .45em; vertical-align: .25em; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1.6rem 2rem; }
figure { margin: 0; break-inside: avoid; }
figcaption { font-size: .8rem; color: var(--muted); }
figcaption b { display: block; font-size: .9rem; color: var(--ink); }
svg { display: block; width: 100%; height: auto; }
blockquote { margin: 1.2rem 0; padding-left: 1rem; border-left: 3px solid var(--rule); white-space: pre-wrap;
  overflow-wrap: anywhere; line-height: 1.75; }
mark { padding: .05em .2em; border-radius: 3px; color: inherit; background: var(--same);
  border-bottom: 2px solid var(--same-line); -webkit-print-color-adjust: exact; print-color-adjust: exact; }
mark.other { background: var(--other); border-bottom: 2px dashed var(--other-line); }
ins { color: var(--muted); font-style: italic; text-decoration: none; }
ins::before { content: "["; } ins::after { content: "]"; }
summary { cursor: pointer; font-size: .9rem; }
pre { overflow-x: auto; font-size: .78rem; line-height: 1.45; }
@media (max-width: 34rem) { body { padding-top: 1.5rem; } h1 { font-size: 1.7rem; } .headline { font-size: 1.12rem; }
  table { font-size: .8rem; } thead th { font-size: .7rem; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } h2 { break-after: avoid; }
  blockquote, tr { break-inside: avoid; } }
"""
