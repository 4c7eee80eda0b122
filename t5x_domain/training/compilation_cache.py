"""Compiled programs are kept on disk, so that the next start of a run does not compile them again."""

import jax

from t5x_domain import files
from t5x_domain.errors import UserError


def use_compilation_cache(asked: str | None, run_dir: str) -> None:
    """Where JAX keeps what it has compiled: `asked`, else JAX_COMPILATION_CACHE_DIR, else in the run directory.

    A program is found again by its text, the compiler's version and options, and the kind of device; those that took
    less than a second to compile are not kept. JAX_ENABLE_COMPILATION_CACHE=false keeps none. What is found is trusted
    and run as it is, so nobody else should be able to write there.

    Raises:
      UserError: `asked` cannot be created, or has a scheme that is not read.
    """
    if asked is not None:
        try:
            files.path(asked).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--compilation_cache={asked}: {error.strerror}; give a folder that you may write."
            ) from error
    chosen = asked or jax.config.jax_compilation_cache_dir or str(files.path(run_dir) / "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", chosen)
    if files.is_remote(chosen):  # there XLA would keep what it has tuned for GPUs, with file names of its own
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
