"""How a process hears that another one has ended, with a stand-in for JAX's coordination service."""

import json
import threading
from types import SimpleNamespace

import pytest
from etils import epath

from t5x_domain.errors import StorageError, UserError
from t5x_domain.parallel import peers
from t5x_domain.parallel.peers import Peers


class Service:
    """Answers a question for what another process said with each of `answers` in turn."""

    def __init__(self, *answers):
        self._answers = iter(answers)

    def blocking_key_value_get(self, key, milliseconds):
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return json.dumps(answer)

    def key_value_set(self, key, value):
        pass


def test_another_one_is_listened_to_after_a_day_too(monkeypatch):
    """The service lets nobody wait for ever."""
    ended, at = [], threading.Event()
    monkeypatch.setattr(peers, "_delay_abort", lambda: None)
    monkeypatch.setattr(peers, "_FAREWELL_SECONDS", 0.0)
    monkeypatch.setattr(peers.os, "_exit", lambda status: (ended.append(status), at.set()))
    late = RuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out with key: t5x_domain/ended and duration: 24h")
    end = {"process": 1, "status": 2, "reason": "the last 10 updates were not finite"}
    Peers(Service(late, late, end), "127.0.0.1:1", 0, 2, heartbeat_seconds=6000)
    assert at.wait(10) and ended == [2]


def test_a_service_that_is_gone_is_asked_no_more():
    gone = RuntimeError("UNAVAILABLE: failed to connect to all addresses")
    listening = Peers(Service(gone), "127.0.0.1:1", 0, 2, heartbeat_seconds=6000)._threads[1]
    listening.join(10)
    assert not listening.is_alive()


def test_a_bucket_that_does_not_answer_is_no_sign_of_a_lost_process(monkeypatch):
    """Only what could be one is waited for."""
    waited = []
    monkeypatch.setattr(Peers, "rule_out_loss", lambda self, error: waited.append(error))
    monkeypatch.setattr(Peers, "_leave", lambda self: None)
    monkeypatch.setattr(peers, "on_abort", lambda explain: None)
    monkeypatch.setattr(peers, "_delay_abort", lambda: None)
    service = Service(RuntimeError("UNAVAILABLE"), RuntimeError("UNAVAILABLE"))
    for error in (StorageError("gs://bucket/run has not answered"), exchange := RuntimeError("connection reset")):
        Peers(service, "127.0.0.1:1", 1, 2, heartbeat_seconds=6000).fail(error)
    assert waited == [exchange]


def test_a_run_directory_that_process_0_has_to_itself_is_refused(monkeypatch, tmp_path):
    """This one has a folder of the same name."""
    from t5x_domain.training import loop

    monkeypatch.setattr(loop, "peers", lambda: SimpleNamespace(index=1))
    monkeypatch.setattr(loop, "first_does", lambda leave_mark: ".seen-by-all-1")
    with pytest.raises(UserError, match=f"--run_dir={tmp_path}: process 1 does not see .* process 0 .* all .* share"):
        loop._require_shared(epath.Path(tmp_path))
