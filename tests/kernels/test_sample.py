import jax
import jax.numpy as jnp
import numpy as np
from jaxpr_shapes import intermediate_shapes

from t5x_domain.kernels.sample import sample_tokens

VOCAB, DIM = 5, 4


def inputs(batch, length):
    rng = np.random.default_rng(0)
    hidden = np.broadcast_to(rng.standard_normal(DIM), (batch, length, DIM)).astype(np.float32)
    return jnp.asarray(hidden), jnp.asarray(rng.standard_normal((VOCAB, DIM)), jnp.float32)


def test_frequencies_are_the_softmax():
    """All positions have the same logits, so 64 x 200 draws are a sample of softmax(4 tanh(2 logits / 4) / 0.7)."""
    hidden, kernel = inputs(64, 200)
    tokens = sample_tokens(hidden, kernel, jax.random.key(1), temperature=0.7, logit_scale=2.0, softcap=4.0)
    logits = 4 * np.tanh(2 * np.asarray(kernel @ hidden[0, 0], np.float64) / 4) / 0.7
    wanted = np.exp(logits) / np.exp(logits).sum()
    found = np.bincount(np.asarray(tokens).ravel(), minlength=VOCAB) / tokens.size
    assert tokens.shape == (64, 200)
    assert np.abs(found - wanted).max() < 5 * np.sqrt(wanted * (1 - wanted) / tokens.size).max()  # five sigma


def test_positions_draw_independently_in_every_chunk():
    """Independent draws at two positions agree with probability sum p^2, in one chunk or in two."""
    hidden, kernel = inputs(64, 200)
    tokens = np.asarray(sample_tokens(hidden, kernel, jax.random.key(1), chunk_tokens=640))  # chunks of 10
    p = np.asarray(jax.nn.softmax(kernel @ hidden[0, 0]), np.float64)
    agree = (p**2).sum()
    for distance in (1, 10):
        found = (tokens[:, distance:] == tokens[:, :-distance]).mean()
        assert abs(found - agree) < 5 * np.sqrt(agree / (64 * 190))  # at least the spread of dependent pairs


def test_towards_temperature_0_the_likeliest():
    rng = np.random.default_rng(2)
    hidden, kernel = rng.standard_normal((3, 7, DIM)).astype(np.float32), inputs(1, 1)[1]
    tokens = sample_tokens(jnp.asarray(hidden), kernel, jax.random.key(0), temperature=1e-6, chunk_tokens=6)
    np.testing.assert_array_equal(tokens, (hidden @ np.asarray(kernel).T).argmax(-1))


def test_no_logits_of_all_positions_and_no_gradient():
    hidden, kernel = inputs(4, 64)
    draw = lambda h, k: sample_tokens(h, k, jax.random.key(0), chunk_tokens=32)  # noqa: E731
    shapes = intermediate_shapes(draw, hidden, kernel)
    assert (4, 8, VOCAB) in shapes
    assert max(np.prod(shape) for shape in shapes if VOCAB in shape[-1:]) == 4 * 8 * VOCAB
    value = lambda h: (draw(h, kernel) * h[..., 0]).sum()  # noqa: E731
    gradient = jax.grad(value)(hidden)
    np.testing.assert_array_equal(gradient[..., 0], draw(hidden, kernel))  # of the factor alone
    np.testing.assert_array_equal(gradient[..., 1:], 0)
