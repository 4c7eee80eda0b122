"""`python -m launch.record RUN_DIR STATUS`: keeps with a run how its last attempt ended, for `launch.status`."""

import json
import sys

from etils import epath

FILE = "launch.json"


def record(run_dir: str, status: int | None) -> None:
    """Writes <run_dir>/launch.json: the exit status of the last attempt, None while it is under way."""
    folder = epath.Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{FILE}.partial"
    partial.write_text(json.dumps({"exit_status": status}))
    partial.replace(folder / FILE)


if __name__ == "__main__":
    record(sys.argv[1], int(sys.argv[2]))
