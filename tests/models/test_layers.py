"""Layers against values worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_domain.errors import UserError
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.layers import ACTIVATIONS, Embedding, Mlp, Norm, dropout, rotate

EPS = 2**-23  # of float32


def config(**options) -> ModelConfig:
    return ModelConfig(
        **{"vocab_size": 50, "embed_dim": 4, "mlp_dim": 8, "dtype": "float32", "norm_epsilon": 0.0, **options}
    )


def test_rmsnorm_by_hand():
    """Mean square of (1, 1, 3, 5) is 9."""
    norm = Norm(config())
    norm.scale[...] = jnp.array([1.0, 2.0, 3.0, 4.0])
    y = norm(jnp.array([[1.0, 1.0, 3.0, 5.0]]))
    np.testing.assert_allclose(y[0], np.array([1, 2, 9, 20]) / 3, rtol=4 * EPS)


def test_layernorm_by_hand():
    """(1, 1, 3, 7) has mean 3 and variance (4 + 4 + 0 + 16) / 4 = 6."""
    y = Norm(config(norm="layernorm"))(jnp.array([[1.0, 1.0, 3.0, 7.0]]))
    np.testing.assert_allclose(y[0], np.array([-2, -2, 0, 4]) / math.sqrt(6), rtol=4 * EPS)


def test_unit_offset_starts_at_zero_and_means_one():
    x = jnp.array([[1.0, 1.0, 3.0, 5.0]])
    norm = Norm(config(norm_unit_offset=True))
    assert (norm.scale[...] == 0).all()
    np.testing.assert_array_equal(norm(x), Norm(config())(x))


def test_norm_of_bfloat16_is_computed_in_float32():
    """1 + 2^-7 squared is no bfloat16; the result is the float32 one, rounded once."""
    x = (1 + 2**-7 * jnp.arange(4.0)).astype(jnp.bfloat16)[None]
    y = Norm(config())(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, Norm(config())(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_rotation_by_hand():
    """Pairs are (x_i, x_{i + D/2}); pair i turns by position * base^(-2 i / D)."""
    x = jnp.array([1.0, 2.0, 0.0, 0.0])[None, None, None]
    y = rotate(x, jnp.array([[3]]), base=100.0)[0, 0, 0]
    expected = [math.cos(3), 2 * math.cos(0.3), math.sin(3), 2 * math.sin(0.3)]
    np.testing.assert_allclose(y, expected, atol=8 * EPS)


def test_products_of_rotated_vectors_depend_on_the_distance_alone():
    """Positions below 100 and angles in float32: an angle is off by 100 EPS at most, so are the products (|x| = 1)."""
    x = jax.random.normal(jax.random.key(0), (2, 1, 1, 6))
    x /= jnp.linalg.norm(x, axis=-1, keepdims=True)
    at = lambda i, position: rotate(x[i : i + 1], jnp.array([[position]]), 50.0)  # noqa: E731
    product = lambda i, j: jnp.vdot(at(0, i), at(1, j))  # noqa: E731
    assert abs(product(3, 10) - product(90, 97)) < 200 * EPS
    assert abs(product(3, 10) - product(3, 11)) > 1e-3


@pytest.mark.parametrize(
    "name, at_one, tolerance",
    # The normal distribution's Φ(1) = 0.8413447; its tanh form gives 0.8411920; silu(1) = 1 / (1 + 1/e).
    [
        ("gelu", 0.8411920, 1e-6),
        ("gelu_exact", 0.8413447, 1e-6),
        ("silu", 0.7310586, 1e-6),
        ("relu", 1, 0),
        ("linear", 1, 0),
    ],
)
def test_activations(name, at_one, tolerance):
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.float32(1)), at_one, atol=tolerance)


def test_gated_layer_multiplies_its_branches():
    mlp = Mlp(config(mlp_activations=("relu", "linear")), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 3, 4))
    gate, up, down = mlp.wi[0].kernel[...], mlp.wi[1].kernel[...], mlp.wo.kernel[...]
    np.testing.assert_allclose(mlp(x), (np.maximum(x @ gate, 0) * (x @ up)) @ down, atol=16 * EPS)


def test_dropout():
    """A share of 0.25 is dropped: of 10 000 values 2500 ± 5 standard deviations (43 each); the rest grow by 4/3."""
    x = jnp.ones(10_000)
    y = dropout(x, 0.25, jax.random.key(0))
    assert abs(int((y == 0).sum()) - 2500) < 5 * 43.3
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (y != dropout(x, 0.25, jax.random.key(1))).any()
    assert dropout(x, 0.25, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_scaled_embedding_is_multiplied_by_the_root_of_its_width():
    embedding = Embedding(config(scale_embedding=True), rngs=nnx.Rngs(0))
    table = embedding.embedding[...]
    np.testing.assert_array_equal(embedding(jnp.array([[7]]), table)[0, 0], 2 * table[7])


@pytest.mark.parametrize("scaled, std", [(False, 1.0), (True, 0.125)])
def test_initial_embedding(scaled, std):
    """N(0, 1), or N(0, 1/64) if scaled later; the deviation of 64 000 draws is within 5 / sqrt(128 000) = 1.4 %."""
    values = Embedding(config(vocab_size=1000, embed_dim=64, scale_embedding=scaled), rngs=nnx.Rngs(0)).embedding[...]
    assert abs(values.std() / std - 1) < 0.014


def test_tied_embedding_has_no_second_table():
    tied = Embedding(config(tie_embeddings=True), rngs=nnx.Rngs(0))
    assert tied.output is None
    np.testing.assert_array_equal(tied.output_kernel(tied.embedding[...]), tied.embedding[...])
    free = Embedding(config(), rngs=nnx.Rngs(0))
    assert (free.output_kernel(free.embedding[...]) != free.embedding[...]).any()


class TestLearnedPositions:
    """Of an embedding that is narrower than the model: ELECTRA's order (Clark et al. 2020)."""

    NARROW = {
        "embedding_dim": 2,
        "position": "learned",
        "max_positions": 3,
        "embedding_norm": True,
        "norm": "layernorm",
    }

    @pytest.fixture
    def embedding(self):
        embedding = Embedding(config(**self.NARROW), rngs=nnx.Rngs(0))
        embedding.embedding[...] = jnp.tile(jnp.array([5.0, 1.0]), (50, 1))
        embedding.positions[...] = jnp.array([[0.0, 0.0], [0.0, 8.0], [0.0, 0.0]])
        embedding.projection.kernel[...] = jnp.array([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 1.0]])
        return embedding

    def test_by_hand(self, embedding):
        """(5, 1) has LayerNorm (1, -1); (5, 1) + (0, 8) has (-1, 1); then the projection."""
        np.testing.assert_array_equal(
            embedding(jnp.zeros((1, 2), int), embedding.embedding[...])[0], [[1, 2, 3, 3], [-1, -2, -3, -3]]
        )
        assert embedding.norm.scale.shape == (2,)

    def test_they_restart_with_each_text(self, embedding):
        positions = jnp.array([[1, 0, 1]])
        found = embedding(jnp.zeros((1, 3), int), embedding.embedding[...], positions)[0]
        np.testing.assert_array_equal(found[0], found[2])
        np.testing.assert_array_equal(found[0], -found[1])

    def test_dropout_is_before_the_projection(self, embedding):
        """What it drops is one of two dimensions: (1, -1) becomes (2, 0), (0, -2) or (0, 0) of rate 1/2."""
        embedding.config = config(**self.NARROW, dropout_rate=0.5)
        rows = np.asarray(embedding(jnp.zeros((30, 1), int), embedding.embedding[...], rng=jax.random.key(0)))[:, 0]
        wanted = {(0, 0, 0, 0), (2, 4, 6, 8), (0, 0, 0, -2), (2, 4, 6, 6)}
        assert {tuple(row) for row in rows.tolist()} == wanted

    def test_a_row_too_long_is_refused(self, embedding):
        with pytest.raises(UserError, match=r"ModelConfig.max_positions = 3: .* a row of 4; take shorter rows"):
            jax.eval_shape(embedding, jnp.zeros((1, 4), int), embedding.embedding[...])

    def test_a_scaled_embedding_is_scaled_before_they_are_added(self):
        embedding = Embedding(config(position="learned", scale_embedding=True), rngs=nnx.Rngs(0))
        found = embedding(jnp.array([[7, 7]]), embedding.embedding[...])[0]
        np.testing.assert_allclose(found, 2 * embedding.embedding[7] + embedding.positions[:2], rtol=4 * EPS)
