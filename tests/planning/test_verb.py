"""The verb's own work, around plans that this process compiles for its virtual devices."""

import json
import os

import pytest

from t5x_domain import cli, compile
from t5x_domain.errors import UserError
from t5x_domain.planning import verb
from t5x_domain.planning.plan import plan
from tests.planning import made_up

RUN = """
include 'gin/runs/pretrain.gin'
MODEL = @EncoderOnly
ModelConfig.vocab_size = 64
ModelConfig.embed_dim = 32
ModelConfig.mlp_dim = 32
ModelConfig.num_heads = 1
ModelConfig.head_dim = 16
ModelConfig.num_encoder_layers = 2
ModelConfig.num_decoder_layers = 0
ModelConfig.dtype = 'float32'
LENGTHS = {'inputs': 16}
BATCH_SIZE = 4
MeshShape.data = 4
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Calls the verb with flags; says its status and what it wrote. Nothing is left in the environment."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    (tmp_path / "run.gin").write_text(RUN)

    def call(*flags, compile_one=lambda case, timeout: plan(case)):
        monkeypatch.setattr(verb, "plan_elsewhere", compile_one)
        statuses = []
        monkeypatch.setattr(cli, "run", lambda name, body: statuses.append(body()))
        output = tmp_path / "plan.json"
        compile.main([f"--gin_file={tmp_path / 'run.gin'}", "--topology=cpu:4", f"--json={output}", *flags])
        return statuses[0], json.loads(output.read_text())

    return call


def test_a_search_compiles_and_ranks_what_fits(call, capsys):
    """One head cannot be shared, so there are three meshes; two may be compiled, and nothing bounds their time."""
    status, written = call("--search", "--search_limit=2", "--remats=none")
    told = capsys.readouterr().out
    assert status == 0
    assert "--search_limit=2 is reached" in told
    spread, copied = written["search"]  # the least memory first
    assert (spread["mesh"]["data"], spread["mesh"]["fsdp"]) == (2, 2)
    assert (copied["mesh"]["data"], copied["mesh"]["fsdp"]) == (4, 1)
    assert 2 * spread["memory"]["parameters"] < 1.1 * copied["memory"]["parameters"]
    assert "the first: --gin.MeshShape.slice=1 --gin.MeshShape.data=2 --gin.MeshShape.fsdp=2" in told


def test_a_run_that_does_not_fit_is_changed_until_it_does(call, capsys):
    too_much = made_up.memory(state=1, temporaries=30)
    plans = [made_up.plan(too_much), made_up.plan(remat="minimal")]
    status, written = call(compile_one=lambda case, timeout: plans.pop(0))
    assert status == 1
    assert written["advice"][0]["bindings"] == ["ModelConfig.remat = 'minimal'"]
    assert """it fits with --gin.ModelConfig.remat="'minimal'\"""" in capsys.readouterr().out


def test_a_limit_of_no_advice(call):
    too_much = made_up.plan(made_up.memory(state=1, temporaries=30))
    assert call("--advice_limit=0", compile_one=lambda case, timeout: too_much)[1]["advice"] == []


def test_what_writes_answers_is_not_searched(call):
    with pytest.raises(UserError, match="leave --decode out"):
        call("--search", "--decode")


def test_rows_that_no_mesh_divides(call):
    with pytest.raises(UserError, match="no mesh of 4 devices divides 3, 6 rows; give others with --batch_sizes"):
        call("--search", "--batch_sizes=6,3")


def test_a_file_that_cannot_be_written_is_named(call, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--json=.*file/plan.json: .*; name a file that you may write"):
        call(f"--json={tmp_path / 'file' / 'plan.json'}", compile_one=lambda case, timeout: made_up.plan())
