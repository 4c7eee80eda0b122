"""Cross-entropy against a vocabulary without ever holding all logits.

Positions are taken a chunk at a time. When a gradient is asked for, it is formed in the same pass, while the chunk's
logits are at hand, so the backward pass multiplies by one scalar and nothing is computed twice.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_domain.kernels.precision import accumulator


class TokenScores(NamedTuple):
    """What the model thought of each target; carries no gradient.

    Attributes:
      nll: [B, T] float32, negative log-likelihood in nats, without label smoothing or z-loss.
      correct: [B, T] bool, whether the target has the largest logit.
    """

    nll: jax.Array
    correct: jax.Array


def cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int = 1024,
) -> tuple[jax.Array, TokenScores]:
    """Weighted sum of token cross-entropies of `softcap(logit_scale * hidden @ kernel.T)`.

    Args:
      hidden: [B, T, D], the last layer's output; its dtype is that of the matrix products (sums are f32).
      kernel: [V, D] float32, the output embedding.
      targets: [B, T] int32.
      weights: [B, T] float32, 0 for positions that do not count.
      z_loss: factor of log(Z)^2, which keeps logits near zero (T5X; Chowdhery et al. 2022, section 5).
      label_smoothing: share of the target's probability spread evenly over the vocabulary.
      softcap: as in `attention`.
      chunk_tokens: positions (B times a part of T) whose logits are held at once.

    Returns:
      The weighted sum, a float32 scalar, and the scores of each token.
    """
    batch, length, _ = hidden.shape
    chunks = min(length, math.ceil(batch * length / chunk_tokens))
    chunk = math.ceil(length / chunks)
    padding = chunks * chunk - length
    pad = lambda a: jnp.pad(a, ((0, 0), (0, padding)) + ((0, 0),) * (a.ndim - 2))  # noqa: E731
    options = (chunk, z_loss, label_smoothing, logit_scale, softcap)
    loss, scores = _cross_entropy(pad(hidden), kernel, pad(targets), pad(weights), options)
    return loss, TokenScores(*(jax.lax.stop_gradient(a)[:, :length] for a in scores))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden, kernel, targets, weights, options):
    loss, scores, _ = _scan(hidden, kernel, targets, weights, options, with_gradient=False)
    return loss, scores


def _fwd(hidden, kernel, targets, weights, options):
    loss, scores, (d_hidden, d_kernel) = _scan(hidden, kernel, targets, weights, options, with_gradient=True)
    return (loss, scores), (d_hidden, d_kernel)


def _bwd(options, gradients, cotangents):
    d_hidden, d_kernel = gradients
    d_loss = cotangents[0]
    return (d_loss * d_hidden).astype(d_hidden.dtype), d_loss * d_kernel, None, None


_cross_entropy.defvjp(_fwd, _bwd)


def _scan(hidden, kernel, targets, weights, options, *, with_gradient):
    chunk, z_loss, label_smoothing, logit_scale, softcap = options
    vocab_size, sums = kernel.shape[0], accumulator(hidden.dtype)
    cast = kernel.astype(hidden.dtype)
    # Chunks cut the length and leave the batch whole, so a batch that is spread over devices stays where it is.
    split = lambda a: jnp.moveaxis(a.reshape(a.shape[0], -1, chunk, *a.shape[2:]), 1, 0)  # noqa: E731

    def body(carry, xs):
        loss, d_kernel = carry
        h, target, weight = xs
        logits = jnp.einsum("bcd,vd->bcv", h, cast, preferred_element_type=sums)
        if logit_scale != 1.0:
            logits = logits * logit_scale
        slope = logit_scale
        if softcap is not None:
            capped = jnp.tanh(logits / softcap)
            logits, slope = capped * softcap, (1.0 - capped**2) * logit_scale
        largest = logits.max(axis=-1, keepdims=True)
        log_z = largest[..., 0] + jnp.log(jnp.exp(logits - largest).sum(axis=-1))
        at_target = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        nll = log_z - at_target
        smoothed = nll
        if label_smoothing:
            smoothed = log_z - (1 - label_smoothing) * at_target - label_smoothing * logits.mean(axis=-1)
        loss += (weight * (smoothed + z_loss * log_z**2)).sum()
        scores = TokenScores(nll, at_target >= largest[..., 0])
        if not with_gradient:
            return (loss, d_kernel), (scores, None)
        is_target = target[..., None] == jnp.arange(vocab_size)
        wanted = jnp.where(is_target, 1.0 - label_smoothing, 0.0) + label_smoothing / vocab_size
        probability = jnp.exp(logits - log_z[..., None])
        d_logits = weight[..., None] * (probability * (1 + 2 * z_loss * log_z[..., None]) - wanted) * slope
        d_logits = d_logits.astype(h.dtype)
        d_hidden = jnp.einsum("bcv,vd->bcd", d_logits, cast, preferred_element_type=sums)
        d_kernel += jnp.einsum("bcv,bcd->vd", d_logits, h, preferred_element_type=sums)
        return (loss, d_kernel), (scores, d_hidden.astype(h.dtype))

    d_kernel = jnp.zeros(kernel.shape, sums) if with_gradient else None
    (loss, d_kernel), (scores, d_hidden) = jax.lax.scan(
        body, (jnp.zeros((), sums), d_kernel), (split(hidden), split(targets), split(weights))
    )
    join = lambda a: jnp.moveaxis(a, 0, 1).reshape(hidden.shape[:2] + a.shape[3:])  # noqa: E731
    return loss, TokenScores(*map(join, scores)), (None if d_hidden is None else join(d_hidden), d_kernel)
