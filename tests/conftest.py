"""Eight CPU devices, so that every test of sharding runs anywhere. Set before jax is imported."""

import os
import sys

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",  # tests compile much and compute little
    ]
)


@pytest.fixture(autouse=True)
def _no_bindings_left_behind():
    """What one test binds in gin must not reach the next."""
    yield
    if "gin" in sys.modules:
        sys.modules["gin"].clear_config()


def pytest_collection_modifyitems(items):
    """The longest tests first, so that they do not run alone at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_demo.py", "test_loop.py"))
