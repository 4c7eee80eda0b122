import subprocess
import sys
import time
from pathlib import Path

import pytest

from t5x_domain import cli

REPOSITORY = Path(__file__).parents[1]
VERBS = ["prepare", "train", "evaluate", "convert", "demo"]


def run(*arguments, cwd=REPOSITORY):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("verb", VERBS)
def test_help_answers_at_once_and_imports_nothing_heavy(verb):
    script = (
        f"import sys, runpy; sys.argv = ['{verb}', '--help']\n"
        f"try: runpy.run_module('t5x_domain.{verb}', run_name='__main__')\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "assert not {'jax', 'tensorflow', 'seqio', 'numpy'} & set(sys.modules), 'heavy'"
    )
    began = time.monotonic()
    result = run("-c", script)
    assert result.returncode == 0, result.stderr
    assert "--gin_file" in result.stdout
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gin_fil=x"], "unrecognized arguments"),
        (["--gin.TRAIN_STEPS"], "--gin.NAME=VALUE"),
        ([], "--gin_file is needed"),
    ],
)
def test_flag_errors_answer_at_once(flags, message):
    began = time.monotonic()
    result = run("-m", "t5x_domain.train", *flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert time.monotonic() - began < 3


def test_the_console_script_is_the_same_call():
    script = "import sys; sys.argv = ['t5x-domain', {}]; from t5x_domain.cli import main; main()"
    same = run("-c", script.format("'train', '--help'"))
    assert same.stdout == run("-m", "t5x_domain.train", "--help").stdout
    unknown = run("-c", script.format("'trian'"))
    assert unknown.returncode == 2
    assert "train" in unknown.stderr


def test_gin_files_are_found_from_anywhere(tmp_path):
    script = "from t5x_domain import cli; cli.load_gin(['gin/models/tiny.gin', 'models/tiny.gin'], [])"
    result = run("-c", script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_training_imports_neither_tensorflow_nor_seqio():
    script = (
        "import sys\n"
        "sys.modules['tensorflow'] = sys.modules['seqio'] = None  # importing them now fails\n"
        "from t5x_domain import configurables\n"
        "from t5x_domain.training import loop"
    )
    result = run("-c", script)
    assert result.returncode == 0, result.stderr


def test_interrupted(capsys):
    def body():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        cli.run("convert", body)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "t5x-domain convert: interrupted\n"
