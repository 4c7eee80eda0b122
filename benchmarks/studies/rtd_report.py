"""What the study of replaced-token detection finds: scores over seeds, verdicts, costs, and a figure of them."""

import dataclasses
import statistics
from pathlib import Path

import matplotlib
from rtd_arms import ARMS, TRAINED
from study import ROOT, interval, paired, verdict, write_json

# isort: split
from common import RESULTS, environment  # study makes it findable
from rtd_page import COMPARISONS, METRICS, PACKAGES, page, reading

from t5x_domain.errors import UserError


def write_report(study, name, found):
    """JSON, page and figure of the seeds whose results are kept in all arms."""
    every = {int(job.rpartition("-")[2]) for job in found if job.startswith("tune-")}
    seeds = sorted(seed for seed in every if all(f"tune-{arm}-{seed}" in found for arm in ARMS))
    if not seeds:
        raise UserError(f"{study.work_dir} holds no seed with all arms yet; let the study go on.")
    report = {
        "name": name,
        "environment": environment(*PACKAGES),
        "setting": dataclasses.asdict(study.setting),
        **{key: Path(getattr(study, key)).name for key in ("corpus_file", "task_file")},
        **{key: found["prepare"][key] for key in ("documents", "tokens", "examples")},
        "tf_idf": {key: found["prepare"]["tf_idf"][key] for key in ("C", "scores")},
        "device": found[f"pretrain-mlm-{seeds[0]}"]["device"],
        "minutes": sum(result["seconds"] for result in found.values()) / 60,
        **analyse(found, seeds),
    }
    smoke = name == "smoke"  # is no result
    stem = "rtd" if name == "small" else f"rtd_{name}"
    results, docs = (Path(study.work_dir),) * 2 if smoke else (RESULTS, ROOT / "docs/studies")
    write_json(results / f"{stem}.json", report)
    draw(report, docs / f"{stem}.svg")
    (docs / f"{stem}.md").write_text(page(report, f"{stem}.svg"), encoding="utf-8")
    print(f"{reading(report)}\n\n{docs / stem}.md")


def analyse(found, seeds):
    """Everything the report says of the results {job: result}, each seed being one of pretraining."""
    by_seed = {
        metric: {
            arm: {seed: statistics.fmean(found[f"tune-{arm}-{seed}"]["scores"][metric]) for seed in seeds}
            for arm in ARMS
        }
        for metric in METRICS
    }
    within = [
        statistics.stdev(values)
        for arm in ARMS
        for seed in seeds
        if len(values := found[f"tune-{arm}-{seed}"]["scores"]["macro_f1"]) > 1
    ]
    comparisons = {}
    for name in COMPARISONS:
        ours, theirs = name.split(" − ")
        differences = {metric: paired(scores[ours], scores[theirs]) for metric, scores in by_seed.items()}
        comparisons[name] = {
            metric: {"difference": difference, "verdict": verdict(difference, expected_sign=1)}
            for metric, difference in differences.items()
        }
    return {
        "seeds": seeds,
        "scores": {metric: {arm: interval(scores[arm].values()) for arm in ARMS} for metric, scores in by_seed.items()},
        "by_seed": by_seed,
        "spread_of_fine_tuning": statistics.fmean(within) if within else None,
        "comparisons": comparisons,
        "pretraining": {arm: pretraining([found[f"pretrain-{arm}-{seed}"] for seed in seeds]) for arm in TRAINED},
    }


def pretraining(results):
    """What an arm computed, and the means over seeds of its seconds and of what it says of held-out text, by step."""
    curve = {}
    for step in results[0]["held_out"]:
        scores = [result["held_out"][step] for result in results]
        known = [key for key in scores[0] if all(score[key] is not None for score in scores)]
        curve[int(step)] = {key: statistics.fmean(score[key] for score in scores) for key in known}
    same = ("steps", "flops", "parameters")
    return {
        **{key: results[0][key] for key in same},
        **{key: statistics.fmean(result[key] for result in results) for key in ("seconds", "text_tokens")},
        "curve": curve,
    }


COLOURS = dict(zip(ARMS, ("#888888", "#3b82c4", "#b4589a", "#d9762b", "#2a9d78"), strict=True))


def draw(report, path):
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "rtd", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for arm in ("rtd_tied", "rtd_gdes"):
        for measure, style in (("f1", "-"), ("recall", ":")):
            curve = report["pretraining"][arm]["curve"]
            left.plot(
                list(curve),
                [scores[measure] for scores in curve.values()],
                style,
                color=COLOURS[arm],
                label=f"{arm}, {measure}",
            )
    left.set(title="Replaced tokens found in held-out text", xlabel="step", ylim=(0, None))
    left.legend(frameon=False)
    for place, arm in enumerate(ARMS):
        value, points = report["scores"]["macro_f1"][arm], report["by_seed"]["macro_f1"][arm].values()
        error = 0.0 if value["low"] is None else value["high"] - value["mean"]
        right.errorbar(place, value["mean"], error, fmt="o", capsize=4, color=COLOURS[arm])
        right.plot([place + 0.2] * len(points), list(points), ".", color=COLOURS[arm], alpha=0.6)
    right.axhline(report["tf_idf"]["scores"]["macro_f1"], color="#666666", lw=0.8, ls="--", label="TF-IDF")
    right.set_xticks(range(len(ARMS)), ARMS)
    right.set(title="Macro-F1 after fine-tuning")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
