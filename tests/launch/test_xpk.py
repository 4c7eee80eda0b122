import shlex

import pytest
import shell

from launch import xpk
from launch.config import check, defaults
from launch.sweep import runs
from t5x_domain.errors import UserError

# `xpk workload create` of version 1.16, xpk/parser/workload.py.
FLAGS = {"workload", "cluster", "project", "zone", "tpu-type", "num-slices", "docker-image", "priority", "max-restarts"}
FLAGS |= {"restart-on-exit-codes", "termination-grace-period-seconds", "env", "command"}


@pytest.fixture
def config():
    config = defaults("xpk")
    config.accelerator = "v5e"
    config.topology = "16x16"
    config.slices = 2
    config.gin_files = ("gin/models/tiny.gin",)
    config.storage = "gs://bucket/runs"
    config.image = "registry/image:1"
    config.xpk.update(cluster="mine", project="mine", zone="us-west4-a")
    return config


def flags(config):
    (words,) = xpk.plan(config).commands
    assert words[:3] == ["xpk", "workload", "create"]
    return [word.removeprefix("--").partition("=")[::2] for word in words[3:]]


def test_xpk_knows_every_flag(config):
    config.env = {"A": "1", "B": "2"}
    check(config)
    found = flags(config)
    assert {name for name, _ in found} <= FLAGS
    assert [value for name, value in found if name == "env"] == ["A=1", "B=2"]
    found = dict(found)
    assert (found["tpu-type"], found["num-slices"]) == ("v5litepod-16x16", "2")


def restarted(codes):
    """xpk/commands/workload.py, get_restart_exit_codes: 42 and 127 to 255, and those named, ranges with a dash."""
    result = {42, *range(127, 256)}
    for item in codes.split(","):
        first, _, last = item.partition("-")
        result |= set(range(int(first), int(last or first) + 1))
    return result


def test_restarted_unless_finished_or_a_users_error(config):
    assert set(range(256)) - restarted(dict(flags(config))["restart-on-exit-codes"]) == {0, 2}


def test_bindings_arrive_word_for_word(config, tmp_path):
    config.overrides = (shell.NASTY,)
    (run,) = runs(config)
    # xpk puts it into a container's `bash -c`, of which Kubernetes makes `$$` a dollar.
    command = dict(flags(config))["command"].replace("$$", "$")
    assert "\n" not in command
    assert shlex.split(command) == ["exec", *run.program(config)]
    shell.put(tmp_path, "python", shell.SHOW_ARGUMENTS)
    assert shell.bash(tmp_path, f"({command})").stdout.startswith('["-m", "t5x_domain.train"')


def test_names_are_such_as_xpk_takes(config):
    # xpk/parser/validators.py: [a-z]([-a-z0-9]*[a-z0-9])?, at most 40 letters.
    config.sweep = (("Some.very_long_binding_name=123456",), ("Run.seed=2",))
    for run in runs(config):
        assert len(run.job_name) <= 40 and run.job_name.replace("-", "a").isalnum() and run.job_name[0].isalpha()


def test_one_that_is_there_already_is_to_be_deleted_first(config, tmp_path, monkeypatch, capfd):
    """xpk would ask whether to overwrite it (xpk/commands/workload.py); nobody answers."""
    shell.put(tmp_path, "xpk", "read -r answer || exit 1")
    monkeypatch.setenv("PATH", shell.environment(tmp_path)["PATH"])
    assert xpk.plan(config).carry_out() == 1
    said = capfd.readouterr().err
    assert "xpk workload create --workload=run ended with status 1" in said and "`xpk workload delete`" in said


def test_wrong_use(config):
    config.xpk.cluster = ""
    with pytest.raises(UserError, match="config.xpk.cluster is empty"):
        check(config)
