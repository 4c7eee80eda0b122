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


class Axes(NamedTuple):
    """Axes of a mesh over which `jax.shard_map` has divided the arrays; of one device there are none.

    Attributes:
      positions: of the hidden states, targets and weights.
      vocab: of the kernel's rows.
      embed: of the kernel's columns, one of `positions`.
    """

    positions: tuple[str, ...] = ()
    vocab: str | None = None
    embed: str | None = None


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
    axes: Axes = Axes(),  # noqa: B008 (it is immutable)
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
      axes: over which the arrays are a device's parts. `parallel.cross_entropy` finds them.

    Returns:
      The weighted sum, a float32 scalar, over all devices, and the scores of each token.
    """
    batch, length, _ = hidden.shape
    chunks = min(length, math.ceil(batch * length / chunk_tokens))
    chunk = math.ceil(length / chunks)
    padding = chunks * chunk - length
    pad = lambda a: jnp.pad(a, ((0, 0), (0, padding)) + ((0, 0),) * (a.ndim - 2))  # noqa: E731
    options = (chunk, z_loss, label_smoothing, logit_scale, softcap, axes)
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
    chunk, z_loss, label_smoothing, logit_scale, softcap, axes = options
    sums = accumulator(hidden.dtype)
    cast = kernel.astype(hidden.dtype)
    if axes.embed:  # once, not for every chunk
        cast = jax.lax.all_gather(cast, axes.embed, axis=1, tiled=True)
    vocab = (axes.vocab,) if axes.vocab else ()
    vocab_size = jax.lax.psum(len(kernel), vocab)
    ids = jax.lax.axis_index(vocab) * len(kernel) + jnp.arange(len(kernel))
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
        largest = jax.lax.pmax(logits.max(axis=-1), vocab)
        log_z = largest + jnp.log(jax.lax.psum(jnp.exp(logits - largest[..., None]).sum(axis=-1), vocab))
        is_target = target[..., None] == ids
        at_target = jax.lax.psum(jnp.where(is_target, logits, 0.0).sum(axis=-1), vocab)
        nll = log_z - at_target
        smoothed = nll
        if label_smoothing:
            mean = jax.lax.psum(logits.sum(axis=-1), vocab) / vocab_size
            smoothed = log_z - (1 - label_smoothing) * at_target - label_smoothing * mean
        loss += (weight * (smoothed + z_loss * log_z**2)).sum()
        scores = TokenScores(nll, at_target >= largest)
        if not with_gradient:
            return (loss, d_kernel), (scores, None)
        wanted = jnp.where(is_target, 1.0 - label_smoothing, 0.0) + label_smoothing / vocab_size
        probability = jnp.exp(logits - log_z[..., None])
        d_logits = weight[..., None] * (probability * (1 + 2 * z_loss * log_z[..., None]) - wanted) * slope
        d_logits = d_logits.astype(h.dtype)
        d_hidden = jax.lax.psum(jnp.einsum("bcv,vd->bcd", d_logits, cast, preferred_element_type=sums), vocab)
        d_kernel += jnp.einsum("bcv,bcd->vd", d_logits, h, preferred_element_type=sums)
        return (loss, d_kernel), (scores, d_hidden.astype(h.dtype))

    loss = _varying(jnp.zeros((), sums), axes.positions)
    d_kernel = _varying(jnp.zeros(cast.shape, sums), axes.positions + vocab) if with_gradient else None
    (loss, d_kernel), (scores, d_hidden) = jax.lax.scan(
        body, (loss, d_kernel), (split(hidden), split(targets), split(weights))
    )
    # A device sums what its own chunks give; what all devices have found is summed once.
    loss = jax.lax.psum(loss, axes.positions)
    if with_gradient:
        if axes.embed:
            d_kernel = jax.lax.psum_scatter(d_kernel, axes.embed, scatter_dimension=1, tiled=True)
        d_kernel = jax.lax.psum(d_kernel, tuple(axis for axis in axes.positions if axis != axes.embed))
    join = lambda a: jnp.moveaxis(a, 0, 1).reshape(hidden.shape[:2] + a.shape[3:])  # noqa: E731
    return loss, TokenScores(*map(join, scores)), (None if d_hidden is None else join(d_hidden), d_kernel)


def _varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The same, said to differ from device to device along the axes: what a loop carries must say so from the start."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x
