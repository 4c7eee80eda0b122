import html.parser
import json
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from t5x_domain.errors import UserError
from t5x_domain.evaluation import figures
from t5x_domain.evaluation.fill import Blank, Filled
from t5x_domain.evaluation.report import write_report

FILLED = Filled(
    ("Each router forwards a", " to the ", "."),
    (Blank(" packet", " packet", True), Blank("next hop", "<script>alert(1)</script>", False)),
)


def scores(perplexity, bits_per_byte, accuracy):
    return {
        "loss": math.log(perplexity),
        "perplexity": perplexity,
        "bits_per_byte": bits_per_byte,
        "accuracy": accuracy,
        "targets": 48211,
    }


def logged(step, corpus_loss, loss=3.0714):
    return {
        "step": step,
        "loss": loss,
        "accuracy": 0.4,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_second": 181704.0 + step,
        "skipped": 7,
        "corpus_loss": corpus_loss,
        "denoiser_loss": {"r3_15": 2.0 + step / 100, "s": None},
    }


def make_run(folder, before, after, metrics, config="Run.batch_size = 128\n"):
    folder.mkdir(parents=True)
    last = metrics[-1]["step"]
    evaluations = [{"step": 0, "corpora": before}, {"step": last, "corpora": after}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    (folder / "eval.json").write_text(json.dumps({"before": {"step": 0, **before}, "after": {"step": last, **after}}))
    (folder / "config.gin").write_text(config)
    shares = {"corpora": {name: 1 / len(after) for name in after}, "denoisers": {"r3_15": 0.75, "s": 0.25}}
    (folder / "phases.json").write_text(
        json.dumps(
            [
                {"name": "main", "start": 0, "stop": 54, "raw_tokens": 54321, **shares},
                {
                    "name": "<cooldown>",
                    "start": 54,
                    "stop": last,
                    "raw_tokens": 6000,
                    **shares,
                    "denoisers": {"s": 1.0},
                },
            ]
        )
    )
    return folder


@pytest.fixture
def run_dir(tmp_path):
    return make_run(
        tmp_path / "networking-small",
        {"rfc": scores(31904.4, 4.013, 0.001), "law": scores(28117.0, 3.871, 0.002)},
        {"rfc": scores(21.834, 1.084, 0.571), "law": scores(146.26, 1.944, 0.432)},
        [logged(step, {"rfc": 3.0, "law": None if step % 3 else 2.5}) for step in range(1, 61)],
    )


def text_of(page):
    """The page's text as a reader sees it, white space collapsed."""

    class Reader(html.parser.HTMLParser):
        text = ""

        def handle_data(self, data):
            self.text += data

    reader = Reader()
    reader.feed(re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
    return " ".join(reader.text.split())


def svgs(page):
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_says_what_was_learned(run_dir):
    text = text_of(write_report(run_dir, filled=[FILLED]).read_text())
    assert "networking-small" in text
    assert (
        "In 60 updates, held-out perplexity went from 31,904 to 21.83 on rfc (1.08 bits per byte) "
        "and from 28,117 to 146.3 on law (1.94 bits per byte)."
    ) in text
    # Rates are 181,705 … 181,764; the median of 60 is between the 30th and the 31st, 181,734.5.
    assert "60 updates · final training loss 3.07 · 181,734 tokens per second (median) · 7 updates skipped" in text
    assert "rfc 48,211 targets31,904 → 21.834.01 → 1.080.1% → 57.1%" in text
    assert "law 48,211 targets28,117 → 146.33.87 → 1.940.2% → 43.2%" in text
    assert "The model wrote 1 of 2 spans" in text
    # By phase; the loss of the last six of 60 updates: r3_15 2 + 57.5 / 100, law 2.5 at steps 57 and 60.
    assert "Share of the textmain<cooldown>Loss" in text
    assert "law50.0%50.0%2.50" in text and "r3_1575.0%0.0%2.58" in text and "s25.0%100.0%–" in text
    assert "<cooldown>: updates 55 to 60, 6,000 tokens of text." in text
    assert "Run.batch_size = 128" in text


def test_binary_decisions_are_shown_by_their_cross_entropy(tmp_path):
    """A discriminator has no perplexity; the page says what it has, in the headline, the table and the figure."""
    score = lambda loss, accuracy: {"loss": loss, "accuracy": accuracy, "targets": 512}  # noqa: E731
    folder = make_run(
        tmp_path / "rtd", {"law": score(0.6931, 0.5)}, {"law": score(0.25, 0.9)}, [logged(9, {"law": 0.3})]
    )
    page = write_report(folder).read_text()
    text = text_of(page)
    assert "In 9 updates, held-out binary cross-entropy went from 0.69 to 0.25 on law." in text
    assert "Corpus Binary cross-entropy Accuracy".replace(" ", "") in text.replace(" ", "")
    assert "law 512 targets0.69 → 0.2550.0% → 90.0%" in text
    assert "erplexity" not in text
    assert svgs(page)[1].get("aria-label").startswith("Held-out binary cross-entropy:")


def test_shows_blanks_as_written_and_the_original_beside_what_differs(run_dir):
    page = write_report(run_dir, filled=[FILLED]).read_text()
    assert "forwards a <mark class='same'>packet</mark> to the " in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;</mark> <ins>next hop</ins>." in page
    skipped = Filled(("a", "b"), (Blank(" x", "", False),))
    assert (
        "a <mark class='other'><i>nothing</i></mark> <ins>x</ins>b"
        in write_report(run_dir, filled=[skipped]).read_text()
    )


def test_without_fills_there_is_no_such_section(run_dir):
    assert "Filling in the blanks" not in write_report(run_dir).read_text()


def test_escapes_all_text(tmp_path):
    evil = "<script>x</script>&$_$"
    after = {evil: scores(2.0, 1.0, 0.5), "law": scores(2.0, 1.0, 0.5)}
    folder = tmp_path / "<script>run"
    metrics = [logged(1, {evil: 1.0, "law": 1.0}), logged(2, {evil: 1.0, "law": 1.0})]
    make_run(folder, after, after, metrics, config="a = '<script>'\n")
    fills = [Filled((evil, evil), (Blank(evil, evil, correct),)) for correct in (True, False)]
    page = write_report(folder, filled=fills).read_text()
    assert "<script" not in page
    # Headline, table, legend, share; twice two pieces, one hit, one miss and its original.
    assert page.count("&lt;script&gt;x&lt;/script&gt;&amp;$_$") == 4 + 4 + 3
    assert text_of(page).count("<script>run") == 2


def test_needs_nothing_from_elsewhere(run_dir):
    page = write_report(run_dir, filled=[FILLED]).read_text()
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\((?!#)|\bsrc=", page)
    # Names of XML namespaces are the only addresses.
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_figures_take_the_colour_of_the_text_and_have_ids_of_their_own(run_dir):
    page = write_report(run_dir).read_text()
    figures = svgs(page)
    assert len(figures) == 4
    labels = [figure.get("aria-label").partition(":")[0] for figure in figures]
    assert labels == ["Training loss", "Held-out perplexity", "Learning rate", "Throughput"]
    identifiers = [re.findall(r'id="([mp][0-9a-f]{8,})"', ET.tostring(f, "unicode")) for f in figures]
    flat = [identifier for found in identifiers for identifier in found]
    assert len(flat) == len(set(flat)) > 0
    for figure in figures:
        texts = [element for element in figure.iter("{http://www.w3.org/2000/svg}text")]
        assert texts
        assert all("currentColor" in element.get("style", "") for element in texts)


def test_the_same_run_gives_the_same_bytes(run_dir):
    assert write_report(run_dir).read_bytes() == write_report(run_dir).read_bytes()


@pytest.mark.parametrize("perplexity", [1.0, 29.0, math.nan, math.exp(700)])
@pytest.mark.parametrize("corpus_loss", [None, 3.0])
def test_shortest_run(tmp_path, perplexity, corpus_loss):
    """One corpus, one logged step, nothing learned or all gone wrong."""
    after = {"_$c$": scores(perplexity, 1.0, 0.5)}
    folder = make_run(tmp_path / "run", {"_$c$": scores(30.0, 1.0, 0.5)}, after, [logged(1, {"_$c$": corpus_loss})])
    page = write_report(folder).read_text()
    assert len(svgs(page)) == 4
    assert "In 1 update, held-out perplexity went from 30.00 to" in text_of(page)
    assert "all corpora" not in page


def test_losses_that_are_not_finite_leave_gaps(run_dir):
    metrics = [logged(step, {"rfc": math.nan, "law": None}, loss=math.inf) for step in (1, 2)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    page = write_report(run_dir).read_text()
    assert "final training loss inf" in text_of(page)
    assert not any("nan" in element.get("d", "") for svg in svgs(page) for element in svg.iter())


def test_moving_average_by_hand():
    # 40 values: a window of two; the mean of a constant is that constant at the ends as well.
    assert np.allclose(figures._moving_average(np.full(40, 3.0)), 3.0)
    alternating = np.tile([0.0, 1.0], 20)
    assert np.allclose(figures._moving_average(alternating)[1:], 0.5)
    # Fewer than 40 values are shown as they are.
    assert np.array_equal(figures._moving_average(np.array([1.0, 5.0])), [1.0, 5.0])


@pytest.mark.parametrize("name", ["eval.json", "metrics.jsonl", "evaluations.jsonl", "phases.json", "config.gin"])
def test_a_missing_file_is_named_and_no_report_is_written(run_dir, name):
    (run_dir / name).unlink()
    with pytest.raises(UserError, match=rf"{re.escape(name)} is missing"):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()


def test_a_damaged_file_is_named(run_dir):
    (run_dir / "eval.json").write_text('{"before": ')
    with pytest.raises(UserError, match=r"eval\.json is damaged"):
        write_report(run_dir)


def test_complete_or_absent(run_dir, monkeypatch):
    written = write_report(run_dir).read_text()

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_report(run_dir, filled=[FILLED])
    assert (run_dir / "report.html").read_text() == written
    (run_dir / "report.html").unlink()
    with pytest.raises(OSError, match="no space"):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()
