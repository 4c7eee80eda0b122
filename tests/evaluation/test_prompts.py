import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_domain.data.labelled import Labelled
from t5x_domain.errors import UserError
from t5x_domain.evaluation import prompts
from t5x_domain.evaluation.prompts import Prompt, candidates, check_template, choose_prompt, describe, leaked, subsample

TRAINING = [Labelled(f"t{i}", f"text {i}", f"label{i % 2}", {"topic": f"topic {i}"}) for i in range(20)]
ITEM = Labelled("x", "asked text", "label1", {"topic": "law"})


def test_a_prompt_shows_worked_examples_with_answers_and_then_the_item_without():
    prompt = Prompt("Q: {inputs} ({topic})\nA:", 0, ["Q: one (a)\nA: yes"])
    assert prompt.ask(ITEM) == "Q: one (a)\nA: yes\n\nQ: asked text (law)\nA:"


def test_candidates_are_all_templates_with_all_draws_the_default_first():
    found = candidates(["{inputs}", "Q: {inputs}"], TRAINING, shots=3, draws=4, seed=0)
    assert [(prompt.template, prompt.draw) for prompt in found] == [
        (template, draw) for template in ("{inputs}", "Q: {inputs}") for draw in range(4)
    ]
    assert all(len(set(prompt.shots)) == 3 for prompt in found)  # without replacement
    # A draw is the same items whatever the template.
    assert ["Q: " + shot for shot in found[1].shots] == list(found[5].shots)
    assert len({prompt.shots[0] + prompt.shots[1] for prompt in found[:4]}) > 1


def test_draws_depend_on_the_seed_alone_and_more_draws_keep_the_first_ones():
    few, more = (candidates(["{inputs}"], TRAINING, shots=2, draws=draws, seed=7) for draws in (2, 5))
    assert more[:2] == few
    assert candidates(["{inputs}"], TRAINING, shots=2, draws=2, seed=8) != few


def test_without_shots_there_is_one_prompt_for_a_template():
    assert candidates(["{inputs}"], [], shots=0, draws=10, seed=0) == [Prompt("{inputs}", 0, [])]


def test_answers_of_worked_examples():
    assert [prompts.answer_text(target) for target in ("yes", ["first", "second"], [])] == ["yes", "first", ""]


def test_each_model_gets_the_prompt_it_does_best_with():
    options = candidates(["{inputs}", "Q: {inputs}"], TRAINING, shots=1, draws=2, seed=0)
    likes_questions = choose_prompt(options, lambda prompt: 0.9 if prompt.template.startswith("Q") else 0.1)
    likes_draw_1 = choose_prompt(options, lambda prompt: float(prompt.draw))
    assert (likes_questions.prompt, likes_draw_1.prompt) == (options[2], options[1])
    assert likes_questions.tried == [0.1, 0.1, 0.9, 0.9]
    assert describe(likes_questions) == {
        "template": "Q: {inputs}",
        "draw": 0,
        "shots": 1,
        "validation_score": 0.9,
        "tried": 4,
        "validation_scores": {"lowest": 0.1, "highest": 0.9},
    }


def test_of_equal_prompts_the_first_is_chosen():
    options = candidates(["{inputs}"], TRAINING, shots=1, draws=5, seed=0)
    assert choose_prompt(options, lambda prompt: 0.5).prompt is options[0]


@given(st.integers(1, 30), st.integers(1, 30))
def test_a_subsample_keeps_order_and_repeats_nothing(items, most):
    chosen = subsample(range(items), most, seed=3)
    assert len(chosen) == min(items, most)
    assert chosen == sorted(set(chosen))
    assert chosen == subsample(range(items), most, seed=3)


def test_no_limit_takes_all():
    assert subsample([3, 1], None, seed=0) == [3, 1]


def test_leaked_items_are_counted_whatever_their_case_and_white_space():
    test = [ITEM, ITEM._replace(inputs="new"), ITEM._replace(inputs="TEXT  3")]
    assert leaked(test, TRAINING, [ITEM]) == 2


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("just words", "write one or more fields"),
        ("{inputs", "a brace twice"),
        ("{inputs} {label}", "tells the answer, field 'label'"),
        ("{inputs:{label}}", "by nothing but their names"),
        ("{inputs!r}", "by nothing but their names"),
    ],
)
def test_templates_that_ask_nothing_or_tell_the_answer_are_refused(template, said):
    with pytest.raises(UserError, match=said):
        check_template(template, "label")


def test_bad_requests_are_refused():
    with pytest.raises(UserError, match="item x: there is no field 'year', only topic, inputs; mend the template"):
        Prompt("{year}", 0, ()).ask(ITEM)
    with pytest.raises(UserError, match=r"there is no field 'topic\.__class__'"):
        Prompt("{topic.__class__}", 0, ()).ask(ITEM)
    with pytest.raises(UserError, match="2 training items are fewer than shots = 3"):
        candidates(["{inputs}"], TRAINING[:2], shots=3, draws=1, seed=0)
    with pytest.raises(UserError, match="no prompt template"):
        candidates([], TRAINING, shots=3, draws=1, seed=0)
