"""Scanned, unrolled and rematerialised stacks are one function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_domain.models.config import ModelConfig
from t5x_domain.models.stack import Stack

BASE = {"vocab_size": 1, "embed_dim": 8, "mlp_dim": 12, "num_heads": 2, "head_dim": 4, "dtype": "float64"}
SHAPES = {
    "one kind": (2, {}),
    "bias per layer": (2, {"relative_bias_per_layer": True}),
    "pattern with remainder": (5, {"layer_pattern": ("local", "global"), "local_window": 2}),
    "shorter than the pattern": (1, {"layer_pattern": ("local", "global"), "local_window": 2}),
    "post-norm": (2, {"norm_placement": "post", "norm": "layernorm"}),
    "rope, norms after": (2, {"position": "rope", "norm_placement": "pre_post", "rope_base_local": 5.0,
                              "layer_pattern": ("local",), "local_window": 2}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def float64():
    """In float64 the ways to run a stack differ by the order of sums of a few hundred terms: far below 1e-12."""
    with jax.enable_x64(True):
        yield


def make(num_layers, *, causal=True, **options) -> Stack:
    stack = Stack(ModelConfig(**BASE | options), num_layers, causal=causal, cross_attention=causal, rngs=nnx.Rngs(0))
    return with_params(stack, jax.tree.map(lambda p: p.astype(jnp.float64), nnx.state(stack)))


def with_params(stack: Stack, params: nnx.State) -> Stack:
    nnx.update(stack, params)
    return stack


def unrolled_params(stack: Stack) -> dict[tuple, jax.Array]:
    """Parameters of a scanned stack under the names of an unrolled one."""
    kinds, result, done = 0, {}, 0
    if stack.layers is not None:
        kinds = len(stack.layers.blocks)
        done = kinds * jax.tree.leaves(nnx.state(stack.layers))[0].shape[0]
    for path, param in nnx.to_flat_state(nnx.state(stack)):
        match path:
            case ("layers", "blocks", kind, *name):
                for repeat, value in enumerate(param[...]):
                    result["rest", "blocks", repeat * kinds + kind, *name] = value
            case ("rest", "blocks", index, *name):
                result["rest", "blocks", done + index, *name] = param[...]
            case _:
                result[path] = param[...]
    return result


def inputs() -> dict[str, jax.Array]:
    """Two rows of two packed segments and padding, with a memory."""
    keys = jax.random.split(jax.random.key(1), 2)
    ids = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 2, 2, 2]])
    return {
        "x": jax.random.normal(keys[0], (2, 8, 8), jnp.float64),
        "memory": jax.random.normal(keys[1], (2, 5, 8), jnp.float64),
        "segment_ids": ids,
        "positions": jnp.array([[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3, 4, 5]]),
        "memory_segment_ids": jnp.array([[1, 1, 1, 2, 2], [1, 2, 2, 2, 0]]),
    }


def value_and_gradients(stack: Stack, **options):
    """A sum of the outputs, and its gradients by unrolled name."""
    graph, params = nnx.split(stack)

    @jax.jit
    def run(params):
        return jax.value_and_grad(lambda params: (nnx.merge(graph, params)(**inputs(), **options) ** 3).sum())(params)

    value, gradients = run(params)
    return value, unrolled_params(with_params(nnx.clone(stack), gradients))


@pytest.mark.parametrize("shape", SHAPES)
def test_scanned_equals_unrolled(shape):
    num_layers, options = SHAPES[shape]
    scanned, unrolled = make(num_layers, **options), make(num_layers, **options, scan_layers=False)
    assert unrolled.layers is None and len(unrolled.rest.blocks) == num_layers
    params = nnx.state(unrolled)
    values = unrolled_params(scanned)
    assert set(values) == set(dict(nnx.to_flat_state(params)))
    for path, param in nnx.to_flat_state(params):
        param.set_value(values[path])
    assert_same(value_and_gradients(scanned), value_and_gradients(with_params(unrolled, params)))


@pytest.mark.parametrize("remat, scan_layers", [("minimal", True), ("full", True), ("full", False)])
def test_rematerialised_equals_plain(remat, scan_layers):
    options = {"layer_pattern": ("local", "global"), "scan_layers": scan_layers, "dropout_rate": 0.3}
    rng = {"rng": jax.random.key(5)}
    plain = value_and_gradients(make(3, **options), **rng)
    assert_same(plain, value_and_gradients(make(3, **options, remat=remat), **rng))


def assert_same(expected, actual):
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-12)
    for path, gradient in expected[1].items():
        np.testing.assert_allclose(actual[1][path], gradient, rtol=1e-9, atol=1e-12, err_msg=str(path))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_rematerialisation_saves_memory(scan_layers):
    """Without it every one of 8 layers keeps at least its two mlp branches, 2 x 64 x 512 x 8 bytes each."""

    def temporary_bytes(remat: str) -> int:
        stack = make(8, causal=False, embed_dim=16, mlp_dim=512, scan_layers=scan_layers, remat=remat)
        graph, params = nnx.split(stack)
        loss = lambda params, x: nnx.merge(graph, params)(x).sum()  # noqa: E731
        x = jax.ShapeDtypeStruct((1, 64, 16), jnp.float64)
        return jax.jit(jax.grad(loss)).lower(params, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("none") - temporary_bytes("full") > 6 * 2 * 64 * 512 * 8


def test_dropout_follows_its_key():
    stack = make(3, dropout_rate=0.2)
    run = nnx.jit(lambda stack, rng: stack(**inputs(), rng=rng))
    first, again, other = (run(stack, jax.random.key(seed)) for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()
    plain = make(3)
    assert (run(stack, None) == run(plain, None)).all() and (first != run(stack, None)).any()


def test_every_layer_drops_something_else():
    keys = []

    def spy(x, rate, rng):
        keys.append(rng)
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("t5x_domain.models.stack.dropout", spy)
        patch.setattr("t5x_domain.models.layers.dropout", spy)
        unrolled = make(3, causal=True, scan_layers=False, dropout_rate=0.5)
        unrolled(**inputs(), rng=jax.random.key(0))
    # Output, and in each of three layers: self-attention, cross-attention, inside and after the mlp.
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys) == 1 + 3 * 4


@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_axis_of_every_parameter_has_a_name(scan_layers):
    num_layers, options = SHAPES["pattern with remainder"]
    stack = make(num_layers, **options, qk_norm=True, scan_layers=scan_layers)
    for path, param in nnx.to_flat_state(nnx.state(stack)):
        assert len(param.logical_axes) == param.ndim, path
        assert (param.logical_axes[0] == "layers") == (path[0] == "layers"), path


def test_a_post_norm_layer_by_hand():
    """Devlin et al. 2019: every sub-layer gives norm(x + f(x)), and nothing follows the last."""
    stack = make(1, causal=False, norm_placement="post", scan_layers=False)
    x = inputs()["x"]
    (block,) = stack.rest.blocks
    plans, bias = stack.plans(x, None), stack.relative_bias()
    attended = block.self_attention.inner(x, plan=plans["global"], relative_bias=bias)
    middle = block.self_attention.norm(x + attended)
    wanted = block.mlp.norm(middle + block.mlp.inner(middle))
    np.testing.assert_allclose(stack(x), wanted, rtol=0, atol=1e-12)
    assert stack.norm is None
    np.testing.assert_allclose(jnp.square(stack(x)).mean(axis=-1), 1, atol=1e-5)  # RMSNorm of scale 1, and epsilon
