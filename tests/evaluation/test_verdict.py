import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_domain.errors import UserError
from t5x_domain.evaluation.verdict import (
    Answers,
    Bootstrap,
    compare_corpus,
    compare_fine_tuned,
    compare_task,
    conclude,
    write_verdict,
)

QUICK = Bootstrap(resamples=1000)
PROMPT = {"template": "{inputs}", "draw": 0}


def task(right_base, right_adapted, *, name="task", labels=("no", "yes"), metrics=("accuracy",), targets=None):
    """A task of yes and no in turn; each model is right where its flags say so."""
    targets = targets or ["yes" if i % 2 else "no" for i in range(len(right_base))]
    flipped = {"yes": "no", "no": "yes"}
    answers = [
        Answers([t if right else flipped.get(t, "no") for t, right in zip(targets, flags, strict=True)], PROMPT)
        for flags in (right_base, right_adapted)
    ]
    return compare_task(name, "classification", metrics, targets, *answers, QUICK, labels=labels)


def shares(n, share):
    return [i < n * share for i in range(n)]


def test_a_clear_gain_is_a_win_a_clear_drop_a_loss_and_the_rest_a_tie():
    win = task(shares(200, 0.5), shares(200, 0.8))
    assert (win["outcome"], win["base"], win["adapted"]) == ("win", 0.5, 0.8)
    # The models differ in 60 items of 200, all to one side: mean .3, standard error sqrt(.3 * .7 / 200) = .0324.
    assert win["low"] == pytest.approx(0.3 - 1.96 * 0.0324, abs=0.01)
    assert win["high"] == pytest.approx(0.3 + 1.96 * 0.0324, abs=0.01)
    assert task(shares(200, 0.8), shares(200, 0.5))["outcome"] == "loss"
    assert task(shares(200, 0.5), shares(200, 0.505))["outcome"] == "tie"


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_exchanging_the_models_exchanges_wins_and_losses(flags):
    base, adapted = zip(*flags, strict=True)
    there, back = task(base, adapted), task(adapted, base)
    assert there["difference"] == pytest.approx(-back["difference"])
    # Holds exactly, since both draw the same items and the quantiles mirror each other.
    assert there["low"] == pytest.approx(-back["high"])
    assert {"win": "loss", "loss": "win", "tie": "tie"}[there["outcome"]] == back["outcome"]


def test_the_first_metric_decides_and_the_others_are_reported():
    # Half of the items of each label right: F1 is 1/2 for both labels.
    entry = task([True, True, False, False] * 20, [True] * 80, metrics=("accuracy", "macro_f1"))
    assert entry["metric"] == "accuracy"
    assert entry["other_metrics"] == {"macro_f1": {"base": 0.5, "adapted": 1.0}}


def test_warnings_name_what_makes_a_score_hollow():
    def said(**options):
        return " | ".join(task(shares(40, 0.5), shares(40, 0.6), **options)["warnings"])

    assert said() == ""
    assert "every test item is labelled 'no'" in said(targets=["no"] * 40)
    assert "no test item is labelled 'yes'" in said(targets=["no"] * 40)
    assert "2 of 40 test items have labels unseen in training ('maybe')" in said(targets=["maybe"] * 2 + ["no"] * 38)
    few = task([True] * 4, [True] * 4)["warnings"]
    assert few == ["only 4 test items, so that only a large difference can be seen"]


def test_empty_and_constant_answers_are_warned_of():
    targets = ["a"] * 20 + ["b"] * 20
    base, adapted = Answers([""] * 3 + ["a"] * 37, PROMPT), Answers(["b"] * 40, PROMPT)
    entry = compare_task("t", "text_to_text", ["exact_match"], targets, base, adapted, QUICK)
    assert entry["warnings"] == [
        "the base model wrote nothing for 3 of 40 items",
        "the adapted model gave every item the same answer, 'b'",
    ]


@pytest.mark.parametrize(("items", "said"), [(0, "0 test items cannot"), (1, "1 test item cannot")])
def test_a_test_set_without_two_items_is_refused(items, said):
    with pytest.raises(UserError, match=said):
        task([True] * items, [True] * items)


def test_models_that_answered_other_items_are_refused():
    with pytest.raises(UserError, match="task: 3 answers to 4 test items"):
        compare_task(
            "task", "classification", ["accuracy"], ["a"] * 4, Answers(["a"] * 4, {}), Answers(["a"] * 3, {}), QUICK
        )


def test_perplexity_is_of_the_whole_corpus_not_the_mean_of_documents():
    base, adapted = [(10.0, 5), (300.0, 100)] * 20, [(8.0, 5), (200.0, 100)] * 20
    entry = compare_corpus("rfc", "domain", "nats_per_token", base, adapted, QUICK)
    assert entry["base"] == pytest.approx(310 / 105)
    assert entry["perplexity"]["adapted"] == pytest.approx(math.exp(208 / 105))
    assert entry["outcome"] == "win"  # less is better
    assert entry["low"] < entry["difference"] < entry["high"] < 0


def test_forgetting_is_a_loss_and_bytes_have_no_perplexity():
    entry = compare_corpus("news", "general", "bits_per_byte", [(1.0, 1)] * 9, [(1.5, 1)] * 9, QUICK)
    assert entry["outcome"] == "loss"
    assert entry["perplexity"] is None
    assert entry["documents"] == 9


def test_documents_scored_on_other_text_are_refused():
    with pytest.raises(UserError, match="not scored on the same text"):
        compare_corpus("rfc", "domain", "bits_per_byte", [(1.0, 5)] * 2, [(1.0, 5), (1.0, 6)], QUICK)


def test_fine_tuned_models_are_compared_over_seeds_and_items():
    targets = ["a", "b"] * 50
    right = {0: targets, 1: targets[:-2] + ["b", "a"], 2: targets}
    wrong = {4: ["a"] * 100, 5: ["a"] * 99 + ["c"]}  # 'c' occurs in one seed only
    entry = compare_fine_tuned("t", "macro_f1", targets, wrong, right, QUICK)
    assert entry["outcome"] == "win"
    assert entry["seeds"] == {"base": [4, 5], "adapted": [0, 1, 2]}
    # Always 'a': F1 of a is 2/3, of b 0. With a 'c' for a 'b': the same two, and a third label with F1 = 0, where F1
    # of a is 2 * 50 / (50 + 99).
    assert entry["scores"]["base"] == pytest.approx([1 / 3, 100 / 149 / 3])
    assert entry["base"] == pytest.approx(np.mean(entry["scores"]["base"]))
    assert entry["adapted"] == pytest.approx(np.mean(entry["scores"]["adapted"]))
    assert any("fewer than five seeds" in text for text in entry["warnings"])


def test_summary_counts_outcomes_and_holm_takes_back_what_chance_would_give():
    clear = task(shares(100, 0.3), shares(100, 0.9), name="clear")
    # 8 items gained, 1 lost in 100: an interval just above 0, p of about .02, which ten looks make nothing of.
    flags = [False] * 8 + [True] * 92, [True] * 8 + [False] + [True] * 91
    close = task(*flags, name="close")
    even = [task(shares(100, 0.5), shares(100, 0.5), name=f"even{i}") for i in range(8)]
    verdict = conclude("base", "adapted", QUICK, tasks=[clear, close, *even])
    assert [entry["outcome"] for entry in verdict["tasks"][:3]] == ["win", "win", "tie"]
    assert [entry["outcome_holm"] for entry in verdict["tasks"][:3]] == ["win", "tie", "tie"]
    assert verdict["summary"] == {
        "tasks": {
            "count": 10,
            "win": 2,
            "tie": 8,
            "loss": 0,
            "percent": {"win": 20.0, "tie": 80.0, "loss": 0.0},
            "after_holm": {"win": 1, "tie": 9, "loss": 0},
        }
    }


def test_domain_and_general_corpora_are_counted_apart():
    gained = compare_corpus("rfc", "domain", "bits_per_byte", [(2.0, 1)] * 9, [(1.0, 1)] * 9, QUICK)
    forgot = compare_corpus("news", "general", "bits_per_byte", [(1.0, 1)] * 9, [(1.5, 1)] * 9, QUICK)
    summary = conclude("b", "a", QUICK, perplexity=[forgot, gained])["summary"]
    assert (summary["domain"]["win"], summary["general"]["loss"]) == (1, 1)


def test_verdict_is_written_whole_and_reads_back(tmp_path):
    verdict = conclude("b", "a", QUICK, tasks=[task(shares(40, 0.2), shares(40, 0.9))], date="2026-01-02")
    path = write_verdict(verdict, tmp_path / "new")
    assert json.loads(path.read_text()) == verdict
    assert verdict["schema"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["verdict.json"]


def test_nothing_to_conclude_from_and_bad_settings_are_refused():
    with pytest.raises(UserError, match="nothing was compared"):
        conclude("b", "a", QUICK)
    with pytest.raises(UserError, match="confidence = 95 must lie"):
        Bootstrap(confidence=95)
    with pytest.raises(UserError, match="resamples = 10 are too few"):
        Bootstrap(resamples=10)
