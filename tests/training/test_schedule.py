import numpy as np
import pytest

from t5x_domain.training import schedule

# (schedule, {step: learning rate}) by the formula in each docstring.
CASES = {
    "constant": (schedule.constant(0.5, warmup_steps=10), {0: 0.0, 5: 0.25, 10: 0.5, 1000: 0.5}),
    "rsqrt": (schedule.rsqrt(1.0, warmup_steps=100), {0: 0.1, 100: 0.1, 400: 0.05, 10_000: 0.01}),
    "cosine": (
        schedule.cosine(1.0, total_steps=110, warmup_steps=10, final=0.1),
        {0: 0.0, 10: 1.0, 60: 0.55, 35: 0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2, 110: 0.1, 200: 0.1},
    ),
    "linear": (
        schedule.linear(1.0, total_steps=110, warmup_steps=10, final=0.2),
        {5: 0.5, 10: 1.0, 60: 0.6, 110: 0.2, 150: 0.2},
    ),
    "warmup_stable_decay": (
        schedule.warmup_stable_decay(1.0, total_steps=100, warmup_steps=10, decay_steps=20),
        {5: 0.5, 10: 1.0, 79: 1.0, 80: 1.0, 90: 0.5, 100: 0.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_values(name):
    rate, wanted = CASES[name]
    for step, value in wanted.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6), step
