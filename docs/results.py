"""What benchmarks have written, for the tables of the guides."""

# ruff: noqa: ANN201, D103 -- a part of make_figures.py

import json
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks/results"


def result(name):
    """What benchmarks/`name`.py wrote; None if there is nothing yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def source(name, environment):
    """Where figures come from, in a line."""
    versions = ", ".join(f"{key} {environment[key]}" for key in ("jax", "libtpu", "tokamax") if key in environment)
    return f"(`benchmarks/{name}.py`; {versions}, {environment['date']})"
