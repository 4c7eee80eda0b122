"""`python -m launch` as a user calls it: every file of configs/, wrong uses, and a real training of the sample."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch import status
from launch.config import TARGETS, defaults

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (REPOSITORY / "configs").glob("*.py") if path.name != "__init__.py")


def launch(*flags):
    # The suite's eight virtual devices are no business of the launcher's; compiling without haste is.
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": ""}
    return subprocess.run(
        [sys.executable, "-m", "launch", *flags],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_headed_by_a_command_that_works(path):
    commands = re.findall(r"^python -m launch --config(?:.*\\\n)*.*", path.read_text(), flags=re.M)
    assert commands
    for command in commands:
        words = shlex.split(command.replace("\\\n", ""))
        assert words[:4] == ["python", "-m", "launch", f"--config=configs/{path.name}"]
    dry_runs = [command for command in commands if "--dry_run" in command] or [f"{commands[0]} --dry_run"]
    result = launch(*shlex.split(dry_runs[0])[3:])
    assert result.returncode == 0, result.stderr
    assert "t5x_domain.train" in result.stdout


def test_a_dry_run_writes_nothing(tmp_path):
    result = launch("--config=configs/slurm_h200.py", f"--config.logs={tmp_path / 'logs'}", "--dry_run")
    assert f"# {tmp_path}/logs/large-h200.sbatch" in result.stdout
    assert result.stdout.rstrip().endswith(f"sbatch {tmp_path}/logs/large-h200.sbatch")
    assert list(tmp_path.iterdir()) == []


def test_a_config_may_take_an_argument(tmp_path):
    lines = ["from configs import local", "def get_config(name):", "    config = local.get_config()"]
    (tmp_path / "named.py").write_text("\n".join([*lines, "    config.name = name", "    return config"]))
    result = launch(f"--config={tmp_path / 'named.py'}:other", "--dry_run")
    assert "--run_dir=runs/other" in result.stdout, result.stderr


def test_flags_set_fields_bindings_with_quotes_among_them():
    overrides = """("A='x y'", "B={'a': 1}")"""
    result = launch("--config=configs/local.py", "--config.name=other", f"--config.overrides={overrides}", "--dry_run")
    words = shlex.split(result.stdout)
    assert words[-3:] == ["--run_dir=runs/other", "--gin.A='x y'", "--gin.B={'a': 1}"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=configs/local.py", "--config.local.processes=0"], "config.local.processes = 0"),
        (["--config=configs/local.py", "--config.storage="], "config.storage is empty"),
        (["--config=configs/gke_jobset.py", "--config.storage=runs"], "set it to gs://bucket/folder"),
        (["--config=configs/tpu_v5e_256.py", "--config.topology=4x4x4"], "v5e has 2 axes"),
        (["--config=configs/tpu_v5e_256.py", "--config.topology=8x16"], "cannot be laid over the 128 devices"),
        (["--config=configs/nothing.py"], "--config=configs/nothing.py: there is no such file"),
    ],
)
def test_a_users_error_is_one_sentence_and_status_2(flags, message):
    result = launch(*flags, "--dry_run")
    assert result.returncode == 2
    assert result.stderr.startswith("launch: error: ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--config is needed"),
        (["--config=configs/local.py", "trial"], "flags only"),
        (["--config=configs/local.py", "--config.nome=trial"], "nome"),
    ],
)
def test_wrong_flags(flags, message):
    result = launch(*flags)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr


def test_what_gin_refuses_is_not_submitted(tmp_path):
    result = launch(
        *("--config=configs/slurm_h200.py", f"--config.logs={tmp_path / 'logs'}"),
        "--config.overrides=('TRAIN_STEPS=5', 'MeshShape.fdsp=8')",
    )
    assert result.returncode == 2
    assert "MeshShape" in result.stderr and "fdsp" in result.stderr
    assert list(tmp_path.iterdir()) == []


TINY = """
include 'gin/models/tiny.gin'
include 'gin/mixtures/sample.gin'
include 'gin/runs/pretrain.gin'
VOCABULARY = @ByteVocabulary()
prepare.vocabulary_size = None
LENGTHS = {{'inputs': 32, 'targets': 16}}
ModelConfig.embed_dim = 16
ModelConfig.mlp_dim = 16
ModelConfig.num_heads = 1
ModelConfig.num_encoder_layers = 1
ModelConfig.num_decoder_layers = 1
Run.eval_batches = 1
Run.log_every = 1
BATCH_SIZE = 4
CACHE_DIR = '{cache}'
"""


@pytest.fixture(scope="module")
def gin_file(tmp_path_factory):
    """The sample prepared for byte-level text, and the gin file that trains on it."""
    folder = tmp_path_factory.mktemp("launch")
    path = folder / "tiny.gin"
    path.write_text(TINY.format(cache=folder / "cache"))
    prepare = [sys.executable, "-m", "t5x_domain.prepare", f"--gin_file={path}"]
    subprocess.run([*prepare, "--gin.RUN_DIR='unused'", "--gin.TRAIN_STEPS=1"], cwd=REPOSITORY, check=True)
    return path


def test_a_run_is_trained_here_and_the_table_tells(gin_file, tmp_path):
    result = launch(
        "--config=configs/local.py",
        "--config.local.processes=2",
        f"--config.storage={tmp_path / 'runs'}",
        f"--config.logs={tmp_path / 'logs'}",
        f"--config.gin_files=('{gin_file}',)",
        "--config.overrides=('TRAIN_STEPS=3', 'MeshShape.fsdp=2')",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "launch: ended with status 0"
    first, second = ((tmp_path / "logs" / "local" / f"process-{i}.txt").read_text() for i in (0, 1))
    assert "'data': 2, 'fsdp': 2" in first and "held-out" not in second  # two virtual devices each
    assert json.loads((tmp_path / "runs" / "local" / "launch.json").read_text()) == {"exit_status": 0}
    row = status.table([str(tmp_path / "runs")]).splitlines()[1]
    assert row.startswith("local") and " 3/3 " in row and row.endswith("finished")


def test_the_guide_names_every_config():
    guide = (REPOSITORY / "docs" / "launch.md").read_text()
    assert set(re.findall(r"\]\(\.\./configs/(\w+\.py)\)", guide)) == {path.name for path in CONFIGS}
    for name in set(re.findall(r"`config\.(\w+)", guide)) - {"gin"}:
        assert any(name in defaults(target) for target in TARGETS), name
