"""Bounds by hand."""

import pytest

from t5x_domain.parallel.chips import CHIPS
from t5x_domain.planning.bounds import bounds, cost, touched_by_decoding, touched_by_training
from t5x_domain.planning.collectives import Collective
from t5x_domain.planning.memory import Memory

MEMORY = Memory(100, 50, 10, 30, 500, 5, 695, None)


def test_each_bound_is_a_quotient_and_the_step_is_the_largest():
    """v5e: 197 TFLOP/s, 819 GB/s, 200 GB/s over ICI, 25 Gb/s between slices."""
    sent = [
        Collective("all-gather", "ici", 4, 10, 1e9),
        Collective("all-reduce", "ici", 4, 10, 1e9),
        Collective("all-reduce", "dcn", 2, 1, 3.125e9),
    ]
    found = bounds(CHIPS["v5e"], 16, 16 * 197e12 * 0.25, 819e9 * 0.1, sent)
    assert (found.compute, found.memory, found.links, found.network) == pytest.approx((0.25, 0.1, 0.01, 1.0))
    assert (found.step, found.largest) == (pytest.approx(1.0), "network")


def test_training_reads_and_writes_its_state_and_activations():
    assert touched_by_training(MEMORY) == 2 * (100 + 50 + 30) + 10


def test_each_position_that_is_written_reads_the_decoder():
    assert touched_by_decoding(MEMORY, 40, 64) == 100 + 64 * 40 + 10


def test_cost_is_chips_times_hours():
    assert cost(1800, 16, 1.2) == pytest.approx(9.6)
