"""Eight CPU devices, so that every test of sharding runs anywhere. Set before jax is imported."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",  # tests compile much and compute little
    ]
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # What one test has compiled, others and the programs they start take from there: a quarter of the time.
    folder = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.fixture(autouse=True)
def _no_bindings_left_behind():
    """What one test binds in gin must not reach the next."""
    yield
    if "gin" in sys.modules:
        sys.modules["gin"].clear_config()


SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text().split("\n")) - {""}
LONGEST = ("test_demo.py", "test_loop.py", "test_generator.py", "test_finetuning.py")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left to `make test-slow`, so that `make test` stays under twenty minutes")


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items):
    """Marks what slow.txt names, all parameters of a test or one; and puts the longest files first, lest they run alone
    at the end.
    """
    for item in items:
        if not SLOW.isdisjoint((item.nodeid, item.nodeid.partition("[")[0])):
            item.add_marker("slow")
    items.sort(key=lambda item: item.path.name not in LONGEST)
