"""`python -m launch --config=configs/local.py [--config.name=VALUE …] [--dry_run]`: runs or submits a configuration."""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from launch import gke_jobset, local, slurm, tpu_queued, xpk
from launch.config import check
from launch.gin_check import require_that_gin_fits
from t5x_domain.errors import UserError

_PLANS = {
    "local": local.plan,
    "slurm": slurm.plan,
    "tpu_queued": tpu_queued.plan,
    "gke_jobset": gke_jobset.plan,
    "xpk": xpk.plan,
}
_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/: where a run happens, how often.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print exactly what would be written and run, and do nothing.")


def main(argv: Sequence[str]) -> None:
    """Checks the configuration, then shows its plan or carries it out; exits with what became of it."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]}: flags only, e.g. --config=configs/local.py --config.name=trial")
    config = _CONFIG.value
    if config is None:
        raise app.UsageError("--config is needed, for example --config=configs/local.py")
    try:
        _require_file()
        check(config)
        require_that_gin_fits(config)
        plan = _PLANS[config.target](config)
        if _DRY_RUN.value:
            print(plan.show())
        else:
            sys.exit(plan.carry_out())
    except UserError as error:
        print(f"launch: error: {error}", file=sys.stderr)
        sys.exit(2)


def _require_file() -> None:
    """Raises UserError if --config names no file: ml_collections says so with a traceback, at the first use."""
    name = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]  # then an argument of get_config
    if not Path(name).is_file():
        raise UserError(f"--config={name}: there is no such file; those that are shipped are in configs/.")


if __name__ == "__main__":
    app.run(main)
