import contextlib
import os
import signal
import threading

import jax
import jax.numpy as jnp
import pytest

from t5x_domain.training.goodput import Ledger
from t5x_domain.training.profiling import Profiler, TraceRequest
from t5x_domain.training.step_clock import StepClock


class Traced:
    """JAX's profiler, of which only the calls are noted."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: self.calls.append(("start", folder)))
        monkeypatch.setattr(jax.profiler, "stop_trace", lambda: self.calls.append(("stop", self.step)))

    def run(self, profiler, steps):
        for self.step in steps:
            with profiler.update(self.step):
                self.calls.append(self.step)


@pytest.fixture
def traced(monkeypatch):
    return Traced(monkeypatch)


@pytest.fixture
def clock():
    ledger = Ledger()
    clock = StepClock(ledger)
    yield clock
    clock.close()
    ledger.close()


@pytest.fixture
def make(tmp_path, clock):
    """Profilers that are closed in the end."""
    with contextlib.ExitStack() as closing:

        def make(steps):
            request = closing.enter_context(contextlib.closing(TraceRequest()))
            profiler = Profiler(tmp_path, steps, request, clock, lambda text: None)
            return closing.enter_context(contextlib.closing(profiler))

        yield make


def test_the_updates_asked_for_are_traced_and_no_others(traced, make, tmp_path):
    traced.run(make((2, 3)), range(1, 6))
    assert traced.calls == [1, ("start", tmp_path / "process_0"), 2, 3, ("stop", 3), 4, 5]


def test_a_run_that_goes_on_in_the_middle_traces_what_is_left(traced, make, tmp_path):
    traced.run(make((2, 6)), range(6, 8))
    assert traced.calls == [("start", tmp_path / "process_0"), 6, ("stop", 6), 7]
    traced.calls.clear()
    traced.run(make((2, 6)), range(7, 9))
    assert traced.calls == [7, 8]


def test_a_signal_asks_for_the_next_three(traced, make, tmp_path):
    profiler = make((7, 7))
    traced.run(profiler, [1])
    os.kill(os.getpid(), signal.SIGUSR1)
    traced.run(profiler, range(2, 9))
    start = ("start", tmp_path / "process_0")
    assert traced.calls == [1, start, 2, 3, 4, ("stop", 4), 5, 6, start, 7, ("stop", 7), 8]


def test_a_trace_is_written_even_if_the_run_ends_within(traced, make):
    profiler = make((1, 9))
    traced.run(profiler, [1])
    profiler.close()
    assert traced.calls[-1] == ("stop", 1)


def test_afterwards_the_signal_means_what_it_meant_before():
    before = signal.getsignal(signal.SIGUSR1)
    TraceRequest().close()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_in_another_thread_there_is_no_signal_to_listen_to(traced, make):
    before = signal.getsignal(signal.SIGUSR1)
    thread = threading.Thread(target=lambda: traced.run(make((1, 1)), [1, 2]))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGUSR1) == before
    assert traced.calls[-2:] == [("stop", 1), 2]


def test_a_trace_is_a_file_for_tensorboard_and_its_time_is_no_training(make, clock, tmp_path):
    double = jax.jit(lambda x: 2 * x)
    with make((1, 1)).update(1):
        double(jnp.ones(3))
    (trace,) = (tmp_path / "process_0" / "plugins" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
    assert clock._ledger.seconds()["profile"] > 0
