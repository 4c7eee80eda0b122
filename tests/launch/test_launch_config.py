import re

import pytest

from launch.config import TARGETS, check, defaults, find_gin
from t5x_domain.errors import UserError


@pytest.fixture
def config():
    config = defaults("local")
    config.gin_files = ("gin/models/tiny.gin",)
    return config


def test_good_as_it_is(config):
    check(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "a/b", "config.name = 'a/b'"),
        ("name", "", "config.name = ''"),
        ("gin_files", (), "config.gin_files is empty"),
        ("gin_files", ("no.gin",), "no.gin is not found"),
        ("overrides", ("TRAIN_STEPS",), "'TRAIN_STEPS' is no gin binding"),
        ("overrides", ("TRAIN_STEPS=",), "'TRAIN_STEPS=' is no gin binding"),
        ("overrides", ("--gin.TRAIN_STEPS=1",), "'--gin.TRAIN_STEPS=1' is no gin binding"),
        ("overrides", ("A=1\nB=2",), "has several lines"),
        ("overrides", ("RUN_DIR='x'",), "sets RUN_DIR"),
        ("sweep", (("Run.run_dir='x'",),), "config.sweep sets Run.run_dir"),
        ("sweep", ("Run.seed=1",), "config.sweep holds the text 'Run.seed=1'"),
        ("storage", "", "config.storage is empty"),
        ("max_restarts", -1, "config.max_restarts = -1"),
        ("notice_seconds", -1, "config.notice_seconds = -1"),
        ("slices", 2, "config.slices = 2: the target local has none to ask for"),
        ("accelerator", "v5e", "the target local runs 'cpu' or 'gpu'"),
    ],
)
def test_wrong_values_are_told_with_the_mend(config, field, value, message):
    config[field] = value
    with pytest.raises(UserError, match=re.escape(message)):
        check(config)


def test_variables_of_the_launcher_are_its_own(config):
    config.env = {"JAX_PROCESS_ID": "0"}
    with pytest.raises(UserError, match="config.env sets JAX_PROCESS_ID"):
        check(config)


def test_there_is_no_other_target():
    with pytest.raises(UserError, match="choose one of local, slurm, tpu_queued, gke_jobset, xpk"):
        defaults("kubernetes")


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_has_its_own_section_and_no_other(target):
    config = defaults(target)
    assert [other for other in TARGETS if other in config] == [target]
    with pytest.raises(AttributeError):
        config.no_such_field = 1
    config.env.XLA_FLAGS = "--any=1"


def test_gin_files_are_found_where_gin_finds_them(tmp_path):
    (tmp_path / "own.gin").write_text("")
    assert find_gin("own.gin", [str(tmp_path)]) == tmp_path / "own.gin"
    assert find_gin("models/tiny.gin").name == "tiny.gin"
