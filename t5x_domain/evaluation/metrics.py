"""Scores of predictions on labelled items: classification, generation, tagging and answers, all in [0, 1].

Every metric follows from counts that are summed over items: a mean from its values, macro-F1 from a confusion matrix,
BLEU from matched n-grams. So `compare` can recompute it on thousands of resampled test sets with one matrix product.
"""

import collections
import dataclasses
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_domain.errors import UserError
from t5x_domain.evaluation.statistics import Comparison, Statistic, paired_bootstrap

_BLEU_ORDER = 4  # n-grams of 1 to 4 tokens, Papineni et al. 2002


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric. Calling it with targets and predictions gives its value on all of them.

    `counts` makes float64 [n], values whose mean is the metric, or [n, k], counts from whose sums `statistic` makes it.
    `library` is who says what the metric is where it is no mean.
    """

    name: str
    counts: Callable[[Sequence[Any], Sequence[Any]], np.ndarray]
    statistic: Statistic | None = None
    library: Callable[[Sequence[Any], Sequence[Any]], float] | None = None

    def __call__(self, targets: Sequence[Any], predictions: Sequence[Any]) -> float:
        _check(self.name, targets, predictions)
        return float(self.library(targets, predictions) if self.library else self.counts(targets, predictions).mean())


def score(names: Sequence[str], targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """The metrics of these names.

    Args:
      names: keys of `METRICS`.
      targets: for each item its label or text; for entity_f1 a tag (IOB2) for each word; for span_* the list of
        admissible answers, [] if the question has none.
      predictions: in the same order the label, the text or the tags; "" for no answer.

    Raises:
      UserError: a name is not known, there are no items, or not as many predictions.
    """
    return {name: _metric(name)(targets, predictions) for name in names}


def counts(name: str, targets: Sequence[Any], predictions: Sequence[Any]) -> np.ndarray:
    """What `statistics.paired_bootstrap` and `hierarchical_bootstrap` resample, with `METRICS[name].statistic`.

    Returns:
      float64 [n] of a metric that is a mean over items, else [n, k]. k depends on the labels and need not agree between
      models.
    """
    _check(name, targets, predictions)
    return _metric(name).counts(targets, predictions)


def compare(
    name: str, targets: Sequence[Any], base: Sequence[Any], adapted: Sequence[Any], **options: Any
) -> Comparison:
    """The paired bootstrap of a metric between the predictions of two models; `options` as `paired_bootstrap`'s.

    Raises:
      UserError: as `score`, or there are fewer than two items.
    """
    sides = (counts(name, targets, predictions) for predictions in (base, adapted))
    return paired_bootstrap(*sides, statistic=_metric(name).statistic, **options)


def _metric(name: str) -> Metric:
    if name not in METRICS:
        raise UserError(f"unknown metric '{name}'; choose from {', '.join(METRICS)}.")
    return METRICS[name]


def _check(name: str, targets: Sequence[Any], predictions: Sequence[Any]) -> None:
    if len(targets) != len(predictions):
        raise UserError(f"{name}: {len(predictions)} predictions for {len(targets)} targets; give one for each.")
    if not len(targets):
        raise UserError(f"{name}: there are no items to score; choose a split that has some.")
    pairs = zip(targets, predictions, strict=True)
    if not name.startswith("span_") and any(isinstance(t, list) and isinstance(p, str) for t, p in pairs):
        raise UserError(f"{name}: a target is a list of answers; choose span_exact_match or span_f1.")


# --- labels ---


def _accuracy(targets: Sequence[str], predictions: Sequence[str]) -> np.ndarray:
    return np.array([target == prediction for target, prediction in zip(targets, predictions, strict=True)], np.float64)


def _macro_f1(targets: Sequence[str], predictions: Sequence[str]) -> float:
    """scikit-learn's: the unweighted mean of F1 over every label that occurs as a target or as a prediction.

    So a label that is predicted though no item has it counts as one with F1 = 0, as wrong as it is; a label that
    occurs in neither has no F1 and is left out, whether or not training had it. Where a model writes its labels
    freely, each wrong wording is such a label; rank classification keeps to those that exist.
    """
    from sklearn.metrics import f1_score

    return f1_score(targets, predictions, average="macro", zero_division=0)


def _confusion(targets: Sequence[str], predictions: Sequence[str]) -> np.ndarray:
    """[n, 3 L] for L labels: is it this label and found, is it, was it predicted."""
    labels = {label: index for index, label in enumerate(dict.fromkeys([*targets, *predictions]))}
    actual, predicted = (np.eye(len(labels))[[labels[x] for x in side]] for side in (targets, predictions))
    return np.concatenate([actual * predicted, actual, predicted], axis=1)


def _macro_f1_of(totals: np.ndarray) -> np.ndarray:
    found, actual, predicted = np.split(totals, 3, axis=-1)
    occurs = actual + predicted > 0
    return (2 * found / np.maximum(actual + predicted, 1)).sum(-1) / np.maximum(occurs.sum(-1), 1)


# --- tags ---


def _entity_f1(targets: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> float:
    """seqeval's F1 over entities (type and both ends right), pooled over all; 0 if there are none.

    A stray I- opens an entity, as in the CoNLL-2000 scorer, so that tags that break IOB2 are not lost.
    """
    from seqeval.metrics import f1_score

    _check_tags(targets, predictions)
    return f1_score([list(tags) for tags in targets], [list(tags) for tags in predictions], zero_division=0)


def _entities(targets: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> np.ndarray:
    """[n, 2]: entities that were found; those of the target plus those of the prediction."""
    from seqeval.metrics.sequence_labeling import get_entities

    _check_tags(targets, predictions)
    pairs = [
        (set(get_entities(list(target))), set(get_entities(list(prediction))))
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return np.array([(len(actual & found), len(actual) + len(found)) for actual, found in pairs], np.float64)


def _entity_f1_of(totals: np.ndarray) -> np.ndarray:
    return 2 * totals[..., 0] / np.maximum(totals[..., 1], 1)


def _check_tags(targets: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> None:
    for item, (target, prediction) in enumerate(zip(targets, predictions, strict=True)):
        if len(target) != len(prediction):
            raise UserError(f"entity_f1: item {item} has {len(target)} words but {len(prediction)} predicted tags.")
        for tag in [*target, *prediction]:
            if not re.fullmatch(r"O|[BI]-.+", tag):
                raise UserError(f"entity_f1: '{tag}' of item {item} is no IOB2 tag; write O, B-TYPE or I-TYPE.")


# --- texts ---


def _normalized(text: str) -> str:
    """Lower case without punctuation, articles and surplus blanks (SQuAD, Rajpurkar et al. 2016, section 6.1)."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _exact(target: str, prediction: str) -> float:
    return float(_normalized(target) == _normalized(prediction))


def _overlap(target: str, prediction: str) -> float:
    """F1 of the words of a normalised answer as a bag; where either has none, 1 if both do."""
    ours, theirs = _normalized(target).split(), _normalized(prediction).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = (collections.Counter(ours) & collections.Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def _best(similarity: Callable[[str, str], float]) -> Callable[[Sequence[Sequence[str]], Sequence[str]], np.ndarray]:
    """The largest over the admissible answers; without any, "" is the right one (SQuAD 2.0, Rajpurkar et al. 2018)."""

    def values(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> np.ndarray:
        for item, answers in enumerate(targets):
            if isinstance(answers, str):
                raise UserError(f"span metrics: the target of item {item} is a text; give a list of answers.")
        pairs = zip(targets, predictions, strict=True)
        return np.array([max(similarity(answer, said) for answer in answers or [""]) for answers, said in pairs])

    return values


def _each(similarity: Callable[[str, str], float]) -> Callable[[Sequence[str], Sequence[str]], np.ndarray]:
    return lambda targets, predictions: np.array([similarity(*p) for p in zip(targets, predictions, strict=True)])


def _rouge(kind: str) -> Callable[[Sequence[str], Sequence[str]], np.ndarray]:
    """F-measure of rouge-score (Lin 2004), not stemmed. Its tokens are runs of a-z and 0-9: other scripts score 0."""

    def values(targets: Sequence[str], predictions: Sequence[str]) -> np.ndarray:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind])
        pairs = zip(targets, predictions, strict=True)
        return np.array([scorer.score(target, prediction)[kind].fmeasure for target, prediction in pairs])

    return values


def _bleu(targets: Sequence[str], predictions: Sequence[str]) -> float:
    """sacrebleu's corpus BLEU (Post 2018; 13a tokens, exponential smoothing) divided by 100."""
    from sacrebleu.metrics import BLEU

    return BLEU().corpus_score(list(predictions), [list(targets)]).score / 100


def _ngrams(targets: Sequence[str], predictions: Sequence[str]) -> np.ndarray:
    """[n, 10]: length of the prediction and of the target, matched n-grams, n-grams; of 1 to 4 tokens."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True)  # concerns the sentence's own score, not its counts
    scored = (bleu.sentence_score(said, [target]) for target, said in zip(targets, predictions, strict=True))
    return np.array([[one.sys_len, one.ref_len, *one.counts, *one.totals] for one in scored], np.float64)


def _bleu_of(totals: np.ndarray) -> np.ndarray:
    from sacrebleu.metrics import BLEU

    def one(sums: np.ndarray) -> float:
        said, wanted, *grams = sums.astype(int).tolist()  # sacrebleu wants integers
        matched, written = grams[:_BLEU_ORDER], grams[_BLEU_ORDER:]
        return BLEU.compute_bleu(matched, written, said, wanted, smooth_method="exp").score / 100

    return np.apply_along_axis(one, -1, totals)


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _accuracy),
        Metric("macro_f1", _confusion, _macro_f1_of, _macro_f1),
        Metric("exact_match", _each(_exact)),
        Metric("token_f1", _each(_overlap)),
        Metric("rouge1", _rouge("rouge1")),
        Metric("rouge2", _rouge("rouge2")),
        Metric("rougeL", _rouge("rougeL")),
        Metric("bleu", _ngrams, _bleu_of, _bleu),
        Metric("entity_f1", _entities, _entity_f1_of, _entity_f1),
        Metric("span_exact_match", _best(_exact)),
        Metric("span_f1", _best(_overlap)),
    )
}
