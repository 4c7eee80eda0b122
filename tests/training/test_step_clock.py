"""When a device was at work, with a device and a clock that the test moves by hand."""

import threading

import pytest

from t5x_domain.training.goodput import Ledger
from t5x_domain.training.step_clock import StepClock


class Result:
    """What an update will return: there when the test says so."""

    def __init__(self):
        self._there = threading.Event()

    def finish(self):
        self._there.set()

    def block_until_ready(self):
        self._there.wait()
        return self


class Bench:
    """A step clock, its ledger and the time."""

    def __init__(self):
        self.now = 0.0
        self.ledger = Ledger(0.0, lambda: self.now)
        self.clock = StepClock(self.ledger, lambda: self.now)
        self.ledger.enter("step")

    def dispatch(self):
        result = Result()
        self.clock.dispatched({"loss": result})
        return result

    def finish(self, result):
        result.finish()
        self.clock.settle()

    def waited(self):
        return self.ledger.seconds()["data_wait"]


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.clock.close()
    bench.ledger.close()


def arriving_after(bench, *waits):
    for wait in waits:
        bench.now += wait
        yield wait


def test_the_first_batch_is_waited_for_in_full(bench):
    next(bench.clock.timed(arriving_after(bench, 3.0)))
    assert bench.waited() == 3


def test_a_batch_that_arrives_while_the_device_works_costs_nothing(bench):
    batches = bench.clock.timed(arriving_after(bench, 0.0, 3.0))
    next(batches)
    result = bench.dispatch()
    next(batches)
    bench.finish(result)
    assert (bench.waited(), bench.ledger.seconds()["step"]) == (0, 3)


def test_only_the_time_without_work_is_a_wait(bench):
    """The update is done 1 s after the next batch is asked for, the batch comes 2 s later."""

    def source():
        yield 0
        bench.now += 1
        bench.finish(result)
        bench.now += 2
        yield 1

    batches = bench.clock.timed(source())
    next(batches)
    result = bench.dispatch()
    next(batches)
    assert bench.waited() == 2
    assert bench.ledger.seconds()["step"] == 1


def test_the_time_before_the_batch_was_asked_for_is_no_wait(bench):
    """The host was at something else for 5 s while the device had nothing to do."""
    batches = bench.clock.timed(arriving_after(bench, 0.0, 2.0))
    next(batches)
    bench.finish(bench.dispatch())
    bench.now += 5
    next(batches)
    assert bench.waited() == 2


def test_seconds_of_updates(bench):
    """Back to back: from end to end. After a wait: from the batch's arrival. Compilation is left out."""
    batches = bench.clock.timed(arriving_after(bench, 0.0, 0.0, 4.0))
    next(batches)
    bench.now += 7
    bench.ledger.shift("compile", 6)  # 6 of the 7 s until the first update was dispatched
    first = bench.dispatch()
    next(batches)
    second = bench.dispatch()
    bench.now += 1
    first.finish()
    while bench.clock._dispatched.unfinished_tasks > 1:
        pass
    bench.now += 3
    bench.finish(second)
    next(batches)
    third = bench.dispatch()
    bench.now += 5
    bench.finish(third)
    # 1 s of dispatching and 1 s on the device; 3 s; 5 s after 4 s of waiting.
    assert bench.clock.percentiles() == {"p50": 3, "p90": pytest.approx(3 + 0.8 * 2), "max": 5}
    assert bench.waited() == 4


def test_percentiles_are_of_the_updates_since_the_last_call(bench):
    batches = bench.clock.timed(arriving_after(bench, 0.0, 0.0))
    for seconds in (9.0, 2.0):
        next(batches)
        result = bench.dispatch()
        bench.now += seconds
        bench.finish(result)
        assert bench.clock.percentiles() == {"p50": seconds, "p90": seconds, "max": seconds}


def test_a_pause_begins_when_the_device_is_done(bench):
    batches = bench.clock.timed(arriving_after(bench, 0.0))
    next(batches)
    result = bench.dispatch()

    def soon():
        bench.now += 2
        result.finish()

    threading.Timer(0.05, soon).start()
    with bench.clock.pause("evaluation"):
        bench.now += 4
    assert bench.ledger.seconds()["step"] == 2
    assert bench.ledger.seconds()["evaluation"] == 4


def test_what_fails_on_the_device_does_not_hang_the_clock(bench):
    class Failed:
        def block_until_ready(self):
            raise RuntimeError("the device has failed")

    next(bench.clock.timed(arriving_after(bench, 0.0)))
    bench.clock.dispatched({"loss": Failed()})
    bench.clock.settle()
