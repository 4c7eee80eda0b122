"""What the study of long rows reports: time and memory by length, held-out loss by length, a page and a figure."""

import dataclasses
import itertools
import statistics
from pathlib import Path

import matplotlib
import numpy as np
from study import ROOT, interval, paired, shown, verdict, write_json

# isort: split
from common import RESULTS, environment  # study makes it findable
from meco_report import table

# Kinds of attention, by what they set in ModelConfig.
_WINDOW = {"layer_pattern": ("local",), "local_window": 128}
KINDS = {
    "window": _WINDOW,
    "blocks": {**_WINDOW, "global_tokens": 1, "global_blocks": "transient", "global_block_size": 16},
    "full": {},
}
COLOURS = {"window": "#2a9d78", "blocks": "#3b82c4", "full": "#d9762b"}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def arm_name(kind, length, seed):
    return f"{kind}-{length}-seed{seed}"


def write_report(study, name, results):
    """JSON, page and figure of the results of all jobs, {name: result}."""
    report = {
        "name": name,
        "environment": environment(*PACKAGES),
        "setting": dataclasses.asdict(study.setting),
        "corpora": results["prepare"]["corpora"],
        "parameters": next(result["parameters"] for result in results.values() if "parameters" in result),
        "cost": costs(study.setting, results),
        "loss": losses(study, results),
        "train_seconds": {n: result["train_seconds"] for n, result in results.items() if "train_seconds" in result},
    }
    # A smoke test is no result.
    results_dir, docs = (Path(study.work_dir),) * 2 if name == "smoke" else (RESULTS, ROOT / "docs/studies")
    write_json(results_dir / "long.json", report)
    draw(report, docs / "long.svg")
    (docs / "long.md").write_text(page(report), encoding="utf-8")
    print(docs / "long.md")


def costs(setting, results):
    """Medians over rounds, by kind and length, and each kind's slope of log seconds over log length."""
    lengths = setting.cost_lengths
    seconds = {kind: [results[f"cost-{n}"]["step_seconds"][kind] for n in lengths] for kind in KINDS}
    medians = {kind: [statistics.median(rounds) for rounds in of] for kind, of in seconds.items()}
    slope = lambda values: float(np.polyfit(np.log(lengths), np.log(values), 1)[0])  # noqa: E731
    return {
        "lengths": lengths,
        "seconds": medians,
        "rounds": seconds,
        "times_window": {
            kind: [
                statistics.median(a / b for a, b in zip(*pair, strict=True))
                for pair in zip(seconds[kind], seconds["window"], strict=True)
            ]
            for kind in KINDS
        },
        "slope": {kind: slope(values) for kind, values in medians.items()},
        "last_slope": {
            kind: float(np.log(values[-1] / values[-2]) / np.log(lengths[-1] / lengths[-2]))
            for kind, values in medians.items()
        },
        "temporary_bytes": {kind: [results[f"cost-{n}"]["temporary_bytes"][kind] for n in lengths] for kind in KINDS},
    }


def losses(study, results):
    """By corpus and kind: nats a masked token, and differences between rows, or contexts, that are paired by document.

    A document's value is the mean over seeds, so intervals are over documents.
    """
    setting = study.setting
    shortest, longest = min(setting.lengths), max(setting.lengths)

    def values(corpus, kind, length, context):
        seeds = [results[arm_name(kind, length, seed)]["losses"][corpus][str(context)] for seed in range(setting.seeds)]
        return dict(enumerate(map(statistics.fmean, zip(*seeds, strict=True))))

    report = {}
    for corpus, kind in itertools.product(study.files, setting.kinds):
        own = {length: values(corpus, kind, length, length) for length in setting.lengths}
        contexts = {context: values(corpus, kind, longest, context) for context in setting.lengths}
        report.setdefault(corpus, {})[kind] = {
            "by_length": {length: interval(own[length].values()) for length in setting.lengths},
            "minus_shortest": {n: paired(own[n], own[shortest]) for n in setting.lengths if n != shortest},
            "less_context": {n: paired(contexts[n], contexts[longest]) for n in setting.lengths if n != longest},
        }
    return report


def draw(report, path):
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "long", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    cost = report["cost"]
    for kind, colour in COLOURS.items():
        label = f"{kind}: slope {cost['slope'][kind]:.2f}, at the end {cost['last_slope'][kind]:.2f}"
        left.plot(cost["lengths"], cost["seconds"][kind], marker="o", markersize=3, color=colour, label=label)
    left.set(title="A train step on one row", xlabel="tokens", ylabel="seconds", xscale="log", yscale="log")
    left.set_xticks(cost["lengths"], [f"{n:,}" for n in cost["lengths"]], rotation=30)
    left.minorticks_off()
    for (corpus, kinds), style in zip(report["loss"].items(), ("-", "--"), strict=True):
        for kind, of in kinds.items():
            shown_of = [of["minus_shortest"][n] for n in of["minus_shortest"]]
            lengths, means = [min(of["by_length"]), *of["minus_shortest"]], [0.0, *(d["mean"] for d in shown_of)]
            errors = [0.0, *(d["high"] - d["mean"] for d in shown_of)]
            right.errorbar(
                lengths, means, errors, capsize=3, color=COLOURS[kind], linestyle=style, label=f"{corpus}, {kind}"
            )
    right.set(title="Held-out loss, from the shortest rows'", xlabel="tokens in a row", ylabel="nats", xscale="log")
    right.set_xticks(lengths, [f"{n:,}" for n in lengths])
    right.minorticks_off()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def cost_table(cost):
    return table(
        ["tokens", *(f"{kind}, s" for kind in KINDS), "blocks / window", "full / window", "MiB: " + " / ".join(KINDS)],
        [
            [
                f"{length:,}",
                *(f"{cost['seconds'][kind][i]:.3g}" for kind in KINDS),
                *(f"{cost['times_window'][kind][i]:.2f}" for kind in ("blocks", "full")),
                " / ".join(f"{cost['temporary_bytes'][kind][i] / 2**20:,.0f}" for kind in KINDS),
            ]
            for i, length in enumerate(cost["lengths"])
        ],
    )


def loss_table(loss, lengths):
    def cells(of, n):
        longer = [verdict(of["minus_shortest"][n], expected_sign=-1)] if n in of["minus_shortest"] else [""]
        differences = [of[key].get(n) for key in ("minus_shortest", "less_context")]
        return [shown(of["by_length"][n]), *(shown(d, 4, signed=True) if d else "" for d in differences), *longer]

    return table(
        [
            "corpus, attention, tokens in a row",
            "nats",
            "− shortest rows",
            "longest rows, so much context",
            "longer",
        ],
        [
            [f"{corpus}, {kind}, {n:,}", *cells(of, n)]
            for corpus, kinds in loss.items()
            for kind, of in kinds.items()
            for n in lengths
        ],
    )


def page(report):
    setting, versions, cost = report["setting"], report["environment"], report["cost"]
    slopes = ", ".join(f"{cost['slope'][kind]:.2f} ({kind})" for kind in KINDS)
    last = ", ".join(f"{cost['last_slope'][kind]:.2f} ({kind})" for kind in KINDS)
    corpora = "; ".join(
        f"{name}: {of['train']['documents']} documents of {of['train']['tokens']:,} tokens to learn from, "
        f"{of['validation']['documents']} held out"
        for name, of in report["corpora"].items()
    )
    documents = ", ".join(
        f"{next(iter(next(iter(kinds.values()))['by_length'].values()))['n']} ({corpus})"
        for corpus, kinds in report["loss"].items()
    )
    rows = ", ".join(f"{setting['tokens'] // n} x {n:,}" for n in setting["lengths"])
    return f"""# Long documents: what longer rows cost, and what they bring

*Written by `benchmarks/studies/long.py`, setting {report["name"]}, on {versions["date"]}; all figures are in
`benchmarks/results/`.*

![Time of a step and held-out loss by length](long.svg)

## Cost

{cost_table(cost)}

Median seconds of a train step (forward, backward, update) on one row, ratios within rounds, and the temporary arrays
that the step is compiled for. Slopes of log time over log length: {slopes}; between the last two lengths: {last}. A
slope of 1 is linear, 2 quadratic.

## Held-out loss

{loss_table(report["loss"], setting["lengths"])}

Nats a masked token, mean over documents ({documents}); ± is half of the 95 % confidence interval after Student. The
third column is paired by document with the rows of {min(setting["lengths"])} tokens. The fourth asks the model of the
longest rows with less text on the left, minus the same model with all of it: above 0, it uses what stands that far off.
"Longer" holds, or is reversed, if the interval of the third column excludes 0.

## Setup

- One encoder of {report["parameters"] / 1e6:.1f} million parameters: {setting["layers"]} layers of width
  {setting["embed_dim"]}, {setting["heads"]} heads, T5's bias, {setting["dtype"]}, nothing recomputed (`remat` "none").
  "window" is 128 tokens on either side, so that {setting["layers"]} layers see {128 * setting["layers"]:,} on either
  side at most; "blocks" adds the first token and the sums of each 16 tokens (LongT5's transient tokens), which all see.
- {corpora}. Books are parts of Austen's novels, Moby Dick and the King James Bible, so other parts of the same books
  are learnt from.
- {setting["steps"]} steps of {setting["tokens"]:,} tokens, as rows x tokens: {rows}. Masked language modeling with
  BERT's shares; Adafactor, {setting["seeds"]} seed(s).
- {versions["cpu"]}, {versions["cores"]} cores; Python {versions["python"]},
  {", ".join(f"{package} {versions[package]}" for package in PACKAGES)}.

## What this does not show

Nothing about models that are trained for long: a small one that has read little learns mostly from near words, and what
is far off may begin to pay later. Intervals are over documents, not over what another seed would learn.
"""
