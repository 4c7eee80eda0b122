"""`python -m launch.record RUN_DIR STATUS`: keeps with a run how its last attempt ended, for `launch.status`."""

import json
import sys

from etils import epath

from t5x_domain.files import write_atomically

FILE = "launch.json"


def record(run_dir: str, status: int | None) -> None:
    """Writes <run_dir>/launch.json: the exit status of the last attempt, None while it is under way."""
    write_atomically(epath.Path(run_dir) / FILE, json.dumps({"exit_status": status}).encode())


if __name__ == "__main__":
    record(sys.argv[1], int(sys.argv[2]))
