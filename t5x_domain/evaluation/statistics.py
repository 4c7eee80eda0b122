"""Whether one model beats another: paired bootstrap over test items, over seeds, and Holm's correction over tasks."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from t5x_domain.errors import UserError

# What a metric makes of per-item counts that were summed: float64 [..., k] -> [...].
Statistic = Callable[[np.ndarray], np.ndarray]

# Numbers held for one chunk of resamples; bounds memory to some 100 MB whatever the size of the test set.
_CHUNK = 2**21


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An adapted model against its base on one metric.

    `base` and `adapted` are the metric on all items, `difference` is adapted minus base, and [`low`, `high`] its
    interval. `outcome` is a win or a loss of the adapted model if the interval excludes 0, else a tie. `p_value` is
    two-sided. `items` are the units of the test: test items, or seeds in `over_seeds`, which resamples nothing.
    """

    base: float
    adapted: float
    difference: float
    low: float
    high: float
    resamples: int
    items: int
    outcome: str  # "win", "tie" or "loss"
    p_value: float


def paired_bootstrap(
    base: np.ndarray | Sequence[float],
    adapted: np.ndarray | Sequence[float],
    *,
    statistic: Statistic | None = None,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    lower_is_better: bool = False,
) -> Comparison:
    """Percentile bootstrap of a difference, the same resample of the test items for both models.

    Efron and Tibshirani 1993, chapter 13; paired as in Koehn 2004 and Jeong et al. 2024 (medical adaptation).

    Args:
      base, adapted: float [n], a value for each item, whose mean is compared; or, with `statistic`, float [n, k], per
        item the counts from whose sums over items the metric follows (see `metrics.counts`).
      statistic: turns sums over items [..., k] into the metric [...]; None for the mean of one value an item.
      resamples: how many test sets of n items are drawn with replacement.
      confidence: coverage of the interval.
      seed: of the draws; the same seed gives the same interval.
      lower_is_better: a drop is a win, e.g. of perplexity.

    Raises:
      UserError: fewer than two items, another number of items for each model, or a value that is not finite.
    """
    one_seed = (np.asarray(base, np.float64)[None], np.asarray(adapted, np.float64)[None])
    return _bootstrap(*one_seed, statistic, resamples, confidence, seed, lower_is_better)


def hierarchical_bootstrap(
    base: np.ndarray,
    adapted: np.ndarray,
    *,
    statistic: Statistic | None = None,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    lower_is_better: bool = False,
) -> Comparison:
    """Like `paired_bootstrap` for models that were fine-tuned with several seeds: resamples both seeds and items.

    Each resample draws one set of items for all, and seeds with replacement for each model on its own; the metric is
    averaged over the drawn seeds. Drawing S seeds from S understates their variance by (S - 1) / S, so with fewer
    than five seeds look at `over_seeds` too.

    Args:
      base, adapted: float [seeds, n] or, with `statistic`, [seeds, n, k]; the models may differ in their seeds.

    Raises:
      UserError: fewer than two seeds or items, another number of items for each model, or a value that is not finite.
    """
    base, adapted = np.asarray(base, np.float64), np.asarray(adapted, np.float64)
    if min(len(base), len(adapted)) < 2:
        raise UserError(
            f"{len(base)} and {len(adapted)} seeds: the variance over seeds needs at least two of each model; "
            "use paired_bootstrap for one."
        )
    return _bootstrap(base, adapted, statistic, resamples, confidence, seed, lower_is_better)


def over_seeds(
    base: Sequence[float],
    adapted: Sequence[float],
    *,
    paired: bool = False,
    confidence: float = 0.95,
    lower_is_better: bool = False,
) -> Comparison:
    """Student's t interval of a difference of means over seeds (Welch's unless `paired`).

    Args:
      base, adapted: the metric of each seed on the whole test set.
      paired: the i-th seed of both shares what varies, e.g. the order of the data.

    Raises:
      UserError: fewer than two seeds, another number of them for each model if paired, or a value that is not finite.
    """
    from scipy.stats import t as student

    base, adapted = np.asarray(base, np.float64), np.asarray(adapted, np.float64)
    _check_finite(base, adapted)
    if min(base.size, adapted.size) < 2:
        raise UserError(f"{base.size} and {adapted.size} seeds: an interval needs at least two of each model.")
    if paired and base.size != adapted.size:
        raise UserError(f"{base.size} and {adapted.size} seeds cannot be paired; run the same seeds of both models.")
    difference = float(adapted.mean() - base.mean())
    samples = [adapted - base] if paired else [base, adapted]
    variances = np.array([sample.var(ddof=1) / sample.size for sample in samples])
    error = float(np.sqrt(variances.sum()))
    if error == 0:  # every seed says the same
        half, p_value = 0.0, float(difference == 0)
    else:
        # Welch-Satterthwaite; with one sample it is n - 1.
        degrees = variances.sum() ** 2 / sum(v**2 / (s.size - 1) for v, s in zip(variances, samples, strict=True))
        half = float(student.ppf((1 + confidence) / 2, degrees)) * error
        p_value = float(2 * student.sf(abs(difference) / error, degrees))
    low, high = difference - half, difference + half
    return Comparison(
        base=float(base.mean()),
        adapted=float(adapted.mean()),
        difference=difference,
        low=low,
        high=high,
        resamples=0,
        items=min(base.size, adapted.size),
        outcome=_outcome(low, high, lower_is_better),
        p_value=p_value,
    )


def multiplicity(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjustment (Holm 1979): as many outcomes stay as adjusted values are below the level.

    Returns:
      Adjusted p-values in the order given, float64 [m].

    Raises:
      UserError: a value is not within [0, 1].
    """
    p_values = np.asarray(p_values, np.float64)
    if not np.all((p_values >= 0) & (p_values <= 1)):
        raise UserError(f"p-values lie within 0 and 1, not {p_values.tolist()}.")
    order = np.argsort(p_values, kind="stable")
    steps = np.maximum.accumulate(p_values[order] * np.arange(p_values.size, 0, -1))
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted


def _bootstrap(
    base: np.ndarray,
    adapted: np.ndarray,
    statistic: Statistic | None,
    resamples: int,
    confidence: float,
    seed: int,
    lower_is_better: bool,
) -> Comparison:
    """`hierarchical_bootstrap` of float64 [seeds, n] or [seeds, n, k]."""
    items = base.shape[1]
    if items != adapted.shape[1]:
        raise UserError(f"the base model has {items} test items, the adapted one {adapted.shape[1]}; score the same.")
    if items < 2:
        raise UserError(f"a test set of {items}: an interval needs at least two test items.")
    if resamples < 1 or not 0 < confidence < 1:
        raise UserError(f"resamples = {resamples}, confidence = {confidence}: give at least 1 and a share in (0, 1).")
    _check_finite(base, adapted)
    if statistic is None:
        base, adapted = base[..., None], adapted[..., None]

    def metric(totals: np.ndarray) -> np.ndarray:
        return totals[..., 0] / items if statistic is None else statistic(totals)

    values = [float(metric(counts.sum(axis=1)).mean()) for counts in (base, adapted)]
    # The draws of each kind come from a stream of its own, so that they do not depend on the size of a chunk.
    item_draws, *seed_draws = np.random.default_rng(seed).spawn(3)
    chunk = max(1, _CHUNK // max(items, *(counts.shape[0] * counts.shape[2] for counts in (base, adapted))))
    differences = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        weights = _drawn(item_draws, rows, items)
        drawn = []
        for counts, draws in zip((base, adapted), seed_draws, strict=True):
            totals = np.stack([weights @ one_seed for one_seed in counts], axis=1)  # [rows, seeds, k]
            drawn.append((metric(totals) * _drawn(draws, rows, len(counts))).sum(axis=1) / len(counts))
        differences.append(drawn[1] - drawn[0])
    differences = np.concatenate(differences)
    differences[np.abs(differences) < 1e-12 * max(np.abs(values))] = 0.0  # round-off is neither better nor worse
    low, high = (float(end) for end in np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2]))
    tail = min(np.sum(differences <= 0), np.sum(differences >= 0))
    return Comparison(
        base=values[0],
        adapted=values[1],
        difference=values[1] - values[0],
        low=low,
        high=high,
        resamples=resamples,
        items=items,
        outcome=_outcome(low, high, lower_is_better),
        # The observed sample counts as one more, so that it is never 0 (Davison and Hinkley 1997, section 4.2).
        p_value=min(1.0, 2 * float(tail + 1) / (resamples + 1)),
    )


def _drawn(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    """How often each of n was drawn in n draws with replacement, float64 [rows, n]."""
    draws = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(draws.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _outcome(low: float, high: float, lower_is_better: bool) -> str:
    if low <= 0 <= high:
        return "tie"
    return "win" if (low > 0) != lower_is_better else "loss"


def _check_finite(base: np.ndarray, adapted: np.ndarray) -> None:
    for name, values in (("base", base), ("adapted", adapted)):
        if not np.isfinite(values).all():
            raise UserError(
                f"a value of the {name} model is NaN or infinite; an item without a score cannot be compared."
            )
