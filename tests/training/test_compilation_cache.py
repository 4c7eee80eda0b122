import jax
import pytest

from t5x_domain.errors import UserError
from t5x_domain.training.compilation_cache import use_compilation_cache


@pytest.fixture(autouse=True)
def no_environment():
    """As if JAX_COMPILATION_CACHE_DIR, which the suite itself sets, were not."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_flag_comes_before_the_environment_and_that_before_the_run(tmp_path):
    use_compilation_cache(None, str(tmp_path / "run"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "run" / "compilation_cache")
    assert not (tmp_path / "run").exists()  # a start that is refused must not leave it
    jax.config.update("jax_compilation_cache_dir", "from the environment")
    use_compilation_cache(None, str(tmp_path / "run"))
    assert jax.config.jax_compilation_cache_dir == "from the environment"
    use_compilation_cache(str(tmp_path / "asked"), str(tmp_path / "run"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "asked")


def test_the_run_may_be_in_a_bucket():
    use_compilation_cache(None, "gs://bucket/runs/1")
    assert jax.config.jax_compilation_cache_dir == "gs://bucket/runs/1/compilation_cache"


def test_a_place_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--compilation_cache=.*file/x: Not a directory; give a folder"):
        use_compilation_cache(str(tmp_path / "file" / "x"), str(tmp_path))
