import time

import jax
import numpy as np
import pytest
from tiny import CONFIG, blueprint, mesh

from t5x_domain.errors import UserError
from t5x_domain.training.checkpoint import Checkpoints, Retention, find_params, restore_params
from t5x_domain.training.optimizer import Adafactor, Updates, path_name
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


def test_parts_by_name(tmp_path, plan, state):
    save_all(tmp_path, state, None, {1: None})
    found, left = restore_params(str(tmp_path), plan.abstract_params, include=["^encoder/", "embedding/embedding"])
    names = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state.params)[0]}
    assert set(found) == {name for name in names if name.startswith("encoder/") or name == "embedding/embedding"}
    assert set(found) | set(left) == set(names)
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, names[name])


def test_a_model_of_another_shape_is_refused_or_reported(tmp_path, plan, state):
    import dataclasses

    save_all(tmp_path, state, None, {1: None})
    wider = blueprint(config=dataclasses.replace(CONFIG, mlp_dim=256))
    with pytest.raises(UserError, match=r"mlp/inner/wi/0/kernel has shape \(2, 64, 256\).*\(2, 64, 128\)"):
        restore_params(str(tmp_path), wider.abstract_params)
    found, left = restore_params(str(tmp_path), wider.abstract_params, strict=False)
    assert left and all("/mlp/" in name for name in left)
    assert "encoder/norm/scale" in found


def test_where_parameters_are_found(tmp_path, state, monkeypatch, plan):
    save_all(tmp_path / "run" / "checkpoints", state, None, {1: None, 12: None})
    last = tmp_path / "run" / "checkpoints" / "12" / "params"
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", tmp_path / "run" / "checkpoints" / "12"):
        assert str(find_params(str(path))) == str(last)
    with pytest.raises(UserError, match="no complete checkpoint"):
        find_params(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert restore_params("run", plan.abstract_params)[1] == []  # a relative path
