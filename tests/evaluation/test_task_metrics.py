import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.errors import UserError
from t5x_domain.evaluation.metrics import METRICS, compare, counts, score

LABELS = st.sampled_from(["law", "medicine", "physics", "other"])
TEXTS = st.text("ab c.", max_size=12)
TAGS = st.sampled_from(["O", "B-GENE", "I-GENE", "B-DRUG", "I-DRUG"])
SENTENCES = st.integers(0, 8).flatmap(lambda n: st.tuples(*[st.lists(TAGS, min_size=n, max_size=n)] * 2))
# What a pair of target and prediction looks like, by metric.
PAIRS = {
    **dict.fromkeys(["accuracy", "macro_f1"], st.tuples(LABELS, LABELS)),
    **dict.fromkeys(["exact_match", "token_f1", "rouge1", "rouge2", "rougeL", "bleu"], st.tuples(TEXTS, TEXTS)),
    "entity_f1": SENTENCES,
    **dict.fromkeys(["span_exact_match", "span_f1"], st.tuples(st.lists(TEXTS, max_size=3), TEXTS)),
}


def test_accuracy_is_scikit_learns():
    from sklearn.metrics import accuracy_score

    targets, predictions = np.random.default_rng(0).choice(["a", "b", "c"], (2, 50)).tolist()
    assert METRICS["accuracy"](targets, predictions) == accuracy_score(targets, predictions)


def test_macro_f1_by_hand():
    # 2 * found / (actual + predicted); of the first three, yes: 2 * 1 / (2 + 1), no: 2 * 1 / (1 + 2); of all four,
    # no: 2 * 1 / (2 + 2), maybe: 0.
    targets, predictions = ["yes", "yes", "no", "no"], ["yes", "no", "no", "maybe"]
    assert METRICS["macro_f1"](targets[:3], predictions[:3]) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert METRICS["macro_f1"](targets, predictions) == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)


def test_a_label_that_no_item_has_counts_as_wrong_and_one_that_nobody_names_is_left_out():
    # a: 2 * 1 / (2 + 1) = 2/3; "never" was predicted once in vain: 0; mean over both: 1/3.
    assert METRICS["macro_f1"](["a", "a"], ["a", "never"]) == pytest.approx(1 / 3)
    # b occurs, is never predicted: 0; a: 2 * 1 / (1 + 2) = 2/3. A third label that training had changes nothing.
    assert METRICS["macro_f1"](["a", "b"], ["a", "a"]) == pytest.approx(1 / 3)


def test_squad_normalisation():
    # Rajpurkar et al. 2016: case, punctuation, articles and blanks do not count.
    assert counts("exact_match", ["The  Beatles!", "a cat", "theatre"], ["beatles", "cat", "atre"]).tolist() == [
        1,
        1,
        0,
    ]
    # {cat, sat} against {cat, cat, ran}: one common word, 2 * 1 / (2 + 3).
    assert METRICS["token_f1"](["the cat sat"], ["Cat cat ran."]) == pytest.approx(0.4)


def test_spans_take_the_best_answer_and_none_where_there_is_none():
    targets = [["in 1999", "1999"], [], [], ["Paris"]]
    predictions = ["1999", "", "perhaps", ""]
    assert counts("span_exact_match", targets, predictions).tolist() == [1, 1, 0, 0]
    # Against "in 1998" the best of 0 and 2 * 1 / (2 + 2).
    assert METRICS["span_f1"]([["in 1999", "1999"]], ["in 1998"]) == pytest.approx(0.5)
    with pytest.raises(UserError, match="item 0 is a text"):
        METRICS["span_f1"](["Paris"], ["Paris"])


def test_rouge_by_hand():
    # Lin 2004, section 3: "police kill the gunman" against "police killed the gunman": 3 of 4 words, 1 of 3 word
    # pairs, longest common subsequence "police the gunman" of 3.
    scores = score(["rouge1", "rouge2", "rougeL"], ["police killed the gunman"], ["police kill the gunman"])
    assert scores == {"rouge1": pytest.approx(3 / 4), "rouge2": pytest.approx(1 / 3), "rougeL": pytest.approx(3 / 4)}


def test_bleu_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 triples, 0 of 3: smoothed to 1 / (2 * 3) (exp: the first zero counts half).
    # The lengths agree, so the geometric mean is all: (5/6 * 3/5 * 1/4 * 1/6) ** (1/4).
    value = METRICS["bleu"](["the cat sat on the mat"], ["the cat is on the mat"])
    assert value == pytest.approx((5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25)
    # Of a prediction that is half as long: brevity penalty exp(1 - 8/4).
    assert METRICS["bleu"](["a b c d e f g h"], ["a b c d"]) == pytest.approx(np.exp(-1))


def test_entity_f1_by_hand():
    # Of 2 entities 1 is found, of 3 predicted ones (the last has the wrong end, the middle one is too much).
    targets = [["B-GENE", "I-GENE", "O"], ["B-DRUG", "O"]]
    predictions = [["B-GENE", "O", "B-GENE"], ["B-DRUG", "O"]]
    assert METRICS["entity_f1"](targets, predictions) == pytest.approx(2 * 1 / (2 + 3))
    assert METRICS["entity_f1"]([["O"]], [["O"]]) == 0.0
    # An entity does not run on into the next sentence.
    assert METRICS["entity_f1"]([["B-X"], ["B-X"]], [["B-X"], ["I-X"]]) == 1.0


@pytest.mark.parametrize("tag", ["E-GENE", "GENE", "", "B-"])
def test_tags_that_are_not_iob2_are_refused(tag):
    with pytest.raises(UserError, match="item 1 is no IOB2 tag"):
        METRICS["entity_f1"]([["O"], ["O"]], [["O"], [tag]])


@pytest.mark.parametrize("name", METRICS)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_counts_say_the_same_as_the_metric_on_any_sample_of_items(name, data):
    pairs = data.draw(st.lists(PAIRS[name], min_size=1, max_size=8))
    drawn = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, max_size=10))
    targets, predictions = zip(*pairs, strict=True)
    counted, metric = counts(name, targets, predictions), METRICS[name]
    expected = metric([targets[i] for i in drawn], [predictions[i] for i in drawn])
    value = metric.statistic(counted[drawn].sum(0)) if metric.statistic else counted[drawn].mean()
    assert value == pytest.approx(expected, abs=1e-12)
    assert 0 <= expected <= 1 + 1e-9


@pytest.mark.parametrize("name", METRICS)
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_a_perfect_prediction_scores_one(name, data):
    target, _ = data.draw(PAIRS[name].filter(lambda pair: len(pair[0]) > 0))
    said = target
    if name.startswith("span"):
        said = target[-1]
    elif name == "entity_f1":
        target = said = ["B-GENE", *target[1:]]
    elif name not in ("accuracy", "macro_f1"):
        target = said = f"one two three four {target}"  # ROUGE-2 needs two words, BLEU four
    assert METRICS[name]([target], [said]) == pytest.approx(1.0)


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"entity_f1", "span_exact_match", "span_f1"}))
def test_an_empty_generation_scores_nothing(name):
    assert METRICS[name](["some words"], [""]) == 0.0


def test_comparison_of_a_metric_of_the_whole_corpus():
    rng = np.random.default_rng(0)
    targets = rng.choice(["a", "b", "c"], 300).tolist()
    base, adapted = ([t if rng.random() < p else "a" for t in targets] for p in (0.5, 0.9))
    for name in ("accuracy", "macro_f1"):
        comparison = compare(name, targets, base, adapted, resamples=500)
        assert comparison.base == pytest.approx(METRICS[name](targets, base))
        assert comparison.adapted == pytest.approx(METRICS[name](targets, adapted))
        assert comparison.low <= comparison.difference <= comparison.high
        assert (comparison.outcome, comparison.items) == ("win", 300)
        assert compare(name, targets, base, base, resamples=500).outcome == "tie"


def test_resamples_of_macro_f1_are_scikit_learns():
    # The exact distribution over all 3^3 resamples of three items, one of which leaves a label out.
    import itertools

    from sklearn.metrics import f1_score

    targets, base, adapted = ["a", "b", "c"], ["a", "a", "a"], ["a", "b", "a"]

    def f1(predictions, drawn):
        return f1_score([targets[i] for i in drawn], [predictions[i] for i in drawn], average="macro", zero_division=0)

    exact = [f1(adapted, drawn) - f1(base, drawn) for drawn in itertools.product(range(3), repeat=3)]
    comparison = compare("macro_f1", targets, base, adapted)
    # Each of the 27 has the probability 0.037 > 0.025, so the quantiles are values that occur.
    low, high = np.quantile(exact, [0.025, 0.975], method="inverted_cdf")
    assert (comparison.low, comparison.high) == (pytest.approx(low), pytest.approx(high))


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(UserError, match="unknown metric 'f1'; choose from accuracy, macro_f1"):
        score(["accuracy", "f1"], ["a"], ["a"])
    with pytest.raises(UserError, match="2 predictions for 1 targets"):
        score(["accuracy"], ["a"], ["a", "b"])
    with pytest.raises(UserError, match="no items to score"):
        score(["macro_f1"], [], [])
    for name in ("accuracy", "macro_f1", "exact_match"):  # of answers that fit, which no == would find
        with pytest.raises(UserError, match=f"{name}: a target is a list of answers; choose span_exact_match"):
            score([name], [["Paris"], ["Rome", "Roma"]], ["Paris", "Rome"])
    with pytest.raises(UserError, match="item 0 has 1 words but 2 predicted tags"):
        score(["entity_f1"], [["O"]], [["O", "O"]])
    assert {name for name, metric in METRICS.items() if metric.statistic} == {"macro_f1", "bleu", "entity_f1"}
