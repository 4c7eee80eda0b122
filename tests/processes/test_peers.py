"""What a process tells the others when it fails, with a stand-in for JAX's coordination service."""

import json
import threading

import jax
import pytest

from t5x_domain.errors import StorageError, UserError
from t5x_domain.parallel import peers
from t5x_domain.parallel.peers import Peers


class Service:
    """Keeps what one process says for the others."""

    def __init__(self):
        self.said, self._set = {}, threading.Event()

    def get_live_nodes(self, nodes):
        return nodes

    def key_value_set(self, key, value):
        self.said[key] = value
        self._set.set()

    def blocking_key_value_get(self, key, _):
        self._set.wait(10)
        return self.said[key]


@pytest.fixture
def service(monkeypatch):
    """What would end or wait for this process does not."""
    monkeypatch.setattr(peers, "_delay_abort", lambda: None)
    monkeypatch.setattr(peers, "on_abort", lambda explain: None)
    monkeypatch.setattr(peers, "_FAREWELL_SECONDS", 0.0)
    monkeypatch.setattr(Peers, "rule_out_loss", lambda self, error: None)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    return Service()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("no such cache"), 2),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), 1),
        (StorageError("gs://bucket/run has not answered"), 1),
        (SystemExit(0), 75),
        (KeyboardInterrupt(), 75),
    ],
)
def test_a_failure_ends_the_others_with_its_own_status(service, monkeypatch, error, status):
    """They leave first, and it is the first status that decides what becomes of a run."""
    ended, at = [], threading.Event()
    monkeypatch.setattr(peers.os, "_exit", lambda status: (ended.append(status), at.set()))
    monkeypatch.setattr(Peers, "_leave", lambda self: None)  # the threads here end with the test
    Peers(service, "127.0.0.1:1", 1, 2, heartbeat_seconds=60)
    Peers(service, "127.0.0.1:1", 0, 2, heartbeat_seconds=60).fail(error)
    assert at.wait(10) and ended == [status]
    assert json.loads(service.said["t5x_domain/ended"])["status"] == status
