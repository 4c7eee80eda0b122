"""Is the adapted model better than its base? Scores and predictions of both -> the contents of verdict.json.

The protocol is that of Jeong et al. 2024, "Medical Adaptation of Large Language and Vision-Language Models: Are We
Making Progress?": each model is asked with the prompt that suits it best on validation data, both answer the same test
items, and a percentile bootstrap that draws the same items for both gives an interval of the difference. The adapted
model wins or loses where the interval excludes 0; everything else is a tie.

verdict.json:

    schema       1
    base, adapted, date
    method       {confidence, resamples, seed, …}: how it was found
    tasks        [{name, kind, metric, items, other_metrics: {metric: {base, adapted}}, prompts: {base, adapted},
                   warnings, COMPARISON}]
    perplexity   [{corpus, role: domain | general, measure: nats_per_token | bits_per_byte, documents,
                   perplexity: {base, adapted} | null, COMPARISON}]
    fine_tuned   [{name, metric, seeds: {base, adapted}, scores: {base, adapted}, items, warnings, COMPARISON}]
    summary      {tasks | domain | general | fine_tuned: {count, win, tie, loss, percent: {win, tie, loss},
                   after_holm: {win, tie, loss}}}
    notes        what a reader has to know, as sentences

COMPARISON is {base, adapted, difference, low, high, outcome, p_value, p_holm, outcome_holm}: adapted minus base, its
interval, "win", "tie" or "loss" of the adapted model, the two-sided p-value of the bootstrap, and p-value and outcome
after Holm's correction over the entries of the same list and role.
"""

import collections
import dataclasses
import datetime
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from t5x_domain import files
from t5x_domain.errors import UserError
from t5x_domain.evaluation import metrics
from t5x_domain.evaluation.statistics import Comparison, hierarchical_bootstrap, multiplicity, paired_bootstrap
from t5x_domain.files import write_atomically

SCHEMA = 1
OUTCOMES = ("win", "tie", "loss")
# Fewer items leave an interval so wide that hardly any difference can be seen, and a percentile bootstrap too narrow.
FEW_ITEMS = 30


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """How intervals are made, see `statistics.paired_bootstrap`."""

    confidence: float = 0.95
    resamples: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise UserError(f"confidence = {self.confidence} must lie between 0 and 1, e.g. 0.95.")
        if self.resamples < 100:
            raise UserError(f"resamples = {self.resamples} are too few for an interval; set 1,000 or more.")

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the bootstrap functions."""
        return dataclasses.asdict(self)


class Answers(NamedTuple):
    """One model's answers to a test set.

    Attributes:
      predictions: one for each item, as `metrics` takes them.
      prompt: how the model was asked and what that scored on validation data, kept as it is.
    """

    predictions: Sequence[Any]
    prompt: Mapping[str, Any]


def compare_task(
    name: str,
    kind: str,
    metric_names: Sequence[str],
    targets: Sequence[Any],
    base: Answers,
    adapted: Answers,
    bootstrap: Bootstrap,
    *,
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """One entry of `tasks`; the first metric decides.

    Args:
      name, kind: of the task.
      metric_names: keys of `metrics.METRICS`.
      targets: of the test items.
      base, adapted: answers to them, in the same order.
      bootstrap: how the interval is made.
      labels: what a classifier could choose from.

    Raises:
      UserError: fewer than two test items, or another number of predictions.
    """
    check_items(name, targets, base.predictions, adapted.predictions)
    decisive, *others = metric_names
    by_model = {"base": base, "adapted": adapted}
    scores = {model: metrics.score(others, targets, answers.predictions) for model, answers in by_model.items()}
    comparison = metrics.compare(decisive, targets, base.predictions, adapted.predictions, **bootstrap.options)
    return {
        "name": name,
        "kind": kind,
        "metric": decisive,
        "items": len(targets),
        **_comparison(comparison),
        "other_metrics": {other: {model: scores[model][other] for model in by_model} for other in others},
        "prompts": {model: dict(answers.prompt) for model, answers in by_model.items()},
        "warnings": _item_warnings(targets, labels)
        + [text for model, answers in by_model.items() for text in _answer_warnings(model, answers.predictions)],
    }


def compare_corpus(
    corpus: str,
    role: str,
    measure: str,
    base: Sequence[tuple[float, float]],
    adapted: Sequence[tuple[float, float]],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """One entry of `perplexity`: cost of held-out documents, resampled by document.

    Args:
      corpus: its name.
      role: "domain", where the adapted model should gain, or "general", where it should not forget.
      measure: "nats_per_token", if both models share a vocabulary, or "bits_per_byte".
      base, adapted: of each document its cost (nats or bits) and over how many tokens or bytes.
      bootstrap: how the interval is made.

    Raises:
      UserError: fewer than two documents, or another text for each model.
    """
    check_items(corpus, base, adapted, what="document")
    if [units for _, units in base] != [units for _, units in adapted]:
        raise UserError(f"{corpus}: the two models were not scored on the same text; empty the output folder.")
    comparison = paired_bootstrap(
        base,
        adapted,
        statistic=lambda sums: sums[..., 0] / sums[..., 1],
        lower_is_better=True,
        **bootstrap.options,
    )
    perplexity = None
    if measure == "nats_per_token":
        values = {"base": comparison.base, "adapted": comparison.adapted}
        perplexity = {model: math.exp(min(nats, 700.0)) for model, nats in values.items()}
    return {
        "corpus": corpus,
        "role": role,
        "measure": measure,
        "documents": len(base),
        **_comparison(comparison),
        "perplexity": perplexity,
    }


def compare_fine_tuned(
    name: str,
    metric: str,
    targets: Sequence[Any],
    base: Mapping[int, Sequence[Any]],
    adapted: Mapping[int, Sequence[Any]],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """One entry of `fine_tuned`: both models fine-tuned with several seeds, seeds and items resampled.

    Args:
      name: of the task.
      metric: key of `metrics.METRICS`.
      targets: of the test items.
      base, adapted: predictions of each seed.
      bootstrap: how the interval is made.

    Raises:
      UserError: fewer than two test items or seeds, or another number of predictions.
    """
    check_items(name, targets, *base.values(), *adapted.values())
    comparison = hierarchical_bootstrap(
        _seed_counts(metric, targets, base),
        _seed_counts(metric, targets, adapted),
        statistic=metrics.METRICS[metric].statistic,
        **bootstrap.options,
    )
    seeds = {"base": base, "adapted": adapted}
    warnings = _item_warnings(targets, None)
    if min(len(base), len(adapted)) < 5:
        warnings.append("with fewer than five seeds the interval understates how much seeds differ")
    return {
        "name": name,
        "metric": metric,
        "items": len(targets),
        "seeds": {model: sorted(runs) for model, runs in seeds.items()},
        "scores": {
            model: [metrics.score([metric], targets, runs[seed])[metric] for seed in sorted(runs)]
            for model, runs in seeds.items()
        },
        **_comparison(comparison),
        "warnings": warnings,
    }


def conclude(
    base: str,
    adapted: str,
    bootstrap: Bootstrap,
    *,
    tasks: Sequence[Mapping[str, Any]] = (),
    perplexity: Sequence[Mapping[str, Any]] = (),
    fine_tuned: Sequence[Mapping[str, Any]] = (),
    method: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    date: str | None = None,
) -> dict[str, Any]:
    """The contents of verdict.json.

    Raises:
      UserError: there is nothing to conclude from.
    """
    groups = {
        "tasks": tasks,
        "domain": [entry for entry in perplexity if entry["role"] == "domain"],
        "general": [entry for entry in perplexity if entry["role"] == "general"],
        "fine_tuned": fine_tuned,
    }
    if not any(groups.values()):
        raise UserError("nothing was compared; set HeadToHead.tasks, corpora or fine_tuned.")
    level = 1 - bootstrap.confidence
    corrected = {group: _with_holm(entries, level) for group, entries in groups.items()}
    return {
        "schema": SCHEMA,
        "base": base,
        "adapted": adapted,
        "date": date or datetime.date.today().isoformat(),
        "method": {**bootstrap.options, **(method or {})},
        "tasks": corrected["tasks"],
        "perplexity": corrected["domain"] + corrected["general"],
        "fine_tuned": corrected["fine_tuned"],
        "summary": {group: _tally(entries) for group, entries in corrected.items() if entries},
        "notes": list(notes),
    }


def check_items(name: str, first: Sequence[Any], *others: Sequence[Any], what: str = "test item") -> None:
    """Raises UserError if there are fewer than two items, or not as many of something else."""
    if len(first) < 2:
        plural = "" if len(first) == 1 else "s"
        raise UserError(
            f"{name}: {len(first)} {what}{plural} cannot tell two models apart; give 2 or more, better 100."
        )
    for other in others:
        if len(other) != len(first):
            raise UserError(f"{name}: {len(other)} answers to {len(first)} {what}s; both models must answer the same.")


def write_verdict(verdict: Mapping[str, Any], folder: epath.PathLike) -> epath.Path:
    """Writes `folder`/verdict.json, whole or not at all, and returns its path."""
    path = files.path(folder) / "verdict.json"
    write_atomically(path, (json.dumps(verdict, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    return path


def _seed_counts(metric: str, targets: Sequence[Any], runs: Mapping[int, Sequence[Any]]) -> np.ndarray:
    """What the bootstrap resamples, float64 [seeds, n] or [seeds, n, k].

    Counted over all seeds at once, since the columns of some metrics are the labels that occur.
    """
    predictions = [answer for seed in sorted(runs) for answer in runs[seed]]
    counts = metrics.counts(metric, list(targets) * len(runs), predictions)
    return counts.reshape(len(runs), len(targets), *counts.shape[1:])


def _with_holm(entries: Sequence[Mapping[str, Any]], level: float) -> list[dict[str, Any]]:
    adjusted = multiplicity([entry["p_value"] for entry in entries])
    return [
        {**entry, "p_holm": float(p), "outcome_holm": entry["outcome"] if p < level else "tie"}
        for entry, p in zip(entries, adjusted, strict=True)
    ]


def _tally(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    plain, holm = (collections.Counter(entry[key] for entry in entries) for key in ("outcome", "outcome_holm"))
    return {
        "count": len(entries),
        **{outcome: plain[outcome] for outcome in OUTCOMES},
        "percent": {outcome: round(100 * plain[outcome] / len(entries), 1) for outcome in OUTCOMES},
        "after_holm": {outcome: holm[outcome] for outcome in OUTCOMES},
    }


def _comparison(found: Comparison) -> dict[str, Any]:
    return {key: getattr(found, key) for key in ("base", "adapted", "difference", "low", "high", "outcome", "p_value")}


def _item_warnings(targets: Sequence[Any], labels: Sequence[str] | None) -> list[str]:
    found = []
    if len(targets) < FEW_ITEMS:
        found.append(f"only {len(targets)} test items, so that only a large difference can be seen")
    if labels is None:
        return found
    seen = collections.Counter(targets)
    if len(seen) == 1:
        found.append(f"every test item is labelled '{targets[0]}', which a model that always says so gets right")
    if unknown := sorted(set(seen) - set(labels)):
        count = sum(seen[label] for label in unknown)
        listed = ", ".join(f"'{label}'" for label in unknown[:5])
        found.append(f"{count} of {len(targets)} test items have labels unseen in training ({listed}): wrong for both")
    if absent := sorted(set(labels) - set(seen)):
        listed = ", ".join(f"'{label}'" for label in absent[:5])
        found.append(f"no test item is labelled {listed}, so nothing is known of such items")
    return found


def _answer_warnings(model: str, predictions: Sequence[Any]) -> list[str]:
    if empty := sum(isinstance(answer, str) and not answer.strip() for answer in predictions):
        return [f"the {model} model wrote nothing for {empty} of {len(predictions)} items"]
    if all(answer == predictions[0] for answer in predictions):
        return [f"the {model} model gave every item the same answer, '{predictions[0]}'"]
    return []
