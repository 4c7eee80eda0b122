import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from t5x_domain.models.assemblies import EncoderDecoder
from t5x_domain.models.flops import train_step_flops
from t5x_domain.training import meter
from t5x_domain.training.goodput import Ledger
from tests.tiny import CONFIG

LENGTHS = {"inputs": 24, "targets": 16}
METRICS = {
    "loss": np.float32(2.0),
    "weight": np.float32(10.0),
    "correct": np.float32(5.0),
    "grad_norm": np.float32(1.0),
    "skipped": np.int32(0),
    "component_nll": np.zeros(0),
    "component_weight": np.zeros(0),
}


class Bench:
    """A meter whose time the test tells."""

    def __init__(self):
        self.now = 0.0
        self.ledger = Ledger(0.0, lambda: self.now)
        run = SimpleNamespace(model=EncoderDecoder, config=CONFIG, batch_size=4, lengths=LENGTHS)
        batches = SimpleNamespace(names=["phase 1"], phase_of=lambda step: 0)
        clock = SimpleNamespace(percentiles=lambda: {"p50": 1.0, "p90": 1.0, "max": 1.0})
        self.meter = meter.Meter(
            run,
            SimpleNamespace(batches=batches, components=[], num_shares=1),
            lambda step: 0.1,
            0,
            0,
            ledger=self.ledger,
            step_clock=clock,
        )
        self.ledger.enter("step")

    def train(self, seconds, tokens):
        ids = np.arange(tokens + 3) < tokens  # three positions of padding
        self.now += seconds
        self.meter.count(1, {"encoder_segment_ids": ids, "encoder_input_tokens": ids}, {"law": tokens})


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.ledger.close()


def test_tokens_per_second_of_training_and_of_waiting_for_data_alone(bench):
    with bench.ledger.spending("start_up"):
        bench.now += 100
    bench.train(2.0, tokens=50)
    with bench.ledger.spending("evaluation"):
        bench.now += 1000
    bench.train(3.0, tokens=70)
    bench.ledger.shift("data_wait", 1.0)
    bench.now += 20
    bench.ledger.shift("compile", 20.0)
    assert bench.meter.read(2, METRICS)["tokens_per_second"] == (50 + 70) / 5
    assert bench.meter.seconds_per_step == 2.5
    bench.train(4.0, tokens=10)
    assert bench.meter.read(3, METRICS)["tokens_per_second"] == 10 / 4


def test_model_flops_utilisation_is_the_share_of_what_all_devices_can_do(bench, monkeypatch):
    monkeypatch.setattr(meter, "chip_of", lambda device: SimpleNamespace(flops=1e9))
    monkeypatch.setattr("jax.device_count", lambda: 8)
    bench.train(2.0, tokens=1)
    bench.train(4.0, tokens=1)
    flops = 2 * train_step_flops(EncoderDecoder, CONFIG, 4, LENGTHS)
    assert bench.meter.read(2, METRICS)["mfu"] == pytest.approx(flops / 6 / (8 * 1e9))


def test_a_chip_that_nobody_knows_has_no_utilisation(bench):
    bench.train(1.0, tokens=1)
    assert bench.meter.read(1, METRICS)["mfu"] is None


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    devices = [SimpleNamespace(memory_stats=lambda peak=peak: {"peak_bytes_in_use": peak}) for peak in (5, 9, 7)]
    monkeypatch.setattr("jax.local_devices", lambda: devices)
    assert meter.device_peak_bytes() == 9
    silent = SimpleNamespace(memory_stats=lambda: None)
    monkeypatch.setattr("jax.local_devices", lambda: [silent])
    assert meter.device_peak_bytes() is None


def test_memory_of_the_host_grows_with_what_is_held():
    before = meter.resident_bytes()
    held = np.ones(2**23)  # 64 MiB, every page written
    assert meter.resident_bytes() - before > 0.9 * held.nbytes


def test_what_depends_on_the_machine_is_listed(bench):
    bench.train(1.0, tokens=5)
    first = bench.meter.read(1, METRICS)
    bench.train(math.pi, tokens=5)
    again = bench.meter.read(1, METRICS)
    assert set(meter.MACHINE_KEYS) < set(first)
    assert {k: first[k] for k in first if k not in meter.MACHINE_KEYS} == {
        k: again[k] for k in again if k not in meter.MACHINE_KEYS
    }


def test_tokens_of_many_processes_are_counted_beyond_32_bits(monkeypatch):
    """What JAX sends has 32 bits: four processes read two shares, each twice."""

    def gather(values):
        return np.stack([np.asarray(jnp.asarray(values))] * 4)

    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    counts = {"phase 1": {"law": 3 * 2**31 + 1, "medicine": 7}}
    assert meter._over_hosts(counts, 2) == {"phase 1": {"law": 2 * (3 * 2**31 + 1), "medicine": 14}}
