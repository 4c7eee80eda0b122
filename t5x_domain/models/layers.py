"""Layers that know nothing of attention: linear maps, norms, feed-forward, embedding, rotation, dropout.

Parameters are float32 and carry the names of their axes (`logical_axes`), which parallel/ maps to a mesh.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_domain.errors import UserError
from t5x_domain.kernels.dense import dense
from t5x_domain.kernels.precision import accumulator
from t5x_domain.models.config import ModelConfig
from t5x_domain.parallel.sharding import constrain

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, axes: tuple[str, ...]) -> nnx.Param:
    """A float32 parameter drawn from N(0, std²)."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), logical_axes=axes)


def dropout(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of x and scales up the rest; the identity without `rng`."""
    if rng is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(rng, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


class Linear(nnx.Module):
    """x @ kernel, without bias."""

    def __init__(
        self, in_dim: int, out_dim: int, *, axes: tuple[str, str], dtype: str, rngs: nnx.Rngs, std: float | None = None
    ) -> None:
        """`std` of the initial kernel; by default 1/sqrt(in_dim)."""
        self.kernel = normal_param(rngs, (in_dim, out_dim), in_dim**-0.5 if std is None else std, axes)
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, in_dim] -> [B, T, out_dim]."""
        return dense(x, self.kernel[...].astype(self.dtype))


class Norm(nnx.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm without bias, computed in float32."""

    def __init__(self, config: ModelConfig, dim: int | None = None, kind: str | None = None) -> None:
        """`dim` is the width normalised, by default the embedding's; `kind` overrides `config.norm`."""
        start = jnp.zeros if config.norm_unit_offset else jnp.ones
        self.scale = nnx.Param(start(dim or config.embed_dim, jnp.float32), logical_axes=("norm",))
        self.kind, self.epsilon = kind or config.norm, config.norm_epsilon
        self.offset = 1.0 if config.norm_unit_offset else 0.0

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., dim] -> the same shape and dtype."""
        return _normalise(x, self.scale[...] + self.offset, self.kind, self.epsilon)


# For its gradient x alone is kept, in its own dtype, instead of what is made of it in float32. Where XLA joins the two
# computations again, outside of a scan, it does so knowingly; a barrier against that would cost more.
@functools.partial(jax.checkpoint, static_argnums=(2, 3), prevent_cse=False)
def _normalise(x: jax.Array, scale: jax.Array, kind: str, epsilon: float) -> jax.Array:
    y = x.astype(accumulator(x.dtype))
    if kind == "layernorm":
        y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + epsilon)
    return (y * scale).astype(x.dtype)


class Mlp(nnx.Module):
    """Feed-forward layer; with several activations its branches are multiplied (Shazeer 2020, "GLU variants")."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Builds one input kernel for each activation and the output kernel."""
        sizes = {"dtype": config.dtype, "rngs": rngs}
        self.wi = nnx.List(
            [Linear(config.embed_dim, config.mlp_dim, axes=("embed", "mlp"), **sizes) for _ in config.mlp_activations]
        )
        self.wo = Linear(config.mlp_dim, config.embed_dim, axes=("mlp", "embed"), **sizes)
        self.activations, self.dropout_rate = tuple(config.mlp_activations), config.dropout_rate

    def __call__(self, x: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """[B, T, embed_dim] -> the same."""
        hidden = _multiplied(self.activations, *[wi(x) for wi in self.wi])
        return self.wo(dropout(hidden, self.dropout_rate, rng))


@functools.partial(jax.checkpoint, static_argnums=0, prevent_cse=False)  # keeps the branches only
def _multiplied(activations: tuple[str, ...], *branches: jax.Array) -> jax.Array:
    """The product of the branches, each after its activation."""
    activated = [ACTIVATIONS[name](branch) for name, branch in zip(activations, branches, strict=True)]
    return math.prod(activated[1:], start=activated[0])


class Embedding(nnx.Module):
    """Embedding of tokens, and of positions if learned; and the kernel that turns hidden states into logits."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """T5 draws the embedding from N(0, 1), a scaled one (Gemma) comes from N(0, 1/embed_dim).

        Positions have the tokens' deviation, as in BERT.
        """
        vocab_size, dim, axes = config.vocab_size, config.embed_dim, ("vocab", "embed")
        width, narrow = config.embedding_dim or dim, dim**-0.5
        std = narrow if config.scale_embedding else 1.0
        self.embedding = normal_param(rngs, (vocab_size, width), std, axes)
        table = lambda: normal_param(rngs, (config.max_positions, width), std, ("positions", "embed"))  # noqa: E731
        self.positions = table() if config.position == "learned" else None
        self.output = None if config.tie_embeddings else normal_param(rngs, (vocab_size, dim), narrow, axes)
        project = lambda: Linear(width, dim, axes=(None, "embed"), dtype=config.dtype, rngs=rngs)  # noqa: E731
        self.projection = None if width == dim else project()
        self.norm = Norm(config, width) if config.embedding_norm else None
        self.config = config

    def __call__(
        self,
        tokens: jax.Array,
        table: jax.Array,
        positions: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Embeds tokens.

        Args:
          tokens: [B, T] int32.
          table: [vocab_size, embedding_dim] float32, `embedding` or what an assembly has instead.
          positions: [B, T] int32, of tokens in their texts; None for 0, 1, 2, … in every row. Used if they are learned.
          rng: key for dropout; None for none.

        Returns:
          [B, T, embed_dim] in the compute dtype.

        Raises:
          UserError: rows longer than the table of positions.
        """
        # Gathered over fsdp before the look-up, as every other parameter is before its use.
        x = constrain(table.astype(self.config.dtype), "vocab", None)[tokens]
        if self.config.scale_embedding:
            x = x * jnp.asarray(self.config.embed_dim**0.5, x.dtype)
        if self.positions is not None:
            x = x + self._rows_of(jnp.arange(tokens.shape[1])[None] if positions is None else positions)
        if self.norm is not None:
            x = self.norm(x)
        x = dropout(x, self.config.dropout_rate, rng)
        return x if self.projection is None else self.projection(x)

    def _rows_of(self, positions: jax.Array) -> jax.Array:
        """[B, T] -> [B, T, embedding_dim]."""
        length, known = positions.shape[1], self.config.max_positions
        if length > known:
            raise UserError(
                f"ModelConfig.max_positions = {known}: the model knows no position for the last tokens of a row of "
                f"{length}; take shorter rows, or a model with more positions."
            )
        return constrain(self.positions[...].astype(self.config.dtype), None, None)[positions]

    def output_kernel(self, table: jax.Array) -> jax.Array:
        """[vocab_size, embed_dim] float32, of `table` if it is tied."""
        if self.output is not None:
            return self.output[...]
        return table if self.projection is None else table @ self.projection.kernel[...]


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021), halves of the head rotated against each other as in Llama.

    Args:
      x: [B, T, H, D].
      positions: [B, T] int32, restarting with each packed segment.
      base: wavelengths run from 2 pi to 2 pi base.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency  # [B, T, 1, D/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(accumulator(x.dtype)), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
