"""`python -m launch --config=configs/local.py [--config.name=VALUE …] [--dry_run]`: runs or submits a configuration."""

import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from launch import gke_jobset, local, slurm, tpu_queued, xpk
from launch.config import check
from launch.sweep import runs
from t5x_domain import cli
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
        check(config)
        plan = _PLANS[config.target](config)
        if _DRY_RUN.value:
            print(plan.show())
        else:
            _require_known_to_gin(config)
            sys.exit(plan.carry_out())
    except UserError as error:
        print(f"launch: error: {error}", file=sys.stderr)
        sys.exit(2)


def _require_known_to_gin(config: ConfigDict) -> None:
    """Raises UserError for what gin refuses: better now than when a machine has been waited for."""
    for run in runs(config):
        cli.load_gin(config.gin_files, run.bindings, config.gin_search_paths)


if __name__ == "__main__":
    app.run(main)
