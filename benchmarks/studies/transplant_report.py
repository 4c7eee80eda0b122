"""What the study of vocabularies reports: bits per byte by step and arm, the differences, a page and a figure."""

import dataclasses
import statistics
from pathlib import Path

import matplotlib
from study import ROOT, interval, paired, shown, verdict, write_json

# isort: split
from common import RESULTS, environment  # study makes it findable
from meco_report import table

from t5x_domain.errors import UserError

ARMS = {"old": "old vocabulary", "mean": "new vocabulary, means", "random": "new vocabulary, random"}
COLOURS = {"old": "#3b82c4", "mean": "#2a9d78", "random": "#d9762b"}
PACKAGES = ("jax", "flax", "optax", "numpy", "sentencepiece")


def write_report(study, name, prepared, results):
    """JSON, page and figure; `results` is {(arm, seed): result}."""
    seeds = sorted({seed for _, seed in results if all((arm, seed) in results for arm in ARMS)})
    if not seeds:
        raise UserError(f"{study.work_dir} holds no seed with all arms yet; run the study without --report_only.")
    steps = study.setting.scored
    bits = {arm: [{seed: results[arm, seed]["curve"][str(step)] for seed in seeds} for step in steps] for arm in ARMS}
    report = {
        "name": name,
        "environment": environment(*PACKAGES),
        "setting": dataclasses.asdict(study.setting),
        "model": Path(study.model).name,
        "corpus": Path(study.corpus_file).name,
        "seeds": seeds,
        "held_out_documents": len(prepared["held_out"]),
        **{key: prepared[key] for key in ("unknown", "bytes_per_token", "copied", "averaged", "hidden")},
        "parameters": {arm: results[arm, seeds[0]]["parameters"] for arm in ARMS},
        "seconds": {arm: statistics.fmean(results[arm, seed]["seconds"] for seed in seeds) for arm in ARMS},
        "bits_per_byte": {arm: [interval(values.values()) for values in bits[arm]] for arm in ARMS},
        "differences": {
            f"mean - {other}": [paired(*pair) for pair in zip(bits["mean"], bits[other], strict=True)]
            for other in ("random", "old")
        },
    }
    # A smoke test is no result.
    results_dir, docs = (Path(study.work_dir),) * 2 if name == "smoke" else (RESULTS, ROOT / "docs/studies")
    write_json(results_dir / "transplant.json", report)
    draw(report, docs / "transplant.svg")
    (docs / "transplant.md").write_text(page(report), encoding="utf-8")
    print(curves(report))
    print(docs / "transplant.md")


def curves(report):
    differences = report["differences"]
    return table(
        ["steps", *ARMS.values(), "means − random", "means − old"],
        [
            [
                str(step),
                *(shown(report["bits_per_byte"][arm][i]) for arm in ARMS),
                *(shown(differences[key][i], signed=True) for key in differences),
            ]
            for i, step in enumerate(report["setting"]["scored"])
        ],
    )


def draw(report, path):
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "transplant", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for arm, label in ARMS.items():
        means = [value["mean"] for value in report["bits_per_byte"][arm]]
        axes.plot(report["setting"]["scored"], means, marker="o", markersize=3, color=COLOURS[arm], label=label)
    axes.set(title="Held-out hidden words, by step", xlabel="step", ylabel="bits per byte", yscale="log")
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", which="both", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def page(report):
    setting, versions = report["setting"], report["environment"]
    size, hidden, last = report["bytes_per_token"], report["hidden"], setting["scored"][-1]
    verdicts = "\n".join(
        f"- {statement}: **{verdict(difference, expected_sign=-1)}** after {last} steps "
        f"({shown(difference, signed=True)} bits per byte)."
        for statement, difference in (
            ("Rows made of old ones are better than random ones", report["differences"]["mean - random"][-1]),
            ("The new vocabulary is better than the old one", report["differences"]["mean - old"][-1]),
        )
    )
    seconds = ", ".join(f"{value:.0f} s ({arm})" for arm, value in report["seconds"].items())
    return f"""# A domain's own vocabulary in a finished model

*Written by `benchmarks/studies/transplant.py` on {versions["date"]}; all figures are in `benchmarks/results/`.*

{report["model"]} goes on with span corruption on {report["corpus"]}, with its own vocabulary or with
{setting["pieces"]:,} pieces learnt from the corpus. {report["copied"]:,} of the new ids take over an old row;
{report["averaged"]:,} begin as means of the old pieces of their text, or as random rows, the control.

{verdicts}

![Bits per byte by step](transplant.svg)

{curves(report)}

Bits for each UTF-8 byte of the hidden words, mean over {len(report["seeds"])} seed(s); ± is half of the 95 % confidence
interval after Student, differences are paired by seed. They hold, or are reversed, if that interval excludes 0.

## Setup

- {report["held_out_documents"]} held-out documents of {hidden["words"][0]} to {hidden["words"][1]} words. Of every
  {hidden["block"]} words {hidden["span"]} in a row are hidden, the same ones in all arms. What the model spends on
  writing them, sentinels and EOS included, is divided by their bytes. Documents that the old vocabulary cannot write
  are left out here; they are {report["unknown"]:.1%} of all.
- A token stands for {size["old"]:.2f} bytes of these documents in the old vocabulary and for {size["mean"]:.2f} in the
  new one. A step has {setting["rows"]} rows of {setting["inputs"]} tokens in all arms, so the new vocabulary sees about
  {size["mean"] / size["old"]:.2f} times the text.
- {report["parameters"]["old"] / 1e6:.1f} million parameters with the old vocabulary,
  {report["parameters"]["mean"] / 1e6:.1f} million with the new one; a run takes {seconds} on one core.
- Adafactor, learning rate {setting["learning_rate"]:g} after 10 steps of warm-up, no dropout. A seed decides the
  order of the data and the random rows.
- {versions["cpu"]}, {versions["cores"]} cores; Python {versions["python"]},
  {", ".join(f"{name} {versions[name]}" for name in PACKAGES)}.

## What this does not show

Nothing about downstream tasks, large models or long training, in which the beginning of a row is forgotten.
"""
