import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIG, blueprint

from t5x_domain.adaptation.layerwise import multipliers, with_fresh_top
from t5x_domain.adaptation.lora import Lora
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import EncoderDecoder, EncoderOnly
from t5x_domain.models.names import path_name
from t5x_domain.training.optimizer import Adafactor, AdamW, Updates
from t5x_domain.training.schedule import constant

# Three encoder layers of a pattern of two, so that one is left over after the scan; two decoder layers.
SHAPE = dataclasses.replace(
    CONFIG, embed_dim=16, mlp_dim=16, num_heads=2, head_dim=8, vocab_size=32, layer_pattern=("local", "global"),
    num_encoder_layers=3, num_decoder_layers=2,
)  # fmt: skip


def plan(scan=True, model=EncoderDecoder):
    return blueprint(model=model, config=dataclasses.replace(SHAPE, scan_layers=scan))


def named(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def by_layer(tree, scan):
    """{(stack, layer): one kernel of it}."""
    flat, kernel = named(tree), "mlp/inner/wo/kernel"
    if not scan:
        places = [("encoder", 0), ("encoder", 1), ("encoder", 2), ("decoder", 0), ("decoder", 1)]
        return {(stack, i): flat[f"{stack}/rest/blocks/{i}/{kernel}"] for stack, i in places}
    stacked = {(s, i): flat[f"{s}/layers/blocks/{i}/{kernel}"][0] for s in ("encoder", "decoder") for i in (0, 1)}
    return stacked | {("encoder", 2): flat[f"encoder/rest/blocks/0/{kernel}"]}


def factor(tree, scan):
    return {place: float(np.max(value)) for place, value in by_layer(tree, scan).items()}


@pytest.mark.parametrize("scan", [True, False])
def test_layers_decay_from_the_top_of_each_stack(scan):
    tree = multipliers(plan(scan), layer_decay=0.5)
    wanted = {("encoder", 2): 1, ("encoder", 1): 0.5, ("encoder", 0): 0.25, ("decoder", 1): 1, ("decoder", 0): 0.5}
    assert factor(tree, scan) == wanted
    flat = named(tree)
    above = ("encoder/norm/scale", "decoder/norm/scale", "embedding/output")
    assert all(flat[name] == 1 for name in above)
    assert flat["embedding/embedding"] == 0.125  # one below the deeper stack's lowest layer
    assert (flat["encoder/relative_bias/table"], flat["decoder/relative_bias/table"]) == (0.25, 0.5)


def test_the_bias_to_blocks_belongs_to_the_lowest_layer_too():
    config = dataclasses.replace(SHAPE, global_blocks="transient")
    flat = named(multipliers(blueprint(model=EncoderDecoder, config=config), layer_decay=0.5))
    assert flat["encoder/global_relative_bias/table"] == flat["encoder/relative_bias/table"] == 0.25


@pytest.mark.parametrize("scan", [True, False])
def test_the_lowest_layers_are_frozen_with_the_embedding(scan):
    tree = multipliers(plan(scan), freeze_layers=1)
    wanted = {("encoder", 2): 1, ("encoder", 1): 1, ("encoder", 0): 0, ("decoder", 1): 1, ("decoder", 0): 0}
    assert factor(tree, scan) == wanted
    flat = named(tree)
    shared = [name for name in flat if "blocks" not in name and flat[name] == 0]
    assert shared == ["decoder/relative_bias/table", "embedding/embedding", "encoder/relative_bias/table"]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(tree))


@functools.cache
def _depth(layers):
    return blueprint(
        model=EncoderOnly, config=dataclasses.replace(SHAPE, num_encoder_layers=layers, layer_pattern=("global",))
    )


@given(st.floats(0.1, 1.0), st.integers(1, 4), st.integers(0, 4))
def test_every_multiplier_is_a_power_of_the_decay_or_0(decay, layers, frozen):
    frozen = min(frozen, layers)
    tree = multipliers(_depth(layers), layer_decay=decay, freeze_layers=frozen)
    got = named(tree)["encoder/layers/blocks/0/mlp/inner/wo/kernel"]
    assert got.shape == (layers, 1, 1)
    powers = [0.0 if i < frozen else decay ** (layers - 1 - i) for i in range(layers)]
    np.testing.assert_allclose(got.ravel(), powers, rtol=2**-23)
    lowest = 0.0 if frozen else decay**layers
    np.testing.assert_allclose(named(tree)["embedding/embedding"], lowest, rtol=2**-23)


@pytest.mark.parametrize("optimizer", [AdamW(), Adafactor(min_dim_size_to_factor=16)], ids=["adam", "adafactor"])
def test_updates_are_those_of_the_optimizer_times_the_factor(optimizer):
    """A factor on gradients would be lost, for both optimizers divide by the gradient's size."""
    on = plan()
    rng = np.random.default_rng(0)
    params, grads = (jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), on.shapes) for _ in range(2))
    factors = multipliers(on, layer_decay=0.5, freeze_layers=1)

    def updates(*more):
        transform = Updates(optimizer, constant(0.1), weight_decay=0.1).build(on.axes, *more)
        return named(jax.jit(lambda p, g: transform.update(g, transform.init(p), p)[0])(params, grads))

    plain, scaled = updates(), updates(factors)
    for name, by in named(factors).items():
        # Powers of 2 are exact. What is frozen has no weight decay either.
        np.testing.assert_array_equal(scaled[name], plain[name] * by, err_msg=name)


def test_what_is_frozen_has_no_optimizer_state():
    on = plan(scan=False)
    factors = multipliers(on, freeze_layers=1)
    pairs = zip(jax.tree.leaves(on.shapes), jax.tree.leaves(factors), strict=True)
    learning = sum(leaf.size for leaf, factor in pairs if factor)
    transform = Updates(AdamW(), constant(0.1)).build(on.axes, factors)
    state = jax.eval_shape(transform.init, on.shapes)
    assert learning < on.num_parameters - SHAPE.vocab_size * SHAPE.embed_dim
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * learning


@pytest.mark.parametrize("scan", [True, False])
def test_top_layers_are_drawn_afresh(scan):
    on = plan(scan)
    old = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 7.0), on.shapes)
    fresh = on.init(3)
    got = with_fresh_top(old, on, 1, seed=3)
    for place, kernel in by_layer(got, scan).items():
        wanted = by_layer(fresh, scan)[place] if place in {("encoder", 2), ("decoder", 1)} else jnp.full((16, 16), 7.0)
        np.testing.assert_array_equal(kernel, wanted, err_msg=place)
    for name in ("embedding/embedding", "embedding/output", "encoder/norm/scale", "decoder/relative_bias/table"):
        assert np.all(named(got)[name] == 7), name
    assert with_fresh_top(old, on, 0, seed=3) is old


def test_factors_of_an_adapted_model_go_with_their_layer():
    on = plan(model=Lora(rank=2).model_class(EncoderDecoder))
    flat = named(multipliers(on, layer_decay=0.5))
    assert flat["encoder/layers/blocks/0/self_attention/inner/query/lora_a"].tolist() == [[[0.25]]]


def test_what_no_model_has_is_refused():
    on = plan()
    with pytest.raises(UserError, match=r"layer_decay = 0: it must be above 0 and at most 1"):
        multipliers(on, layer_decay=0)
    with pytest.raises(UserError, match=r"freeze_layers = 3: the model has 2 layers; give 0 to 2"):
        multipliers(on, freeze_layers=3)
    with pytest.raises(UserError, match=r"reinit_top_layers = -1"):
        with_fresh_top(on.shapes, on, -1, seed=0)
