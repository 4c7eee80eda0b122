import time

import jax
import numpy as np
import pytest
from tiny import blueprint, mesh

from t5x_domain.training.checkpoint import Checkpoints, Retention
from t5x_domain.training.optimizer import Adafactor, Updates
from t5x_domain.training.schedule import constant


@pytest.fixture(scope="module")
def plan():
    return blueprint()


@pytest.fixture(scope="module")
def transform(plan):
    return Updates(Adafactor(min_dim_size_to_factor=16), constant(0.1)).build(plan.axes)


@pytest.fixture(scope="module")
def state(plan, transform):
    return plan.init_state(plan.init(3), transform)


def steps(folder):
    return sorted(int(child.name) for child in folder.iterdir())


def save_all(folder, state, retention, losses):
    checkpoints = Checkpoints(folder, retention)
    for step, loss in losses.items():
        checkpoints.save(state, step, {"step": step}, None if loss is None else {"loss": loss})
        checkpoints.wait()
    checkpoints.close()


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(last=2), [5, 6]),
        (Retention(last=1, every=2), [2, 4, 6]),
        (Retention(last=1, best=2), [2, 3, 6]),
        (Retention(last=1, every=5, best=1), [2, 5, 6]),
    ],
)
def test_retention(tmp_path, state, retention, kept):
    save_all(tmp_path, state, retention, {1: 5.0, 2: 1.0, 3: 2.0, 4: 3.0, 5: None, 6: 9.0})
    assert steps(tmp_path) == kept


def test_the_best_is_remembered_after_a_restart(tmp_path, state):
    save_all(tmp_path, state, Retention(last=1, best=1), {1: 1.0, 2: 2.0})
    save_all(tmp_path, state, Retention(last=1, best=1), {3: 3.0, 4: 4.0})
    assert steps(tmp_path) == [1, 4]


@pytest.mark.parametrize("shape", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_restored_to_the_bit_on_any_mesh(tmp_path, state, shape):
    save_all(tmp_path, state, None, {7: None})
    plan = blueprint(mesh(**shape))
    transform = Updates(Adafactor(min_dim_size_to_factor=16), constant(0.1)).build(plan.axes)
    restored, data = Checkpoints(tmp_path).restore(plan.abstract_state(transform), 7)
    assert data == {"step": 7}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    for leaf, place in zip(jax.tree.leaves(restored), jax.tree.leaves(plan.state_shardings(transform)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_an_unfinished_save_is_no_checkpoint(tmp_path, state):
    save_all(tmp_path, state, None, {1: None})
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step == 1
    checkpoints.close()
    deadline = time.monotonic() + 20  # and it is cleared away, by a thread of Orbax
    while (tmp_path / "2.orbax-checkpoint-tmp").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert steps(tmp_path) == [1]
