"""With a stand-in for wandb; with wandb itself, offline, where it is installed."""

import json
import os
import subprocess
import sys
from types import ModuleType

import pytest

from t5x_domain.errors import UserError
from t5x_domain.files import Growing
from t5x_domain.training.metrics import MetricsWriter
from t5x_domain.training.weights_and_biases import WeightsAndBiases


class StandIn(ModuleType):
    """Keeps what it is told."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.logged, self.finished, self.refusal = [], [], 0, None

    def init(self, **arguments):
        if self.refusal:
            raise self.Error(self.refusal)
        self.begun.append(arguments)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def stand_in(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_it_is_told_what_tensorboard_is_told(stand_in, tmp_path):
    wandb = WeightsAndBiases("law", Growing(tmp_path), {"Run.seed": 0})
    writer = MetricsWriter(Growing(tmp_path), 0, begins=True, wandb=wandb)
    writer.log(1, {"loss": 2.0, "mfu": None, "corpus_loss": {"cases": 3.0}})
    writer.evaluated(1, {"cases": {"loss": 4.0}})
    writer.close()
    wandb.close()
    assert stand_in.logged == [
        (1, {"train/loss": 2.0, "train/corpus_loss/cases": 3.0}),
        (1, {"held_out/cases/loss": 4.0}),
    ]
    assert (stand_in.begun[0]["project"], stand_in.begun[0]["config"]) == ("law", {"Run.seed": 0})
    assert stand_in.finished == 1


def test_a_run_that_goes_on_goes_on_there(stand_in, tmp_path):
    for _ in range(2):
        WeightsAndBiases("law", Growing(tmp_path / "a"), {}).close()
    WeightsAndBiases("law", Growing(tmp_path / "b"), {}).close()
    first, again, other = (begun["id"] for begun in stand_in.begun)
    assert first == again == json.loads((tmp_path / "a" / "wandb.json").read_text())["id"]
    assert other != first
    assert {begun["resume"] for begun in stand_in.begun} == {"allow"}


def test_without_wandb_there_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(
        UserError, match=r"Run.wandb_project = 'law': .*not installed; pip install 't5x_domain\[wandb\]'"
    ):
        WeightsAndBiases("law", Growing(tmp_path), {})
    assert not list(tmp_path.iterdir())


def test_what_wandb_refuses_is_handed_on(stand_in, tmp_path):
    stand_in.refusal = "No API key\nconfigured."
    with pytest.raises(UserError, match=r"'law': No API key configured. Log in with `wandb login`, set WANDB_MODE=off"):
        WeightsAndBiases("law", Growing(tmp_path), {})


def test_offline_with_wandb_itself(tmp_path):
    """In a process of its own, for wandb's own writer ends with the process."""
    pytest.importorskip("wandb")
    program = """
import pathlib, sys
from t5x_domain.files import Growing
from t5x_domain.training.weights_and_biases import WeightsAndBiases
wandb = WeightsAndBiases("law", Growing(pathlib.Path(sys.argv[1])), {"Run.seed": 0})
wandb.log(1, {"train/loss": 2.0})
wandb.close()
"""
    offline = {**os.environ, "WANDB_MODE": "offline"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=offline, check=True, capture_output=True)
    (written,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = written.read_bytes()
    assert b"train/loss" in content and b"Run.seed" in content
