import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import CONFIG, blueprint

from t5x_domain.errors import UserError
from t5x_domain.models.names import path_name
from t5x_domain.training.optimizer import Adafactor, AdamW, Muon, ParameterGroup, Updates
from t5x_domain.training.schedule import constant

OPTIMIZERS = [Adafactor(min_dim_size_to_factor=16), AdamW(), Muon()]


def named(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def random_like(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


def unstack(name, leaf):
    """A scanned model's parameter as the unrolled model names and cuts it."""
    if "/layers/" not in name:
        return {name: leaf}
    before, after = name.split("/layers/blocks/0/")
    return {f"{before}/rest/blocks/{i}/{after}": layer for i, layer in enumerate(leaf)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_scanned_and_unrolled_layers_get_the_same_updates(optimizer):
    config = dataclasses.replace(CONFIG, num_decoder_layers=3)  # stacks of different depths
    scanned, unrolled = (blueprint(config=dataclasses.replace(config, scan_layers=scan)) for scan in (True, False))
    params, gradients = random_like(scanned.shapes, 0), random_like(scanned.shapes, 1)

    def cut(tree):
        flat = {n: leaf for name, whole in named(tree).items() for n, leaf in unstack(name, whole).items()}
        return jax.tree_util.tree_map_with_path(lambda path, _: flat[path_name(path)], unrolled.shapes)

    def update(plan, params, gradients):
        transform = Updates(optimizer, constant(0.1), weight_decay=0.01).build(plan.axes)
        return jax.jit(lambda p, g: transform.update(g, transform.init(p), p)[0])(params, gradients)

    got, wanted = cut(update(scanned, params, gradients)), update(unrolled, cut(params), cut(gradients))
    for (name, a), b in zip(named(got).items(), named(wanted).values(), strict=True):
        # The same float32 sums over at most 512 x 64 elements, batched differently; Muon chains 5 x 3 products of 128.
        bound = 15 * 128 * 2.0**-24 if isinstance(optimizer, Muon) else 8 * 2.0**-24
        assert np.abs(a - b).max() <= bound * np.abs(b).max(), name


def test_adafactor_first_step_by_hand():
    """Shazeer & Stern 2018, algorithms 4 and 5, at step 1, where beta2 = 1 - 1^-0.8 = 0: V is this step's g^2."""
    params = {"w": np.random.default_rng(0).standard_normal((32, 48)).astype(np.float32)}
    grads = {"w": np.random.default_rng(1).standard_normal((32, 48)).astype(np.float32)}
    transform = Updates(Adafactor(min_dim_size_to_factor=16), constant(0.5)).build({"w": ("embed", "mlp")})
    got = transform.update(grads, transform.init(params), params)[0]["w"]
    g2 = grads["w"].astype(np.float64) ** 2
    v = np.outer(g2.mean(1), g2.mean(0)) / g2.mean()
    u = grads["w"] / np.sqrt(v)
    u /= max(1.0, np.sqrt((u**2).mean()))
    wanted = -0.5 * max(1e-3, np.sqrt((params["w"].astype(np.float64) ** 2).mean())) * u
    # float32 means over 32, 48 and 1536 elements, five in a chain.
    assert np.abs(got - wanted).max() <= 5 * 1536 * 2.0**-24 * np.abs(wanted).max()


def test_muon_orthogonalises_matrices_in_layers_and_leaves_the_rest_to_adam():
    plan = blueprint(config=dataclasses.replace(CONFIG, position="learned"))
    params, gradients = random_like(plan.shapes, 0), random_like(plan.shapes, 1)
    transform = Updates(Muon(), constant(1.0)).build(plan.axes)
    updates = named(transform.update(gradients, transform.init(params), params)[0])
    matrix = updates["encoder/layers/blocks/0/mlp/inner/wo/kernel"][1]  # the second layer's
    singular = np.linalg.svd(np.asarray(matrix), compute_uv=False)
    # Newton-Schulz with Muon's coefficients brings singular values into [0.7, 1.2] (Jordan et al. 2024), so the
    # largest is under twice the smallest; those of the random gradient, 128 x 64, spread over about 6 to 1.
    assert singular.max() < 2 * singular.min()
    # Nesterov's Adam looks one step ahead: its first update is b1 (1 - b1) / (1 - b1^2) + 1 wherever the gradient
    # is large against epsilon = 1e-8 (Dozat 2016).
    for name in ("embedding/embedding", "embedding/positions"):
        adam, large = updates[name], np.abs(named(gradients)[name]) > 1e-3
        np.testing.assert_allclose(np.abs(adam)[large], 1 + 0.9 * 0.1 / (1 - 0.81), rtol=2e-5)


def test_weight_decay_spares_norms_and_bias_and_freezing_holds():
    plan = blueprint()
    params = random_like(plan.shapes, 0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    transform = Updates(AdamW(), constant(0.5), weight_decay=0.1, freeze=("^encoder/",)).build(plan.axes)
    updates = named(transform.update(zeros, transform.init(params), params)[0])
    for name, value in named(params).items():
        decays = not (name.startswith("encoder/") or name.endswith("scale") or "relative_bias" in name)
        np.testing.assert_allclose(updates[name], -0.05 * value if decays else 0 * value, rtol=1e-6, err_msg=name)


def test_clipping_bounds_the_global_norm():
    axes = {"a": ("norm",), "b": ("norm",)}
    clipped = Updates(dataclasses.make_dataclass("Plain", [], namespace={"direction": lambda s, _: optax.identity()})(),
                      constant(1.0), clip_global_norm=1.0).build(axes)  # fmt: skip
    grads = {"a": jnp.full(9, 3.0), "b": jnp.full(16, 4.0)}
    updates = clipped.update(grads, clipped.init(grads), grads)[0]
    assert float(optax.global_norm(updates)) == pytest.approx(1.0, rel=1e-6)


def test_a_freeze_pattern_that_matches_nothing_is_refused():
    with pytest.raises(UserError, match=r"Updates.freeze: 'encodr' matches no parameter.*encoder/norm/scale"):
        Updates(AdamW(), constant(0.1), freeze=("encodr",)).build(blueprint().axes)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_a_group_learns_as_if_it_were_alone(optimizer):
    """With its own optimizer and schedule, clipped by its own norm; and so does the rest."""
    plan = blueprint()
    params, gradients = random_like(plan.shapes, 0), random_like(plan.shapes, 1)
    rule = ParameterGroup(optimizer, constant(0.3), clip_global_norm=0.5, weight_decay=0.01)

    def update(transform, chosen):
        part = {name: params[name] for name in chosen}
        return transform.update({name: gradients[name] for name in chosen}, transform.init(part), part)[0]

    rest = [name for name in params if name != "encoder"]
    grouped = Updates(AdamW(), constant(0.1), clip_global_norm=1.0, groups={"^encoder/": rule}).build(plan.axes)
    alone = update(rule.chain({"encoder": plan.axes["encoder"]}), ["encoder"])
    others = update(Updates(AdamW(), constant(0.1), clip_global_norm=1.0).build({n: plan.axes[n] for n in rest}), rest)
    jax.tree.map(np.testing.assert_array_equal, update(grouped, list(params)), alone | others)


def test_groups_and_freezing_together():
    plan = blueprint()
    params, gradients = random_like(plan.shapes, 0), random_like(plan.shapes, 1)
    rule = ParameterGroup(Adafactor(min_dim_size_to_factor=16), constant(0.3))
    updates = Updates(AdamW(), constant(0.1), freeze=("^encoder/norm", "^embedding/"), groups={"^encoder/": rule})
    transform = updates.build(plan.axes)
    got = named(transform.update(gradients, transform.init(params), params)[0])
    still = {name for name, update in got.items() if not np.any(update)}
    assert still == {name for name in got if name.startswith(("encoder/norm", "embedding/"))}


def test_a_group_of_nothing_is_refused():
    updates = Updates(AdamW(), constant(0.1), groups={"^generator/": ParameterGroup(AdamW(), constant(0.1))})
    with pytest.raises(
        UserError, match=r"Updates\.groups: '\^generator/' matches no parameter; there are .*encoder/norm"
    ):
        updates.build(blueprint().axes)
