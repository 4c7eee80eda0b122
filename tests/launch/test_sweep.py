import pytest

from launch.config import defaults
from launch.sweep import environment, grid, runs
from t5x_domain.errors import UserError


@pytest.fixture
def config():
    config = defaults("local")
    config.name = "trial"
    config.gin_files = ("gin/models/tiny.gin", "b.gin")
    config.storage = "gs://bucket/runs/"
    return config


def test_a_single_run(config):
    (run,) = runs(config)
    assert (run.name, run.run_dir, run.bindings) == ("trial", "gs://bucket/runs/trial", ())


def test_a_grid_is_every_combination_the_last_axis_fastest():
    assert grid({"a.x": (0.5, 1.0), "DENOISERS": ("'t5'", "@mine()")}) == (
        ("a.x=0.5", "DENOISERS='t5'"),
        ("a.x=0.5", "DENOISERS=@mine()"),
        ("a.x=1.0", "DENOISERS='t5'"),
        ("a.x=1.0", "DENOISERS=@mine()"),
    )


def test_a_point_comes_after_the_overrides_and_wins(config):
    config.overrides = ("Run.seed=0", "TRAIN_STEPS=5")
    config.sweep = grid({"Run.seed": (7, 8)})
    assert [run.bindings for run in runs(config)] == [
        ("Run.seed=0", "TRAIN_STEPS=5", "Run.seed=7"),
        ("Run.seed=0", "TRAIN_STEPS=5", "Run.seed=8"),
    ]
    assert [run.name for run in runs(config)] == ["trial-Run.seed=7", "trial-Run.seed=8"]


def test_names_are_good_folders_and_do_not_depend_on_the_other_points(config):
    points = (("D='t5'",), ('D="t5"',), ("L={'inputs': 512, 'targets': 114}", "M=" + "x" * 100))
    config.sweep = points
    together = [run.name for run in runs(config)]
    alone = []
    for point in points:
        config.sweep = (point,)
        alone += [run.name for run in runs(config)]
    assert together == alone
    assert len(set(together)) == 3  # quotes are left out, and yet they are told apart
    assert together[0].startswith("trial-D=t5-")
    assert all(len(name) < 100 and not set(name) & set(" /'\"{}:") for name in together)


def test_a_point_twice_is_an_error(config):
    config.sweep = (("Run.seed=1",), ("Run.seed=1",))
    with pytest.raises(UserError, match="two points are trial-Run.seed=1"):
        runs(config)


@pytest.mark.parametrize(("name", "job"), [("trial", "trial"), ("a" * 40, "a" * 40)])
def test_a_good_name_is_the_jobs_as_well(config, name, job):
    config.name = name
    assert runs(config)[0].job_name == job


def test_other_names_are_made_labels_and_stay_apart(config):
    config.name = "7B_Model.v2"
    config.sweep = (("a.b=1",), ("a/b=1",), ("A.b=1",))
    labels = [run.job_name for run in runs(config)]
    assert len(set(labels)) == 3
    for label in labels:
        assert label.startswith("run-7b-model-v2-a") and len(label) <= 40


def test_the_program(config):
    config.overrides = ("A='x y'",)
    config.gin_search_paths = ("/more",)
    config.python = "python3"
    (run,) = runs(config)
    assert run.program(config) == [
        *("python3", "-m", "t5x_domain.train", "--gin_file=gin/models/tiny.gin", "--gin_file=b.gin"),
        *("--gin_search_path=/more", "--run_dir=gs://bucket/runs/trial", "--gin.A='x y'"),
    ]


def test_the_environment(config):
    assert environment(config) == {}
    config.compilation_cache = "gs://bucket/compiled"
    config.env = {"N": 3}
    assert environment(config) == {"JAX_COMPILATION_CACHE_DIR": "gs://bucket/compiled", "N": "3"}
