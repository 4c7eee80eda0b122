import jax
import pytest

from t5x_domain.errors import UserError
from t5x_domain.training.compilation_cache import use_compilation_cache


@pytest.fixture(autouse=True)
def no_environment():
    """As if JAX_COMPILATION_CACHE_DIR, which the suite itself sets, were not."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_enable_xla_caches")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_flag_comes_before_the_environment_and_that_before_the_run(tmp_path):
    use_compilation_cache(None, str(tmp_path / "run"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "run" / "compilation_cache")
    assert not (tmp_path / "run").exists()  # a start that is refused must not leave it
    jax.config.update("jax_compilation_cache_dir", "from the environment")
    use_compilation_cache(None, str(tmp_path / "run"))
    assert jax.config.jax_compilation_cache_dir == "from the environment"
    use_compilation_cache(str(tmp_path / "asked"), str(tmp_path / "run"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "asked")
    assert jax.config.jax_persistent_cache_enable_xla_caches != "none"


@pytest.mark.parametrize("chosen", [None, "gs://bucket/cache"])
def test_in_a_bucket_xla_keeps_nothing_of_its_own(chosen):
    """It writes to disks only; JAX would give it a folder named "gs:"."""
    jax.config.update("jax_compilation_cache_dir", chosen)
    use_compilation_cache(None, "gs://bucket/runs/1")
    assert jax.config.jax_compilation_cache_dir == (chosen or "gs://bucket/runs/1/compilation_cache")
    assert jax.config.jax_persistent_cache_enable_xla_caches == "none"


def test_a_place_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--compilation_cache=.*file/x: Not a directory; give a folder"):
        use_compilation_cache(str(tmp_path / "file" / "x"), str(tmp_path))
    with pytest.raises(UserError, match="hdfs://cache: neither a path of this machine nor gs:// or s3://"):
        use_compilation_cache("hdfs://cache", str(tmp_path))
