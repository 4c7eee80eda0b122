"""Drawing a token for each position without ever holding all logits."""

import math

import jax
import jax.numpy as jnp

from t5x_domain.kernels.precision import accumulator


def sample_tokens(
    hidden: jax.Array,
    kernel: jax.Array,
    key: jax.Array,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int = 1024,
) -> jax.Array:
    """Tokens drawn from softmax(softcap(logit_scale * hidden @ kernel.T) / temperature), without a gradient.

    Args:
      hidden: [B, T, D], the last layer's output; its dtype is that of the matrix product (sums are f32).
      kernel: [V, D] float32, the output embedding.
      key: what is drawn is a function of it and of the position in the whole batch, not of the mesh.
      temperature: above 0; towards 0 the likeliest token is taken.
      softcap: as in `attention`.
      chunk_tokens: positions (B times a part of T) whose logits are held at once.

    Returns:
      [B, T] int32.
    """
    hidden, kernel = jax.lax.stop_gradient((hidden, kernel.astype(hidden.dtype)))
    batch, length, dim = hidden.shape
    chunks = min(length, math.ceil(batch * length / chunk_tokens))
    chunk = math.ceil(length / chunks)
    padded = jnp.pad(hidden, ((0, 0), (0, chunks * chunk - length), (0, 0)))

    def draw(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        index, h = part
        logits = jnp.einsum("bcd,vd->bcv", h, kernel, preferred_element_type=accumulator(h.dtype)) * logit_scale
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        return jax.random.categorical(jax.random.fold_in(key, index), logits / temperature).astype(jnp.int32)

    # Chunks cut the length and leave the batch whole, so a batch that is spread over devices stays where it is.
    parts = jnp.moveaxis(padded.reshape(batch, chunks, chunk, dim), 1, 0)
    tokens = jax.lax.map(draw, (jnp.arange(chunks), parts))
    return jnp.moveaxis(tokens, 0, 1).reshape(batch, -1)[:, :length]
