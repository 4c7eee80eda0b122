import dataclasses

import jax
import numpy as np
import optax
import pytest
from exact import MESHES, assert_exact, loss_and_gradients
from tiny import CONFIG, LOSS, MODELS, batch, blueprint, mesh

from t5x_domain.parallel.sharding import use_mesh
from t5x_domain.training.optimizer import Adafactor, Updates
from t5x_domain.training.schedule import constant
from t5x_domain.training.step import make_eval_step, make_train_step

EXACT_CONFIG = dataclasses.replace(CONFIG, dtype="float64")


@pytest.fixture(scope="module", params=MODELS)
def single(request):
    """The model, its parameters, the batch, and loss and gradients on one device."""
    model = MODELS[request.param]
    with jax.enable_x64(True):
        plan = blueprint(model=model, config=EXACT_CONFIG)
        params = jax.tree.map(lambda p: np.asarray(p, np.float64), plan.init(0))
        return model, params, batch(), loss_and_gradients(plan, LOSS, params, batch())


@pytest.mark.parametrize("shape", MESHES)
def test_loss_and_gradients_do_not_depend_on_the_mesh(single, shape):
    model, params, rows, wanted = single
    with jax.enable_x64(True):
        config = dataclasses.replace(EXACT_CONFIG, sequence_attention="ring" if shape == "ring" else "gather")
        plan = blueprint(mesh(**MESHES[shape]), model, config)
        assert_exact(loss_and_gradients(plan, LOSS, params, rows), wanted)


@pytest.mark.parametrize("shape", [{}, {"data": 4, "fsdp": 2}])
def test_accumulation_equals_the_large_batch(single, shape):
    model, params, rows, wanted = single
    with jax.enable_x64(True):
        plan = blueprint(mesh(**shape), model, EXACT_CONFIG)
        assert_exact(loss_and_gradients(plan, LOSS, params, rows, accumulation_steps=2), wanted)


def test_the_check_itself_can_fail(single):
    model, params, rows, wanted = single
    with jax.enable_x64(True):
        rows = {**rows, "decoder_loss_weights": rows["decoder_loss_weights"].copy()}
        rows["decoder_loss_weights"][0, 0] = 0.0
        with pytest.raises(AssertionError):
            assert_exact(loss_and_gradients(blueprint(model=model, config=EXACT_CONFIG), LOSS, params, rows), wanted)


def test_loss_is_the_mean_over_targets_and_corpora_add_up():
    plan, rows = blueprint(), batch()
    params = plan.init(0)
    sums = jax.device_get(make_eval_step(plan, LOSS)(params, rows))
    model = plan.merge(params)
    with use_mesh(plan.mesh):
        hidden = model(**{name: rows[name] for name in model.inputs})
        log_p = np.asarray(jax.nn.log_softmax(model.logits(hidden)))
    nll = -np.take_along_axis(log_p, rows["decoder_target_tokens"][..., None], -1)[..., 0]
    weights = rows["decoder_loss_weights"]
    # float32 sums of 250 terms near 7: 250 u relative, u = 2^-24.
    assert sums["nll"] == pytest.approx(float((nll * weights).sum()), rel=250 * 2.0**-24)
    assert sums["weight"] == weights.sum()
    for corpus in (0, 1):
        here = weights * (rows["component_ids"] == corpus)
        assert sums["component_nll"][corpus] == pytest.approx(float((nll * here).sum()), rel=250 * 2.0**-24)
        assert sums["component_weight"][corpus] == here.sum()
    assert sums["correct"] == ((log_p.argmax(-1) == rows["decoder_target_tokens"]) * weights).sum()


def poisoned():
    rows = batch()
    rows["decoder_loss_weights"] = rows["decoder_loss_weights"] * np.float32(np.nan)
    return rows


def test_non_finite_updates_are_skipped_and_counted():
    plan = blueprint()
    transform = Updates(Adafactor(), constant(0.1)).build(plan.axes)
    step = make_train_step(plan, LOSS, transform, seed=0)
    state, _ = step(plan.init_state(plan.init(0), transform), batch())
    before = jax.device_get(state)
    state, metrics = step(state, poisoned())
    state, metrics = step(state, poisoned())
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (2, 2)
    after = jax.device_get(state)
    assert after.step == before.step + 2
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)
    state, metrics = step(state, batch())
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (2, 0)
    assert np.isfinite(float(metrics["loss"]))


def test_dropout_is_a_function_of_seed_and_step():
    plan = blueprint(config=dataclasses.replace(CONFIG, dropout_rate=0.5))
    transform = optax.sgd(0.0)  # the parameters stay, so only dropout changes the loss

    def losses(seed):
        state = plan.init_state(plan.init(0), transform)
        step = make_train_step(plan, LOSS, transform, seed=seed)
        result = []
        for _ in range(2):
            state, metrics = step(state, batch())
            result.append(float(metrics["loss"]))
        return result

    first, again, other = losses(1), losses(1), losses(2)
    assert first == again
    assert len({*first, *other}) == 4
