import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import bits

from t5x_domain.adaptation.lora import LEARNING, Lora, LoraLinear
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.layers import Linear
from t5x_domain.models.names import path_name
from t5x_domain.objectives.losses import language_model_loss
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.training.optimizer import Adafactor, AdamW, Updates
from t5x_domain.training.schedule import constant
from t5x_domain.training.state import Blueprint
from t5x_domain.training.step import make_train_step

CONFIG = ModelConfig(
    vocab_size=40,
    embed_dim=16,
    mlp_dim=24,
    num_heads=2,
    head_dim=8,
    num_encoder_layers=2,
    num_decoder_layers=3,
    dtype="float32",
)
LORA = Lora(rank=3, alpha=6.0)


def named(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def blueprint(model_class, config=CONFIG):
    return Blueprint(model_class, config, MeshShape().build(jax.devices()[:1]))


def batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = lambda length: rng.integers(1, CONFIG.vocab_size, (4, length)).astype(np.int32)  # noqa: E731
    return {
        "encoder_input_tokens": tokens(7),
        "decoder_input_tokens": tokens(5),
        "decoder_target_tokens": tokens(5),
        "decoder_loss_weights": np.ones((4, 5), np.float32),
        "component_ids": np.zeros((4, 5), np.int32),
    }


def hidden(plan, params):
    features = {name: value for name, value in batch().items() if name in plan.merge(params).inputs}
    return np.asarray(jax.jit(lambda params: plan.merge(params)(**features))(params))


def grafted(plan, base_params):
    known = named(base_params)
    # The step consumes what it is given, and the base is still needed.
    copy = lambda path, leaf: jnp.copy(known.get(path_name(path), leaf))  # noqa: E731
    return jax.tree_util.tree_map_with_path(copy, plan.init(1))


def transform(plan, optimizer):
    return Updates(optimizer, constant(0.05), freeze=(f"^(?!.*{LEARNING})",), weight_decay=0.1).build(plan.axes)


def state_size(state):
    """Numbers in an optimizer's state, but for its counters."""
    return sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)


def trained(plan, params, optimizer):
    learner = transform(plan, optimizer)
    step = make_train_step(plan, functools.partial(language_model_loss, num_components=1), learner, seed=0)
    state = plan.init_state(params, learner)
    for seed in range(3):
        state, _ = step(state, batch(seed))
    return state


def test_a_fresh_adaptation_changes_nothing_and_a_trained_one_only_itself():
    base, adapted = blueprint(EncoderDecoder), blueprint(LORA.model_class(EncoderDecoder))
    base_params = base.init(0)
    fresh = grafted(adapted, base_params)
    np.testing.assert_array_equal(hidden(adapted, fresh), hidden(base, base_params))
    params = trained(adapted, fresh, AdamW()).params
    after = named(params)
    for name, leaf in named(base_params).items():
        assert bits(after[name]) == bits(leaf), name
    factors = [name for name in after if name.endswith(("lora_a", "lora_b"))]
    assert sorted(factors) == sorted(set(after) - set(named(base_params)))
    start = named(grafted(adapted, base_params))
    assert all(not np.array_equal(after[name], start[name]) for name in factors)
    assert np.abs(hidden(adapted, params) - hidden(base, base_params)).max() > 1e-3


def test_the_number_of_learning_parameters_and_of_their_optimizer_state():
    plan = blueprint(LORA.model_class(EncoderDecoder))
    # A query and a value map, 16 -> 16, in 2 encoder self-, 3 decoder self- and 3 cross-attentions; r (in + out) each.
    count = 2 * (2 + 3 + 3) * 3 * (16 + 16)
    base = blueprint(EncoderDecoder, plan.config).num_parameters
    assert plan.num_parameters - base == count
    # Adam keeps two moments of everything that learns.
    state = jax.eval_shape(transform(plan, AdamW()).init, plan.shapes)
    assert state_size(state) == 2 * count


def test_adafactor_learns_with_whole_stacks_frozen():
    """No patterned map is in the encoder, so that its stack has nothing for the optimizer at all."""
    lora = Lora(rank=2, targets=("^decoder/.*/out$",))
    plan = blueprint(lora.model_class(EncoderDecoder))
    state = trained(plan, plan.init(0), Adafactor())
    params = state.params
    assert not any("lora" in name for name in named(params) if name.startswith("encoder"))
    assert np.abs(named(params)["decoder/layers/blocks/0/self_attention/inner/out/lora_b"]).min() > 0
    # Unfactored second moments, a placeholder of 1 for either factor of every matrix, a counter of each layer.
    assert state_size(state.opt_state) == 3 * 2 * (2 * (16 + 16) + 2 * 2) + 3


@pytest.mark.parametrize("scan", [True, False])
def test_the_merged_model_computes_the_same(scan):
    """In float64, where rounding of 2^-53, a hundred times a layer and amplified less than 10^4-fold, is below 1e-9."""
    config = dataclasses.replace(CONFIG, scan_layers=scan, dtype="float64")
    base, adapted = blueprint(DecoderOnly, config), blueprint(LORA.model_class(DecoderOnly), config)
    rng = np.random.default_rng(0)
    shapes = jax.tree.map(lambda leaf: leaf.shape, adapted.shapes)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda s: rng.standard_normal(s) * 0.3, shapes, is_leaf=lambda s: isinstance(s, tuple))
        merged = LORA.merge(params)
        assert {n: v.shape for n, v in named(merged).items()} == {n: v.shape for n, v in named(base.shapes).items()}
        wanted = hidden(adapted, params)
        np.testing.assert_allclose(hidden(base, merged), wanted, rtol=0, atol=1e-9)
        del params["decoder"]["norm"]  # what is no linear map is passed on as it is
        without = named(LORA.merge(params))
    assert without["embedding/embedding"] is params["embedding"]["embedding"]
    assert np.abs(wanted).max() > 0.1


def test_a_merged_kernel_rounds_as_float32_does():
    """Higham 2002, section 3.5: a product over n terms errs by at most n u |x| |W|; every sum adds one more u."""
    linear = Linear(24, 16, axes=("embed", "heads"), dtype="float32", rngs=nnx.Rngs(0))
    lora = Lora(rank=4, alpha=8.0)
    wrapped = LoraLinear(linear, lora, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(0)
    b = rng.standard_normal((4, 16)).astype(np.float32)
    wrapped.lora_b[...] = jnp.asarray(b)
    x = rng.standard_normal((2, 3, 24)).astype(np.float32)
    w, a = np.asarray(wrapped.kernel[...]), np.asarray(wrapped.lora_a[...])
    merged = np.asarray(lora.merge({"kernel": w, "lora_a": a, "lora_b": b})["kernel"])
    size = np.abs(x) @ np.abs(w) + 2 * np.abs(x) @ np.abs(a) @ np.abs(b)
    unit = 2.0**-24
    # Merged: 24 for x, 4 + 2 for the kernel. Unmerged: 24 + 4 + 2.
    bound = (24 + 6 + 24 + 6) * unit * size
    assert (np.abs(x @ merged - np.asarray(wrapped(x))) <= bound).all()
    assert np.abs(x @ merged - x @ w).max() > 0.1


@pytest.mark.parametrize("rank", [0, -2, 1.5, True])
def test_a_rank_that_is_none_is_refused(rank):
    with pytest.raises(UserError, match=r"Lora.rank = .*whole number"):
        Lora(rank=rank)


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(UserError, match=r"Lora.alpha = 0: it must be above 0"):
        Lora(alpha=0)
    with pytest.raises(UserError, match=r"Lora.rank = 17 exceeds the smaller side of decoder/\S+/query"):
        blueprint(Lora(rank=17).model_class(DecoderOnly))
    message = r"Lora.targets: 'qeury' matches no linear map; there are decoder/layers/blocks/0/.*/wo"
    with pytest.raises(UserError, match=message):
        blueprint(Lora(targets=("/value$", "qeury")).model_class(DecoderOnly))


def test_lists_of_linear_maps_can_be_adapted():
    plan = blueprint(Lora(rank=2, targets=(r"/wi/\d$",)).model_class(DecoderOnly))
    factors = [name for name in named(plan.shapes) if name.endswith("lora_a")]
    assert factors == [f"decoder/layers/blocks/0/mlp/inner/wi/{i}/lora_a" for i in (0, 1)]
