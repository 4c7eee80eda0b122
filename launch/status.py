"""`python -m launch.status runs gs://bucket/runs`: a table of the runs in folders or buckets, the best first."""

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from launch import record
from launch.supervise import EXIT_PREEMPTED
from t5x_domain.errors import UserError

_SILENT_SECONDS = 900.0
_PLACES = ("RUN_DIR", "Run.run_dir")  # of every run another


def table(folders: Sequence[str]) -> str:
    """One line a run: what sets it apart, how far it is, what it has learned, how fast, and how it is.

    Bindings are those of the runs' config.gin that not all runs share. Rows are sorted by held-out loss.

    Raises:
      UserError: a folder does not exist, or there are no runs.
    """
    runs = [path for folder in folders for path in _run_dirs(epath.Path(folder))]
    if not runs:
        raise UserError(f"{', '.join(folders)}: no runs there; name a run directory or the folder that holds some.")
    configs = [read_bindings(_text(path / "config.gin")) for path in runs]
    told_apart = _differences(configs)
    rows = []
    for path, config in zip(runs, configs, strict=True):
        row = _row(path, config)
        row["bindings"] = " ".join(f"{name}={config[name]}" for name in told_apart if name in config)
        rows.append(row)
    rows.sort(key=_rank)
    return _aligned(rows)


def read_bindings(config: str) -> dict[str, str]:
    """The bindings of a config.gin, by name, each on one line; a value may go on over several."""
    bindings: dict[str, str] = {}
    name = None
    for line in config.splitlines():
        if line.startswith("#") or not line.strip():
            name = None
        elif begins := re.match(r"([\w./]+) = ?(.*)", line):
            name = begins[1]
            bindings[name] = begins[2].removesuffix("\\").strip()
        elif name:
            bindings[name] = f"{bindings[name]} {line.strip()}".strip()
    return bindings


def state(path: epath.Path, done: bool, now: float) -> str:
    """finished, preempted, failed with its status, running, or silent since when.

    How the last attempt ended is known from those launchers that see it (launch.json), unless something was trained
    since; otherwise a run that has lately written something is running.
    """
    if done:
        return "finished"
    marked, logged = path / record.FILE, path / "metrics.jsonl"
    ended = json.loads(_text(marked) or "{}").get("exit_status")
    if ended is not None and _modified(marked) >= _modified(logged):
        return {0: "finished", EXIT_PREEMPTED: "preempted"}.get(ended, f"failed ({ended})")
    quiet = now - max(_modified(marked), _modified(logged), _modified(path / "run.json"))
    return "running" if quiet < _SILENT_SECONDS else f"silent {quiet / 3600:.1f} h"


def _run_dirs(folder: epath.Path) -> list[epath.Path]:
    """The folder itself if it is a run's, or those within."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    return [path for path in (folder, *sorted(folder.iterdir())) if _is_run(path)]


def _is_run(path: epath.Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in ("run.json", record.FILE))


def _row(path: epath.Path, config: Mapping[str, str]) -> dict[str, Any]:
    last = _last_line(path / "metrics.jsonl")
    corpora = _last_line(path / "evaluations.jsonl").get("corpora", {})
    losses = [scores["loss"] for scores in corpora.values() if "loss" in scores]
    step, total = last.get("step", 0), _total_steps(config)
    goodput = json.loads(_text(path / "goodput.json") or "{}").get("goodput")
    done = step == total and (path / "eval.json").exists()
    return {
        "run": path.name,
        "bindings": "",
        "step": f"{step:,}/{total:,}" if total else f"{step:,}",
        "loss": last.get("loss"),
        "held-out": sum(losses) / len(losses) if losses else None,
        "tokens/s": last.get("tokens_per_second"),
        "goodput": goodput,
        "state": state(path, done, time.time()),
    }


def _rank(row: Mapping[str, Any]) -> tuple[int, float, str]:
    """The smallest held-out loss first, then those that have diverged, then those that have none yet."""
    loss = row["held-out"]
    if loss is None:
        return 2, 0.0, row["run"]
    return (0, loss, row["run"]) if math.isfinite(loss) else (1, 0.0, row["run"])


def _total_steps(config: Mapping[str, str]) -> int | None:
    said = config.get("Run.total_steps", "")
    said = config.get(said.removeprefix("%"), "") if said.startswith("%") else said
    return int(said) if said.isdigit() else None


def _differences(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """Names of the bindings that not all runs share; those of runs that have not begun are not known yet."""
    known = [config for config in configs if config]
    names = dict.fromkeys(name for config in known for name in config if name not in _PLACES)
    return [name for name in names if len({config.get(name) for config in known}) > 1]


def _aligned(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [[_shown(name, value) for name, value in row.items()] for row in rows]
    lines = [list(rows[0]), *shown]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _shown(name: str, value: float | str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return str(value)
    return {"tokens/s": f"{value:,.0f}", "goodput": f"{value:.0%}"}.get(name, f"{value:.4f}")


def _last_line(path: epath.Path) -> dict[str, Any]:
    """The last whole line of a file of JSON objects, which may be in the middle of one; {} if there is none."""
    whole = _text(path).rpartition("\n")[0]
    return json.loads(whole.rpartition("\n")[2]) if whole else {}


def _text(path: epath.Path) -> str:
    return path.read_text() if path.exists() else ""


def _modified(path: epath.Path) -> float:
    """Seconds since 1970; 0 for a file that is not there."""
    return path.stat().mtime if path.exists() else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Parses flags and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m launch.status", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="a run directory, or a folder or bucket of some")
    try:
        print(table(parser.parse_args(argv).folders))
    except UserError as error:
        print(f"launch.status: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
