"""What the case study reports: every figure of every arm, wins and losses alike, as a page and as JSON."""

import dataclasses
import json
import statistics
from pathlib import Path

from study import ROOT, write_json

# isort: split
from common import RESULTS, environment  # study makes it findable
from meco_report import table

ARMS = ("base", "control", "adapted")
PAIRS = (("adapted", "base"), ("adapted", "control"), ("control", "base"))  # the first is asked whether it is better
PACKAGES = ("jax", "flax", "optax", "numpy", "sentencepiece", "scikit-learn", "rouge-score")
STAGES = {
    "data, token caches, TF-IDF": ("data", "prepare", "tf_idf"),
    "continued training": ("train-",),
    "fine-tuning on the labelled task": ("body_system-",),
    "fine-tuning on terms": ("terms-",),
    "comparisons": tuple(f"{ours}_vs_{theirs}" for ours, theirs in PAIRS),
}


def write_report(study, name, found, path):
    """The page at `path`; JSON goes among the results, or beside a page that is not the documentation's."""
    report = {
        "name": name,
        "environment": environment(*PACKAGES),
        "setting": dataclasses.asdict(study.setting),
        **{key: Path(getattr(study, key)).name for key in ("model", "domain", "general", "task")},
        "counts": {key: value for key, value in found["data"].items() if key != "seconds"},
        "tokens": {key: value for key, value in found["prepare"].items() if key != "seconds"},
        "training": {arm: found[f"train-{arm}"] for arm in ("control", "adapted")},
        "body_system": {arm: found[f"body_system-{arm}"]["scores"] for arm in ARMS},
        "tf_idf": {key: found["tf_idf"][key] for key in ("C", "scores")},
        "terms": {arm: found[f"terms-{arm}"]["scores"] for arm in ARMS},
        "comparisons": {_pair(*pair): _entries(found["_vs_".join(pair)]) for pair in PAIRS},
        "seen": _seen(study),
        "minutes": {
            stage: sum(result["seconds"] for job, result in found.items() if job.startswith(prefixes)) / 60
            for stage, prefixes in STAGES.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    is_documentation = path == (ROOT / "docs/case_study.md").resolve()
    write_json(RESULTS / "case_study.json" if is_documentation else path.with_suffix(".json"), report)
    path.write_text(page(report), encoding="utf-8")
    print(f"{tally(report)}\n\n{path}")
    print("\n".join(str(Path(study.work_dir, "verdicts", "_vs_".join(pair), "report.html")) for pair in PAIRS))


def _seen(study):
    """How many test items of the labelled task stand word for word in a training document of the domain."""

    def records(name, split):
        lines = Path(study.path("data", f"{name}.jsonl")).read_text(encoding="utf-8").split("\n")
        return [record for record in map(json.loads, filter(None, lines)) if record["split"] == split]

    read = {one["text"].removeprefix(f"{one['title']}. ").strip() for one in records("domain", "train")}
    asked = [item["text"].strip() for item in records("body_system", "test")]
    return {"items": len(asked), "in_training_text": sum(text in read for text in asked)}


def _pair(ours, theirs):
    return f"{ours} − {theirs}"


def _entries(result):
    """{what was measured: its comparison} of one pair of arms."""
    verdict = result["verdict"]
    return {
        **{f"{entry['role']} text, nats per token": entry for entry in verdict["perplexity"]},
        **{entry["name"].replace("_", " "): entry for entry in verdict["fine_tuned"]},
        **{f"terms {metric.replace('_', ' ')}": comparison for metric, comparison in result["terms"].items()},
    }


def signed(value, digits=4):
    return f"{value:+.{digits}f}".replace("-", "−")


def tally(report):
    """How often each pair's first arm wins, ties and loses, with what it loses by name."""
    lines = []
    for pair, entries in report["comparisons"].items():
        named = {
            outcome: [name for name, entry in entries.items() if entry["outcome"] == outcome]
            for outcome in ("win", "tie", "loss")
        }
        counts = f"{len(named['win'])} won, {len(named['tie'])} tied, {len(named['loss'])} lost"
        listed = "; ".join(f"{outcome}: {', '.join(names)}" for outcome, names in named.items() if names)
        lines.append(f"- **{pair}**: {counts} ({listed}).")
    return "\n".join(lines)


def comparisons(report):
    """Every comparison with its interval and p-value."""
    return table(
        ["measured", "pair", "before", "after", "difference", "95 % interval", "p", "outcome"],
        [
            [
                name,
                pair,
                f"{entry['base']:.4f}",
                f"{entry['adapted']:.4f}",
                signed(entry["difference"]),
                f"{signed(entry['low'])} to {signed(entry['high'])}",
                f"{entry['p_value']:.2g}",
                f"**{entry['outcome']}**",
            ]
            for name in next(iter(report["comparisons"].values()))
            for pair, entries in report["comparisons"].items()
            for entry in (entries[name],)
        ],
    )


def perplexities(report):
    """Perplexity by corpus and arm."""
    against_base, against_control = (report["comparisons"][_pair("adapted", other)] for other in ("base", "control"))
    rows = []
    for name, entry in against_base.items():
        if "perplexity" in entry:
            values = (entry["perplexity"]["base"], against_control[name]["perplexity"]["base"])
            shown = [f"{value:,.4g}" for value in (*values, entry["perplexity"]["adapted"])]
            rows.append([f"{entry['role']} ({entry['documents']} documents)", *shown])
    return table(["perplexity of hidden spans", *ARMS], rows)


def scores(report):
    """Both tasks by arm, means over seeds."""

    def row(task, metric):
        cells = []
        for arm in ARMS:
            values = report[task][arm][metric]["values"]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.4f}{spread}")
        lexical = f"{report['tf_idf']['scores'][metric]:.4f}" if task == "body_system" else "–"
        return [f"{task.replace('_', ' ')}, {metric.replace('_', ' ')}", *cells, lexical]

    rows = [row(task, metric) for task in ("body_system", "terms") for metric in report[task]["base"]]
    return table(["test items", *ARMS, "TF-IDF"], rows)


def page(report):
    setting, counts, versions, seen = (report[key] for key in ("setting", "counts", "environment", "seen"))
    inputs, targets = setting["lengths"]
    positions = setting["steps"] * setting["rows"] * (inputs + targets)
    minutes = table(
        ["stage", "minutes"],
        [
            *([stage, f"{value:.1f}"] for stage, value in report["minutes"].items()),
            ["all", f"{sum(report['minutes'].values()):.1f}"],
        ],
    )
    losses = ", ".join(
        f"{arm} {result['first_loss']:.2f} → {result['last_loss']:.2f}" for arm, result in report["training"].items()
    )
    smoke = "\n**A smoke test: its figures show nothing.**\n" if report["name"] == "smoke" else ""
    return f"""# A real model in a real domain
{smoke}
*Written by `benchmarks/studies/case_study.py`, setting {report["name"]}, on {versions["date"]}; no figure is left out.
Its head says how to run it; an interrupted study goes on with the same command.*

{report["model"]} goes on with UL2's denoisers for {setting["steps"]} steps, once on {report["domain"]} with a tenth of
{report["general"]} (adapted), once on {report["general"]} alone (control). A model that has lost denoising gains by any
continued training: of what adapted gains over base, the domain's share is what it gains over control.

{tally(report)}

## Held-out text

{perplexities(report)}

Span corruption after T5 without mode token, the same spans for all arms. In the domain lower is better than control;
on general text lower than base means that nothing was forgotten, and higher than control is the price of the domain.

## Tasks

{scores(report)}

Mean over seeds ± their standard deviation. Body system: {counts["body_system"].get("train", 0):,} definitions of
diseases without their names, a head on the encoder, {setting["seeds"]} seeds; TF-IDF with logistic regression
(C = {report["tf_idf"]["C"]:g}, chosen on validation items) reads the whole of the same definitions, the model their
first {setting["task_inputs"]} tokens. Terms: {counts["terms"]["train"]:,} definitions to learn from, one seed, the term
to be written.

## All comparisons

{comparisons(report)}

The outcome is that of the pair's first arm; a lower cost of text is a win. Paired bootstrap with
{setting["resamples"]:,} resamples of documents or items, on the labelled task of seeds as well; not corrected for the
number of comparisons.

## Setup

- Adafactor, learning rate {setting["learning_rate"]:g}, {setting["rows"]} rows of {inputs} and {targets} tokens, packed
  by first fit, `{setting["denoisers"]}`, {setting["dtype"]}: {positions:,} positions an arm. The training split has
  {report["tokens"]["domain"]:,} tokens of the domain and {report["tokens"]["general"]:,} of general text. Training loss
  from the first to the last logged step: {losses}.
- Fine-tuning: AdamW, peak {setting["task_learning_rate"]:g} with a linear decay, {setting["task_rows"]} rows,
  {setting["task_epochs"]:g} passes over the labelled task and {setting["term_epochs"]:g} over terms, the same for all
  arms.
- Domain: definitions of MONDO, CHEBI, GO, UBERON, CL (CC BY), EFO (Apache 2.0) and PATO. The documents that terms are
  taken from are in no training split. Of the labelled task's {seen["items"]:,} test items {seen["in_training_text"]:,}
  stand word for word, without their label, in a training document of the domain: another term has the same definition.
- {versions["cpu"]}, {versions["cores"]} cores; Python {versions["python"]},
  {", ".join(f"{name} {versions[name]}" for name in PACKAGES)}.

{minutes}

A stage that was interrupted counts from its last start.

## What this does not show

Continued training with one seed an arm: the intervals say nothing of how much another order of the data would change.
Training text holds the definitions of the labelled task's training items, with their names. Definitions of sibling
terms resemble one another, so some test items have near twins in training. Nothing follows for larger models or longer
runs.
"""
