"""The demo end to end at a size that a test can afford, beside a control that has nothing to learn."""

import dataclasses
import json

import gin
import jax
import numpy as np
import pytest

from t5x_domain import cli, demo
from t5x_domain.objectives.span_corruption import SpanCorruption

STEPS = 400
# Perplexity starts near the vocabulary's size, about 1,800 with a random output layer. Whoever knows only how often
# each piece occurs, and where sentinels stand, gets to about 80, a fall by 22; to get below 1,800 / 30 = 60 one has
# to use the words around a blank. Seen: 39 for the demo, 22 for the control.
FACTOR = 30


@gin.configurable
@dataclasses.dataclass(frozen=True)
class ShuffledTargets(SpanCorruption):
    """Span corruption whose blanks are filled with random words of the same text: the control."""

    name: str = "shuffled_targets"

    def __call__(self, tokens, rng, vocabulary):
        """As SpanCorruption, but for the words in the targets."""
        example = super().__call__(tokens, rng, vocabulary)
        targets = example["targets"].copy()
        first_sentinel = vocabulary.vocab_size - vocabulary.num_sentinels
        words = (targets < first_sentinel) & (targets != vocabulary.eos_id)
        targets[words] = rng.choice(tokens, words.sum())
        return {**example, "targets": targets}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """A laptop's: the suite's eight virtual devices share two cores and only make it slow."""
    device = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: device)


def run_demo(folder, capsys, *bindings):
    settings = {
        "VOCABULARY_SIZE": 1000,
        "ModelConfig.vocab_size": 1152,
        "ModelConfig.embed_dim": 128,
        "ModelConfig.mlp_dim": 256,
        "ModelConfig.head_dim": 32,
        "ModelConfig.num_encoder_layers": 2,
        "ModelConfig.num_decoder_layers": 2,
        "LENGTHS": {"inputs": 128, "targets": 36},
        "TRAIN_STEPS": STEPS,
    }
    flags = [f"--gin.{name}={value}" for name, value in settings.items()]
    with pytest.raises(SystemExit) as done:
        demo.main([f"--run_dir={folder}", *flags, *bindings])
    printed = capsys.readouterr()
    assert done.value.code == 0, printed.err
    return json.loads((folder / "eval.json").read_text()), printed.out


def falls(summary):
    return {
        c: summary["before"][c]["perplexity"] / summary["after"][c]["perplexity"] for c in ("biomedical", "general")
    }


def test_perplexity_falls_by_the_stated_factor(tmp_path, capsys):
    summary, printed = run_demo(tmp_path / "demo", capsys)
    assert falls(summary)["biomedical"] > FACTOR
    report = (tmp_path / "demo" / "report.html").read_text()
    for corpus in ("biomedical", "general"):
        shown = f"{summary['after'][corpus]['perplexity']:.1f}"
        assert shown in printed
        assert corpus in report
    assert "<svg" in report
    metrics = [json.loads(line) for line in (tmp_path / "demo" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == STEPS
    assert np.isfinite([line["loss"] for line in metrics]).all()


def test_the_control_does_not(tmp_path, capsys):
    summary, _ = run_demo(tmp_path / "control", capsys, "--gin.OBJECTIVE=@ShuffledTargets()")
    for fall in falls(summary).values():
        assert 10 < fall < FACTOR


def test_evaluate_repeats_what_training_found(tmp_path, capsys):
    flags = ["--gin.TRAIN_STEPS=2", "--gin.Run.eval_batches=1", "--gin.VOCABULARY_SIZE=1000"]
    with pytest.raises(SystemExit):
        demo.main([f"--run_dir={tmp_path}", "--gin.ModelConfig.vocab_size=1152", *flags])
    capsys.readouterr()
    from t5x_domain import evaluate

    with pytest.raises(SystemExit) as done:
        evaluate.main([f"--run_dir={tmp_path}"])
    assert done.value.code == 0
    after = json.loads((tmp_path / "eval.json").read_text())["after"]
    assert json.loads(capsys.readouterr().out) == {corpus: after[corpus] for corpus in ("biomedical", "general")}


def test_cli_has_a_module_for_every_verb():
    import importlib

    for verb in cli.VERBS:
        assert callable(importlib.import_module(f"t5x_domain.{verb}").main)
