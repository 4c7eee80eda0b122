"""The guides' pictures and tables are those that the code gives, and their links, gin names and examples work."""

import re
import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from t5x_domain.kernels.relative_bias import relative_position_bucket

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GUIDES = ("attention.md", "objectives.md", "scaling.md")  # with pictures and tables of make_figures.py


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)  # where the script finds drawing.py
        yield runpy.run_path(str(DOCS / "make_figures.py"))


def test_pictures_and_tables_are_up_to_date(script, tmp_path):
    script["write"](tmp_path)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.*")}
    committed = [*map(Path, GUIDES), *(path.relative_to(DOCS) for path in (DOCS / "figures").iterdir())]
    assert sorted(made) == sorted(committed)
    for path, content in made.items():
        assert (DOCS / path).read_bytes() == content, f"docs/{path} is old: run python docs/make_figures.py"


def test_table_of_lengths_is_the_published_one(script):
    """T5's 568 raw tokens for 512 inputs and 114 targets (Raffel et al. 2020); X(3, 0.5) has 128 and 256 spans."""
    table = script["length_table"]()
    assert "| R(3, 0.15) | 568 | 512 | 114 | 28 | 1,137 | 1,024 | 229 | 57 |" in table
    assert "| X(3, 0.50) | 766 | 512 | 512 | 128 | 1,534 | 1,024 | 1,024 | 256 |" in table


def test_marked_text_is_the_text(script):
    """What the pictures show as one text is put together from inputs and targets; each sentinel once."""
    text = "one two three four five six seven eight nine ten"
    for objective in (script["SpanCorruption"](0.5, 2.0), script["PrefixLM"]("suffix"), script["CausalLM"]()):
        words = script["Words"]()
        example = objective(words.encode(text), script["np"].random.default_rng(0), words)
        items = script["whole_text"](example, words)
        assert " ".join(item.word for item in items) == text
        sentinels = [item.sentinel for item in items if item.sentinel]
        assert sentinels == list(range(1, objective.sentinels_needed(10) + 1))
        hidden = sum(item.hidden for item in items)
        assert hidden == len(example["targets"]) - 1 - len(sentinels)


def test_text_stays_on_the_card(script):
    """No line of a picture is wider than its card, by the widths that browsers are told to keep."""
    for path in (DOCS / "figures").iterdir():
        svg = ElementTree.parse(path).getroot()
        for text in svg.iter("{http://www.w3.org/2000/svg}text"):
            width = script["text_width"](text.text, float(text.get("font-size")))
            left = (
                float(text.get("x")) - width * {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor", "start")]
            )
            assert left > 0 and left + width < float(svg.get("width")), f"{path.name}: {text.text}"


def test_every_picture_is_shown_once():
    named = [name for guide in GUIDES for name in re.findall(r"\]\((figures/[^)]+)\)", (DOCS / guide).read_text())]
    assert sorted(named) == sorted(f"figures/{path.name}" for path in (DOCS / "figures").iterdir())


def test_example_of_attention_runs():
    (example,) = re.findall(r"^```python\n(.*?)^```", (DOCS / "attention.md").read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(example, "docs/attention.md", "exec"), {})


def test_slices_of_the_skewed_table_are_the_bias(script):
    """What the picture of the table shows side by side is T5's bucket of every query and key, lane for lane."""
    places = script["attention_figures"].strips_read()
    assert {name for name, *_ in places} == {"A1", "A2", "B1", "B2"}
    for name, _, row, first_key, _, buckets in places:
        queries, keys = row * 128 + np.arange(128), first_key + np.arange(buckets.shape[1])
        expected = relative_position_bucket(keys - queries[:, None], bidirectional=True)
        np.testing.assert_array_equal(buckets, expected, err_msg=name)


def test_guide_names_what_there_is(script):
    guide = (DOCS / "objectives.md").read_text()
    recipes = {path.name for path in (ROOT / "gin/recipes").glob("*.gin")}
    assert set(re.findall(r"^\| `(\w+\.gin)` \|", guide, re.MULTILINE)) == recipes
    assert {file for _, file, *_ in script["curricula_figures"].recipes()} == recipes
    other = {"suffix", "text", "id", "first_fit", "concat_and_split", "none", "tied", "gdes"}
    for name in set(re.findall(r"`'(\w+)'`", guide)) - other:
        assert name in script["PRESETS"], name


def test_what_is_left_to_test_slow_is_there():
    """Else a test that was given another name would run in `make test` again."""
    for line in (ROOT / "tests/slow.txt").read_text().splitlines():
        file, _, name = line.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), f"tests/slow.txt: {line} is not there"
