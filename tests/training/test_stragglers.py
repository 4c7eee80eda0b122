"""Who keeps the others waiting, from made-up times."""

import numpy as np
import pytest

from t5x_domain.files import Growing
from t5x_domain.training.stragglers import Stragglers, medians_of_others, slow, summary
from tests.training.test_goodput import Clock


def host(name, *, busy=0.1, data=0.05, step=1.0, steps=10):
    return {"host": name, "steps": steps, "p50": step, "p90": step, "max": step, "busy": busy, "data": data}


def test_the_busy_one_is_named_with_the_cause():
    hosts = [host("a"), host("b", busy=0.9, data=0.8), host("c")]
    (line,) = slow(hosts)
    assert line.startswith("b keeps the others waiting: busy 0.9 s a step against 0.1 s, waiting for data")
    (line,) = slow([host("a", busy=0.9), host("b"), host("c")])
    assert line.startswith("a keeps") and "not waiting for data" in line


@pytest.mark.parametrize(
    "hosts",
    [
        [host("a")],
        [host("a"), host("b", busy=0.149, data=0.1)],  # below one and a half times
        [host("a", busy=0.001), host("b", busy=0.1)],  # a hundred times, but below a tenth of a step
        [host("a", steps=4), host("b", busy=0.9, steps=4)],  # too few steps to say
        [host("a", busy=0.9), host("b", busy=0.9)],  # both
    ],
)
def test_nobody_is_named_without_reason(hosts):
    assert slow(hosts) == []


@pytest.mark.parametrize("count", range(2, 8))
def test_medians_of_others(count):
    """Against the median of what is left without each, with equal ones among them."""
    values = np.random.default_rng(count).integers(0, 4, count).astype(float)
    expected = [np.median(np.delete(values, index)) for index in range(count)]
    np.testing.assert_array_equal(medians_of_others(values), expected)


def test_percentiles():
    """Of 1 … 10 s: the median is 5.5; the 90th percentile lies at 0.9 x 9 steps from the first, 9.1."""
    line = summary([(float(step), 0.5, step - 0.75) for step in range(1, 11)])
    assert (line["steps"], line["p50"], line["max"]) == (10, 5.5, 10.0)
    assert line["p90"] == pytest.approx(9.1)
    assert line["busy"] == pytest.approx(0.75) and line["data"] == 0.5


def test_time_is_told_apart(tmp_path):
    """Waiting for data, for devices, and the rest; what comes after a step is not its time."""
    clock = Clock()
    stragglers = Stragglers(Growing(tmp_path), 0, print, clock)

    def batches():
        for _ in range(2):
            clock.pass_(5)
            yield

    for _ in stragglers.of_data(batches()):
        with stragglers.waiting_for_device():
            clock.pass_(10)
        clock.pass_(2)
        stragglers.step()
        clock.pass_(20)
    assert stragglers._times == [(5 + 10 + 2, 5, 10)] * 2
    stragglers.report(2)
    assert stragglers._times == []
    stragglers.close()
    assert not list(tmp_path.iterdir())  # alone there is nobody to compare with
