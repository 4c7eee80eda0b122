import html.parser
import re
import xml.etree.ElementTree as ET

import pytest

from t5x_domain.evaluation.verdict import Answers, Bootstrap, compare_corpus, compare_fine_tuned, compare_task, conclude
from t5x_domain.evaluation.verdict_figures import BeforeAfter, Forest, signed, tally_bar
from t5x_domain.evaluation.verdict_report import write_report

QUICK = Bootstrap(resamples=500)


def prompt(template, score):
    return {
        "template": template,
        "draw": 3,
        "shots": 3,
        "validation_score": score,
        "tried": 20,
        "validation_scores": {"lowest": 0.2, "highest": score},
    }


def entry(low, difference, high, outcome):
    return {"low": low, "difference": difference, "high": high, "outcome": outcome}


def make_task(name, base, adapted, items=200):
    targets = ["yes" if i % 2 else "no" for i in range(items)]
    answers = [
        Answers([t if i < share * items else "no" for i, t in enumerate(targets)], prompt("Q: {inputs}\nA:", 0.5))
        for share in (base, adapted)
    ]
    metrics = ["accuracy", "macro_f1"]
    return compare_task(name, "classification", metrics, targets, *answers, QUICK, labels=["no", "yes"])


def make_verdict(**more):
    answers = ["yes", "no"] * 40
    arguments = {
        "tasks": [
            make_task("medqa <b>", 0.2, 0.7),
            make_task("pubmedqa", 0.5, 0.52),
            make_task("casehold", 0.9, 0.5),
            make_task("a tie of few", 0.5, 0.5, items=20),
        ],
        "perplexity": [
            compare_corpus(
                "rfc",
                "domain",
                "nats_per_token",
                [(300.0, 90 + i) for i in range(40)],
                [(200.0 + i, 90 + i) for i in range(40)],
                QUICK,
            ),
            compare_corpus(
                "news",
                "general",
                "nats_per_token",
                [(210.0 + i % 7, 100) for i in range(40)],
                [(230.0 - i % 5, 100) for i in range(40)],
                QUICK,
            ),
        ],
        "fine_tuned": [
            compare_fine_tuned(
                "ner", "accuracy", answers, {0: ["no"] * 80, 1: ["no"] * 80}, {0: answers, 1: answers}, QUICK
            ),
        ],
        "notes": ["The vocabularies differ & so do tokens."],
    }
    return conclude("/models/base-model", "/models/domain <model>", QUICK, date="2026-01-02", **(arguments | more))


class Page(html.parser.HTMLParser):
    """Text and tags; fails on tags that are not closed in order."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(path.read_text(encoding="utf-8"))
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


CURVES = {"ner: loss": {"base": [(10, 2.0), (20, 1.5)], "adapted": [(10, 1.8), (20, 1.2)]}}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return Page(write_report(make_verdict(), tmp_path_factory.mktemp("verdict"), curves=CURVES))


def test_page_says_the_verdict_in_a_sentence(page):
    text = " ".join(page.text.split())
    assert "On 4 prompted tasks the adapted model wins 1 (25.0 %), ties 2 (50.0 %), loses 1 (25.0 %)." in text
    assert "On 1 corpus of the domain the adapted model wins. On 1 general corpus the adapted model loses." in text


def test_page_needs_neither_network_nor_script(page):
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "href") and not value.startswith("#")]


def test_names_are_shown_as_they_are_and_warnings_and_notes_stand_on_the_page(page):
    assert "domain <model>" in page.text
    assert "medqa <b>" in page.text
    assert "The vocabularies differ & so do tokens." in page.text
    assert "only 20 test items" in page.text
    assert "Q: {inputs}\nA:" in page.text


def test_every_picture_is_well_formed_and_has_words(tmp_path):
    text = write_report(make_verdict(), tmp_path, curves=CURVES).read_text(encoding="utf-8")
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    # A row: 4 tasks, 2 corpora twice, 1 fine-tuned; 3 axes; 4 bars of shares; 1 figure of curves.
    assert len(pictures) == 4 + 2 * 2 + 1 + 3 + 4 + 1
    for picture in pictures:
        assert ET.fromstring(picture).get("aria-label")


def test_page_of_a_single_part_leaves_the_others_out(tmp_path):
    page = Page(write_report(make_verdict(perplexity=[], fine_tuned=[], notes=[]), tmp_path))
    assert "Held-out text" not in page.text
    assert "after fine-tuning" not in page.text
    assert "Learning curves" not in page.text


def marks(svg):
    """x of what is drawn: (start and end of the bar, place of the mark)."""
    bar = re.search(r"d='M([\d.]+) [\d.]+H([\d.]+)M", svg)
    mark = re.search(r"fill='none'/><(?:path d='M|circle cx=')([\d.]+)", svg)
    return float(bar[1]), float(bar[2]), float(mark[1])


def test_forest_puts_zero_in_the_middle_and_keeps_all_intervals_inside():
    rows = [entry(0.01, 0.03, 0.05, "win"), entry(-0.09, -0.05, -0.01, "loss"), entry(-0.02, 0.0, 0.02, "tie")]
    forest = Forest(rows, unit=100)
    low, high, middle = marks(forest.cell(rows[2]))
    assert middle == 120  # half of the width of 240
    assert (low + high) / 2 == pytest.approx(120)
    assert marks(forest.cell(rows[0]))[0] > 120 > marks(forest.cell(rows[1]))[1]
    assert all(12 <= x <= 228 for row in rows for x in marks(forest.cell(row)))
    assert re.findall(r">([−+\d.]+)<", forest.axis()) == ["−10", "−5", "0", "+5", "+10"]


def test_outcomes_differ_in_shape_not_only_in_colour():
    rows = [entry(-0.1, 0.0, 0.1, outcome) for outcome in ("win", "tie", "loss")]
    drawn = [re.sub(r"#\w+|currentColor", "", Forest(rows).cell(row)) for row in rows]
    assert len({re.sub(r"aria-label='.*?'", "", svg) for svg in drawn}) == 3


def test_forest_of_identical_models_and_of_perplexity():
    same = entry(0.0, 0.0, 0.0, "tie")
    assert marks(Forest([same]).cell(same)) == (120, 120, 120)
    assert Forest([same], lower_is_better=True).sides == ("← adapted better", "adapted worse →")


def test_before_and_after_share_a_logarithmic_scale():
    scale = BeforeAfter([(10.0, 100.0), (1000.0, 100.0)])
    places = [float(x) for x in re.findall(r"M([\d.]+) [\d.]+H([\d.]+)", scale.cell(10.0, 100.0, "loss"))[0]]
    assert places == [12, 120]  # 10 at the margin, 100 half-way to 1000


def test_bar_of_shares_is_as_wide_as_they_are_and_leaves_out_what_there_is_not():
    bar = tally_bar({"count": 4, "win": 1, "tie": 3, "loss": 0})
    assert [float(x) for x in re.findall(r"width='([\d.]+)'", bar)] == [148, 448]  # 150 and 450 less the gaps


def test_numbers_have_signs():
    assert [signed(x) for x in (1.2345, -0.5, 0.0, -1e-12)] == ["+1.23", "−0.5", "0", "0"]
