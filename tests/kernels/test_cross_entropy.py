"""The chunked loss and its gradient against jax's own derivative of the plain formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxpr_shapes import intermediate_shapes

from t5x_domain.kernels.cross_entropy import cross_entropy


def make(rng, batch=2, length=7, dim=5, vocab=11):
    """hidden, kernel, targets, weights with some zeros."""
    weights = rng.uniform(0.1, 2, (batch, length)) * (rng.random((batch, length)) < 0.8)
    return (
        rng.standard_normal((batch, length, dim)).astype(np.float32),
        rng.standard_normal((vocab, dim)).astype(np.float32),
        rng.integers(0, vocab, (batch, length)).astype(np.int32),
        weights.astype(np.float32),
    )


def plain(hidden, kernel, targets, weights, *, z_loss=0.0, label_smoothing=0.0, logit_scale=1.0, softcap=None):
    """The formula, all logits at once: loss, negative log-likelihoods, logits."""
    logits = logit_scale * hidden @ kernel.T
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    log_p = jax.nn.log_softmax(logits)
    wanted = (1 - label_smoothing) * jax.nn.one_hot(targets, kernel.shape[0]) + label_smoothing / kernel.shape[0]
    z = jax.nn.logsumexp(logits, axis=-1)
    loss = (weights * (-(wanted * log_p).sum(-1) + z_loss * z**2)).sum()
    return loss, (-jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0], logits)


def reference(arrays, options):
    """Value and gradients in float64."""
    with jax.enable_x64(True):
        hidden, kernel, weights = (jnp.asarray(arrays[i], jnp.float64) for i in (0, 1, 3))
        f = lambda h, k: plain(h, k, jnp.asarray(arrays[2]), weights, **options)  # noqa: E731
        (loss, (nll, logits)), gradients = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(hidden, kernel)
        return jax.tree.map(np.asarray, (loss, nll, logits, gradients))


def relative_error(arrays, options) -> float:
    """Bound of the relative error of any summed term.

    A logit is a sum of D products, each within (D + 4) u of exact; exp makes that a relative error of probabilities;
    sums over the vocabulary and over positions add one u a term at most.
    """
    hidden, kernel = arrays[:2]
    size = (abs(options.get("logit_scale", 1.0)) * abs(hidden) @ abs(kernel).T).max() + np.log(len(kernel)) + 1
    tokens = arrays[2].size
    return 2**-24 * ((hidden.shape[-1] + len(kernel) + 8) * size * 4 + tokens)


def check(arrays, chunk_tokens, options):
    """Loss, scores and both gradients."""
    f = lambda h, k: cross_entropy(h, k, *arrays[2:], chunk_tokens=chunk_tokens, **options)  # noqa: E731
    (loss, scores), (d_hidden, d_kernel) = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(*arrays[:2])
    value_only, _ = jax.jit(f)(*arrays[:2])
    want_loss, nll, logits, (want_hidden, want_kernel) = reference(arrays, options)
    epsilon, (hidden, kernel, _, weights) = relative_error(arrays, options), arrays
    z = np.log(np.exp(logits).sum(-1))
    # |d loss / d logit| <= weight * scale * (p (1 + 2 z_loss |log Z|) + wanted); p and wanted each sum to 1.
    z_loss, scale = options.get("z_loss", 0.0), options.get("logit_scale", 1.0)
    row = weights * scale * (2 + 2 * z_loss * abs(z))
    sizes = (weights * (abs(nll) + abs(logits).max(-1) + z_loss * z**2 + 1)).sum()
    np.testing.assert_allclose(loss, want_loss, rtol=0, atol=epsilon * sizes)
    np.testing.assert_allclose(value_only, want_loss, rtol=0, atol=epsilon * sizes)
    np.testing.assert_allclose(scores.nll, nll, rtol=0, atol=epsilon * (abs(logits).max() + 1))
    assert (np.asarray(scores.correct) == (logits.argmax(-1) == arrays[2])).all()
    assert (abs(d_hidden - want_hidden) <= epsilon * row[..., None] * abs(kernel).max(0)).all()
    assert (abs(d_kernel - want_kernel) <= epsilon * np.einsum("bt,btd->d", row, abs(hidden))).all()


OPTIONS = {
    "plain": {},
    "z_loss": {"z_loss": 0.1},
    "smoothing": {"label_smoothing": 0.2},
    "scale and cap": {"logit_scale": 0.5, "softcap": 2.0},
    "all": {"z_loss": 1e-2, "label_smoothing": 0.1, "logit_scale": 2.0, "softcap": 3.0},
}


@pytest.mark.parametrize("chunk_tokens", [1, 6, 1024])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_plain_formula(options, chunk_tokens):
    check(make(np.random.default_rng(0)), chunk_tokens, options)


@settings(max_examples=6, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 9, 6, 17))),
    chunk_tokens=st.integers(1, 30),
    options=st.sampled_from(list(OPTIONS.values())),
    seed=st.integers(0, 10**6),
)
def test_any_shape_and_chunk(sizes, chunk_tokens, options, seed):
    check(make(np.random.default_rng(seed), *sizes), chunk_tokens, options)


def test_hand_computed():
    """Two classes with logits (log 3, 0): p = (3/4, 1/4), so the loss of class 1 is log 4; z-loss adds 0.5 log² 4."""
    hidden, kernel = jnp.full((1, 1, 1), np.log(3.0)), jnp.array([[1.0], [0.0]])
    loss, scores = cross_entropy(hidden, kernel, jnp.array([[1]]), jnp.array([[2.0]]), z_loss=0.5)
    want = np.log(4)
    np.testing.assert_allclose(scores.nll, [[want]], rtol=4 * 2**-24)
    np.testing.assert_allclose(loss, 2 * (want + 0.5 * want**2), rtol=8 * 2**-24)
    assert not scores.correct[0, 0]


def test_a_constant_factor_scales_the_gradient():
    arrays = make(np.random.default_rng(1))
    f = lambda h, k, c: c * cross_entropy(h, k, *arrays[2:])[0]  # noqa: E731
    one = jax.grad(f, (0, 1))(*arrays[:2], 1.0)
    four = jax.grad(f, (0, 1))(*arrays[:2], 4.0)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(4 * a, b), one, four)  # a power of two: exact


def test_tokens_without_weight_change_nothing():
    hidden, kernel, targets, weights = make(np.random.default_rng(2))
    other = np.where(weights[..., None] == 0, 7.0, hidden).astype(np.float32)
    f = lambda h: cross_entropy(h, kernel, targets, weights)[0]  # noqa: E731
    assert (weights == 0).any() and f(hidden) == f(other)
    assert (np.asarray(jax.grad(f)(hidden))[weights == 0] == 0).all()


def test_bfloat16_activations():
    """Logits and sums stay float32; the logits' gradient is rounded to bfloat16 (u = 2^-9) before its products."""
    hidden, kernel, targets, weights = make(np.random.default_rng(3))
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in (hidden, kernel)]
    f = lambda h, k: cross_entropy(h, k, targets, weights)[0]  # noqa: E731
    loss, (d_hidden, d_kernel) = jax.value_and_grad(f, (0, 1))(jnp.asarray(hidden, jnp.bfloat16), kernel)
    want_loss, _, logits, (want_hidden, want_kernel) = reference((*rounded, targets, weights), {})
    assert loss.dtype == jnp.float32 and d_hidden.dtype == jnp.bfloat16 and d_kernel.dtype == jnp.float32
    epsilon = relative_error((*rounded, targets, weights), {})
    np.testing.assert_allclose(loss, want_loss, rtol=0, atol=epsilon * (weights * (2 * abs(logits).max(-1) + 1)).sum())
    row, twice = 2 * weights, epsilon + 2 * 2**-9
    error = abs(np.asarray(d_hidden, np.float64) - want_hidden)
    assert (error <= twice * row[..., None] * abs(rounded[1]).max(0)).all()
    assert (abs(d_kernel - want_kernel) <= twice * np.einsum("bt,btd->d", row, abs(rounded[0]))).all()


@pytest.mark.parametrize("with_gradient", [False, True])
def test_the_logits_of_all_positions_are_never_held(with_gradient):
    batch, length, vocab = 2, 32, 50
    hidden, kernel, targets, weights = make(np.random.default_rng(4), batch, length, 3, vocab)

    def run(chunk_tokens):
        f = lambda h, k: cross_entropy(h, k, targets, weights, chunk_tokens=chunk_tokens)[0]  # noqa: E731
        shapes = intermediate_shapes(jax.grad(f, (0, 1)) if with_gradient else f, hidden, kernel)
        return [shape for shape in shapes if np.prod(shape) >= batch * length * vocab]

    assert run(batch * length), "the detector sees nothing"
    assert not run(8)
