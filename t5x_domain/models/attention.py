"""Self- and cross-attention: projections around `kernels.attention`."""

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_domain.kernels.attention import attention
from t5x_domain.kernels.mask import Mask, SegmentIds
from t5x_domain.kernels.relative_bias import RelativeBias
from t5x_domain.models.config import LOCAL, ModelConfig
from t5x_domain.models.layers import Linear, Norm, normal_param, rotate
from t5x_domain.parallel.sharding import constrain


class RelativeBiasTable(nnx.Module):
    """The learned table of T5's relative-position bias."""

    def __init__(self, config: ModelConfig, *, bidirectional: bool, rngs: nnx.Rngs) -> None:
        """A (buckets, heads) table, one for a stack or one for each of its layers."""
        shape = (config.relative_bias_buckets, config.num_heads)
        self.table = normal_param(rngs, shape, config.embed_dim**-0.5, ("relative_bias_buckets", "heads"))
        self.bidirectional, self.max_distance = bidirectional, config.relative_bias_max_distance

    def __call__(self) -> RelativeBias:
        """What the kernel takes."""
        return RelativeBias(self.table[...], self.bidirectional, self.max_distance)


class Attention(nnx.Module):
    """Multi-head attention with as many key heads as `config.kv_heads`."""

    def __init__(self, config: ModelConfig, *, kind: str, rngs: nnx.Rngs) -> None:
        """`kind` is "global" or "local": it decides the window and the base of the rotation."""
        dim, heads, kv_heads = config.embed_dim, config.num_heads * config.head_dim, config.kv_heads * config.head_dim
        # Without 1/sqrt(head_dim) at run time, the query kernel starts smaller by that factor (T5).
        query_std = dim**-0.5 * (config.head_dim**-0.5 if config.attention_scale == "none" else 1.0)
        sizes = {"dtype": config.dtype, "rngs": rngs}
        self.query = Linear(dim, heads, axes=("embed", "heads"), std=query_std, **sizes)
        self.key = Linear(dim, kv_heads, axes=("embed", "kv_heads"), **sizes)
        self.value = Linear(dim, kv_heads, axes=("embed", "kv_heads"), **sizes)
        self.out = Linear(heads, dim, axes=("heads", "embed"), **sizes)
        self.query_norm = Norm(config, config.head_dim, "rmsnorm") if config.qk_norm else None
        self.key_norm = Norm(config, config.head_dim, "rmsnorm") if config.qk_norm else None
        self.config, self.local = config, kind == LOCAL

    def __call__(
        self,
        x: jax.Array,
        *,
        memory: jax.Array | None = None,
        causal: bool = False,
        segment_ids: SegmentIds | None = None,
        positions: jax.Array | None = None,
        prefix: jax.Array | None = None,
        relative_bias: RelativeBias | None = None,
    ) -> jax.Array:
        """Attends from x to itself, or to `memory` (cross-attention, which knows no positions).

        Args:
          x: [B, T, embed_dim].
          memory: [B, S, embed_dim], an encoder's output.
          causal: see `kernels.mask.Mask`.
          segment_ids: packed segments of x and of what it attends to.
          positions: [B, T] int32 for the rotation.
          prefix: [B, T], tokens seen by their whole segment in spite of `causal`.
          relative_bias: T5's bias.

        Returns:
          [B, T, embed_dim].
        """
        config = self.config
        source = x if memory is None else memory
        q = self._heads(self.query(x), config.num_heads)
        k = self._heads(self.key(source), config.kv_heads)
        v = self._heads(self.value(source), config.kv_heads)
        if config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if config.position == "rope" and memory is None:
            base = config.rope_base_local if self.local else config.rope_base
            positions = jnp.arange(x.shape[1])[None] if positions is None else positions
            q, k = rotate(q, positions, base), rotate(k, positions, base)
        window = (config.local_window, config.local_window) if self.local and memory is None else None
        out = attention(
            q,
            k,
            v,
            mask=Mask(causal=causal, window=window),
            relative_bias=relative_bias,
            segment_ids=segment_ids,
            prefix=prefix,
            scale=1.0 if config.attention_scale == "none" else config.head_dim**-0.5,
            softcap=config.attention_softcap,
        )
        return self.out(out.reshape(*x.shape[:2], -1))

    def _heads(self, x: jax.Array, heads: int) -> jax.Array:
        """[B, T, H * D] -> [B, T, H, D]."""
        x = x.reshape(*x.shape[:2], heads, self.config.head_dim)
        return constrain(x, "batch", "length", "heads" if heads == self.config.num_heads else "kv_heads", None)
