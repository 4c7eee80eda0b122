"""What the miniature of MeCo reports: losses behind tags over seeds, the verdict on each claim, a page and a figure."""

import dataclasses
import statistics
from pathlib import Path
from types import SimpleNamespace

import matplotlib
from study import ROOT, interval, kept, paired, shown, verdict, write_json

# isort: split
from common import RESULTS, environment  # study makes it findable

from t5x_domain.errors import UserError

COOLDOWN = 0.1  # share of the steps
ARMS = ("plain", "cooldown", "no_cooldown")
# A disadvantage below this share of the plain arm's loss is too small to matter; fixed before anything was measured.
NEGLIGIBLE = 0.01


def condition_losses(result):
    """Nats per target under each condition, the mean of all sources; 'wrong' is the mean of all other tags."""
    loss, corpus_of = result["loss"], result["corpus_of"]
    sources = list(corpus_of)

    def mean(tags):
        per_source = [[loss[tag][source] for tag in tags(source)] for source in sources]
        return statistics.fmean(statistics.fmean(values) for values in per_source if values)

    def others(source, same):
        return [tag for tag in sources if tag != source and (corpus_of[tag] == corpus_of[source]) in same]

    return {
        "none": mean(lambda source: ["none"]),
        "right": mean(lambda source: [source]),
        "wrong": mean(lambda source: others(source, (True, False))),
        "wrong, same corpus": mean(lambda source: others(source, (True,))),
        "wrong, other corpus": mean(lambda source: others(source, (False,))),
    }


# (name, claim it belongs to, (arm, condition) minus (arm, condition))
COMPARISONS = (
    ("cooldown − plain, no tag", "i", ("cooldown", "none"), ("plain", "none")),
    ("cooldown: right − wrong tag", "ii", ("cooldown", "right"), ("cooldown", "wrong")),
    ("cooldown: right − wrong, same corpus", None, ("cooldown", "right"), ("cooldown", "wrong, same corpus")),
    ("cooldown: right − wrong, other corpus", None, ("cooldown", "right"), ("cooldown", "wrong, other corpus")),
    ("cooldown: right − no tag", None, ("cooldown", "right"), ("cooldown", "none")),
    ("no cooldown: right − wrong tag", "ii", ("no_cooldown", "right"), ("no_cooldown", "wrong")),
    ("no cooldown: right − no tag", None, ("no_cooldown", "right"), ("no_cooldown", "none")),
    ("plain: right − no tag", None, ("plain", "right"), ("plain", "none")),
    ("cooldown with the right tag − plain without", None, ("cooldown", "right"), ("plain", "none")),
    ("no cooldown − cooldown, no tag", "iii", ("no_cooldown", "none"), ("cooldown", "none")),
    ("no cooldown − plain, no tag", "iii", ("no_cooldown", "none"), ("plain", "none")),
)
CLAIMS = {
    "i": "without a tag, the cooldown arm is as good as the plain one",
    "ii": "the right tag helps against a wrong one",
    "iii": "without the cooldown, text without a tag is modelled worse",
}


def analyse(results):
    """Everything the report says of a model; `results` is {arm: {seed: result}}."""
    seeds = sorted(set.intersection(*(set(results[arm]) for arm in ARMS)))
    losses = {arm: {seed: condition_losses(results[arm][seed]) for seed in seeds} for arm in ARMS}

    def by_seed(arm, condition):
        return {seed: losses[arm][seed][condition] for seed in seeds}

    one = results["plain"][seeds[0]]
    plain = list(by_seed("plain", "none").values())
    comparisons = []
    for name, claim_id, ours, theirs in COMPARISONS:
        difference = paired(by_seed(*ours), by_seed(*theirs))
        entry = {"name": name, "claim": claim_id, "difference": difference}
        if claim_id == "i":
            entry["verdict"] = within_noise(difference, statistics.fmean(plain))
        elif claim_id:
            found = verdict(difference, expected_sign=-1 if claim_id == "ii" else 1)
            entry["verdict"] = {"reversed": "does not hold"}.get(found, found)
        comparisons.append(entry)
    return {
        "seeds": seeds,
        "device": one["device"],
        "parameters": one["parameters"],
        "text_tokens": {arm: statistics.fmean(results[arm][seed]["text_tokens"] for seed in seeds) for arm in ARMS},
        "held_out_targets": one["targets"],
        "spread_of_plain": statistics.stdev(plain) if len(plain) > 1 else None,
        "conditions": {
            arm: {name: interval(by_seed(arm, name).values()) for name in losses[arm][seeds[0]]} for arm in ARMS
        },
        "comparisons": comparisons,
        "by_source": {arm: by_source([results[arm][seed]["loss"] for seed in seeds]) for arm in ARMS},
        "curves": {
            arm: {
                int(step): interval([results[arm][seed]["curve"][step] for seed in seeds])
                for step in results[arm][seeds[0]]["curve"]
            }
            for arm in ARMS
        },
        "feed": {
            condition: statistics.fmean(
                loss for seed in seeds for loss in results["cooldown"][seed]["feed"][condition].values()
            )
            for condition in ("none", "right")
        },
        "seconds": sum(results[arm][seed]["seconds"] for arm in ARMS for seed in seeds),
    }


def by_source(losses):
    """{source: {condition: mean over seeds}}; `losses` are {tag: {source: loss}}."""
    sources = list(losses[0]["none"])
    return {
        source: {
            "none": statistics.fmean(loss["none"][source] for loss in losses),
            "right": statistics.fmean(loss[source][source] for loss in losses),
            "wrong": statistics.fmean(loss[tag][source] for loss in losses for tag in sources if tag != source),
        }
        for source in sources
    }


def within_noise(difference, loss):
    """Whether a difference to a plain `loss` is shown to be no disadvantage that matters."""
    if difference["low"] is None:
        return "not resolved"
    if difference["low"] > 0:
        return "does not hold"
    return "holds" if difference["high"] < NEGLIGIBLE * loss else "not resolved"


COLOURS = {"plain": "#3b82c4", "cooldown": "#2a9d78", "no_cooldown": "#d9762b"}
LABELS = {"plain": "plain", "cooldown": "metadata, cooldown", "no_cooldown": "metadata, no cooldown"}
MODELS = {
    "decoder_only": "decoder-only, causal language modeling (the paper's form)",
    "encoder_decoder": "encoder-decoder, T5's span corruption",
}
TITLE = "MeCo in miniature: metadata with a cooldown, on real text"


def draw(analysis, setting, path):
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "meco", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for arm, curve in analysis["curves"].items():
        steps = [step for step in curve if step >= setting.steps // 5]
        means = [curve[step]["mean"] for step in steps]
        left.plot(steps, means, marker="o", markersize=3, color=COLOURS[arm], label=LABELS[arm])
    left.axvspan((1 - COOLDOWN) * setting.steps, setting.steps, color="#888888", alpha=0.2, lw=0, label="cooldown")
    left.set(title="Held-out text without tags, by step", xlabel="step", ylabel="nats per target")
    left.legend(frameon=False)
    conditions = ("right", "none", "wrong")
    for number, arm in enumerate(ARMS):
        found = [analysis["conditions"][arm][condition] for condition in conditions]
        errors = [0.0 if value["low"] is None else value["high"] - value["mean"] for value in found]
        places = [place + (number - 1) * 0.15 for place in range(len(conditions))]
        means = [value["mean"] for value in found]
        right.errorbar(places, means, errors, fmt="o", capsize=3, color=COLOURS[arm])
    right.set_xticks(range(len(conditions)), [f"{condition} tag".replace("none", "no") for condition in conditions])
    right.set(title="Held-out text behind a tag, at the end", ylabel="nats per target")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def model_section(model, analysis, rows, setting):
    text, seeds = analysis["text_tokens"], len(analysis["seeds"])
    compared = table(
        ["nats per target, over seeds", "difference", "claim", "at this size"],
        [
            [
                comparison["name"],
                shown(comparison["difference"], 4, signed=True),
                comparison["claim"] or "",
                f"**{comparison['verdict']}**" if comparison["claim"] else "",
            ]
            for comparison in analysis["comparisons"]
        ],
    )
    names = list(analysis["conditions"]["plain"])
    conditions = table(
        ["loss behind tag:", *names, "text tokens seen", "rows a batch"],
        [
            [
                LABELS[arm],
                *(f"{analysis['conditions'][arm][name]['mean']:.4f}" for name in names),
                f"{text[arm]:,.0f} ({text[arm] / text['plain'] - 1:+.1%})".replace("-", "−"),
                str(rows[arm]),
            ]
            for arm in ARMS
        ],
    )
    by_source = table(
        ["source", *(f"{LABELS[arm]}: {name}" for arm in ARMS[1:] for name in ("right", "no", "wrong"))],
        [
            [
                source,
                *(
                    f"{analysis['by_source'][arm][source][name]:.3f}"
                    for arm in ARMS[1:]
                    for name in ("right", "none", "wrong")
                ),
            ]
            for source in analysis["by_source"]["plain"]
        ],
    )
    noise = ""
    if analysis["spread_of_plain"] is not None:
        noise = (
            " The plain arm's\nloss without a tag varies from seed to seed with a standard deviation of "
            f"{analysis['spread_of_plain']:.4f}."
        )
    feed = analysis["feed"]
    return f"""## {MODELS[model][0].upper()}{MODELS[model][1:]}

{analysis["parameters"]:,} parameters, {setting.steps:,} steps, {seeds} seed{"s" * (seeds > 1)} of each arm; \
{analysis["device"]}, {analysis["seconds"] / 60:.0f} minutes for all runs if done one by one.

{compared}

Differences are paired by seed; ± is half of the 95 % confidence interval after Student.{noise}

{conditions}

Means of the sources, then of the seeds. By source:

{by_source}

On all held-out text, as `Feed.held_out` packs and cuts it, the cooldown arm has {feed["none"]:.4f} without tags and
{feed["right"]:.4f} with every document's own (mean of the corpora)."""


def page(report, figure):
    setting, versions = report["setting"], report["environment"]
    sources = ", ".join(next(iter(report["models"].values()))["held_out_targets"])
    sections = "\n\n".join(
        model_section(model, analysis, report["rows"][model], SimpleNamespace(**setting))
        for model, analysis in report["models"].items()
    )
    claims = "\n".join(f"- ({number}) {text}" for number, text in CLAIMS.items())
    main = MODELS[next(iter(report["models"]))]
    return f"""# {TITLE}

*Written by `benchmarks/studies/meco.py` on {versions["date"]}; all figures are in `benchmarks/results/`. Do not edit.*

Metadata conditioning (Gao et al. 2025, [arXiv:2501.01956](https://arxiv.org/abs/2501.01956)) puts a document's source
before it, leaves it out of the loss, and ends training with a stretch without it, the cooldown. The paper measures
downstream tasks of models of 600 million to 8 billion parameters. Here the mechanism is looked at in models that two
cores train, by the loss of held-out text. Three claims, and below what this size says of them:

{claims}

![Left: loss by step; right: loss behind a tag]({figure})

*{main[0].upper()}{main[1:]}. Left: means over seeds. Right: means over seeds with 95 % confidence intervals; the arms
share their seeds, so the paired differences below are known better than these bars suggest.*

## Setup

- Text: {", ".join(report["files"])}; equal shares of both corpora. The tag is `Source: {{source}}`, one of {sources}.
- `plain` never sees a tag; `metadata, cooldown` sees one before every document in the first {100 * (1 - COOLDOWN):g} %
  of the steps and none afterwards, while schedule, optimizer and data go on; `metadata, no cooldown` sees one always.
- Equal steps, and equal text: tags take room, so the plain arm has fewer rows in a batch, as many as hold the same
  text. What each arm has seen is in the tables.
- Rows of {setting["length"]} tokens packed by first fit, attention within documents; a vocabulary of
  {setting["vocabulary"]:,} pieces trained on the corpora. It drops the line ends of the tag, as it does all others.
- Adafactor, learning rate {setting["peak"]} after a short warm-up, then a cosine down to a tenth of it, so that
  the cooldown still learns something.
- {setting["held_out"]:,} held-out tokens of each source. Every tag is tried on the same pieces in the same rows;
  `wrong` is the mean of all other sources' tags.
- (i) holds if the 95 % confidence interval of the difference reaches to 0 or below and its upper end is under
  {100 * NEGLIGIBLE:g} % of the plain arm's loss; it does not hold if the interval lies above 0. (ii) and (iii) hold if
  the interval excludes 0 on the claimed side, and do not hold if it does so on the other. Everything else is not
  resolved. These rules were written before the runs.
- {versions["cpu"]}, {versions["cores"]} cores; Python {versions["python"]}, \
{", ".join(f"{name} {versions[name]}" for name in PACKAGES)}.

{sections}

## What this does not show

- Nothing about downstream tasks, where the paper finds the gain; at its size, too, perplexity hardly moves (13.2
  without metadata, 13.3 with).
- Nothing about large models, long training, or thousands of sources. A few sources are mostly told apart by their first
  words, so a tag can say little.
- A confidence interval over a few seeds covers the initialisation and the order of the data, not the choice of the
  held-out text.
- Nothing was tuned for an arm: another learning rate or a longer cooldown may shift the differences.

## Again

    python benchmarks/studies/meco.py{"" if report["name"] == "full" else " --setting " + report["name"]}
"""


PACKAGES = ("jax", "flax", "optax", "numpy")


def write_report(study, name, seeds):
    """JSON, page and figure of all models whose results are kept for at least one seed in all arms."""
    if not (prepared := kept(study.work_dir, ["prepare"])):
        raise UserError(f"{study.work_dir} holds no results; run the study without --report_only first.")
    rows = prepared["prepare"]["rows"]
    analyses = {}
    for model in MODELS:
        found = kept(study.work_dir, jobs_of(model, rows.get(model, {}), seeds)) if model in rows else {}
        results = {arm: {} for arm in ARMS}
        for job, result in found.items():
            _, arm, seed = job.split("-")
            results[arm][int(seed.removeprefix("seed"))] = result
        if set.intersection(*(set(results[arm]) for arm in ARMS)):
            analyses[model] = analyse(results)
    if not analyses:
        raise UserError(f"{study.work_dir} holds no seed with all arms yet; let the study go on.")
    report = {
        "name": name,
        "environment": environment(*PACKAGES),
        "setting": dataclasses.asdict(study.setting),
        "files": study.file_names,
        "rows": rows,
        "models": analyses,
    }
    stem = "meco" if name == "full" else f"meco_{name}"
    # A smoke test is no result.
    results, docs = (Path(study.work_dir),) * 2 if name == "smoke" else (RESULTS, ROOT / "docs/studies")
    docs.mkdir(parents=True, exist_ok=True)
    write_json(results / f"{stem}.json", report)
    draw(next(iter(analyses.values())), study.setting, docs / f"{stem}.svg")
    (docs / f"{stem}.md").write_text(page(report, f"{stem}.svg"), encoding="utf-8")
    for model, analysis in analyses.items():
        print(MODELS[model])
        for comparison in analysis["comparisons"]:
            difference = shown(comparison["difference"], 4, signed=True)
            print(f"  {comparison['name']:52} {difference:20} {comparison.get('verdict', '')}")
    print(docs / f"{stem}.md")


def jobs_of(model, rows, seeds):
    """Seeds outside, arms inside, so that an interrupted study has whole seeds."""
    return {
        f"{model}-{arm}-seed{seed}": {"model": model, "arm": arm, "seed": seed, "rows": rows.get(arm)}
        for seed in range(seeds)
        for arm in ARMS
    }
