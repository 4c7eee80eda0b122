"""Compiled programs are kept on disk, so that the next start of a run does not compile them again."""

import jax
from etils import epath

from t5x_domain.errors import UserError


def use_compilation_cache(asked: str | None, run_dir: str) -> None:
    """Where JAX keeps what it has compiled: `asked`, else JAX_COMPILATION_CACHE_DIR, else in the run directory.

    A program is found again by its text, the compiler's version and options, and the kind of device; those that took
    less than a second to compile are not kept. JAX_ENABLE_COMPILATION_CACHE=false keeps none. What is found is trusted
    and run as it is, so nobody else should be able to write there.

    Raises:
      UserError: `asked` cannot be created.
    """
    if asked is None and jax.config.jax_compilation_cache_dir is not None:
        return
    if asked is not None:
        try:
            epath.Path(asked).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--compilation_cache={asked}: {error.strerror}; give a folder that you may write."
            ) from error
    jax.config.update("jax_compilation_cache_dir", asked or str(epath.Path(run_dir) / "compilation_cache"))
