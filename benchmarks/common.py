"""What every benchmark says of the machine."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def environment(*packages):
    """Date, processor, cores, tunables of the C library, and the versions of `packages`."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": cpu.partition(":")[2].strip() or platform.processor(),
        "cores": os.cpu_count(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }
