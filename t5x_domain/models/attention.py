"""Self- and cross-attention: projections around `parallel.attention`."""

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_domain.errors import UserError
from t5x_domain.kernels.attention_kernel import Part
from t5x_domain.kernels.global_blocks import EveryNth, Transient, block_sums, every_nth, take, transient
from t5x_domain.kernels.mask import Mask, SegmentIds
from t5x_domain.kernels.relative_bias import Alibi, Bias, RelativeBias
from t5x_domain.models.config import LOCAL, ModelConfig
from t5x_domain.models.layers import Linear, Norm, normal_param, rotate
from t5x_domain.parallel.attention import Plan, attention, attention_plan
from t5x_domain.parallel.sharding import constrain


def plan(
    config: ModelConfig,
    x: jax.Array,
    memory: jax.Array | None = None,
    *,
    mask: Mask,
    segment_ids: SegmentIds | None,
    prefix: jax.Array | None = None,
) -> Plan:
    """Which keys the layers see that attend from x [B, T, embed_dim] to itself or to a memory [B, S, embed_dim].

    Args:
      mask: of the layers.
      segment_ids: packed segments of x and of what it attends to.
      prefix: [B, T], tokens seen by their whole segment although the mask is causal.
    """
    heads = lambda a, n: jax.ShapeDtypeStruct((*a.shape[:2], n, config.head_dim), jnp.dtype(config.dtype))  # noqa: E731
    table = jax.ShapeDtypeStruct((config.relative_bias_buckets, config.num_heads), jnp.float32)
    biases = {
        "relative_bias": RelativeBias(table, not mask.causal, config.relative_bias_max_distance),
        "alibi": Alibi.of(config.num_heads),
    }
    found = attention_plan(
        heads(x, config.num_heads),
        heads(x if memory is None else memory, config.kv_heads),
        mask=mask,
        relative_bias=biases.get(config.position) if memory is None else None,
        segment_ids=segment_ids,
        prefix=prefix,
        backend=config.attention_backend,
        sequence=config.sequence_attention,
    )
    return found._replace(side=_side(config, x, mask, segment_ids))


def _side(config: ModelConfig, x: jax.Array, mask: Mask, segment_ids: SegmentIds | None) -> EveryNth | Transient | None:
    """The global tokens of blocks, which only local layers of encoders have."""
    if config.global_blocks == "none" or mask.window is None or mask.causal:
        return None
    size, length = config.global_block_size, x.shape[1]
    if length < size:
        raise UserError(
            f"ModelConfig.global_block_size = {size}, but the encoder's sequences have {length} tokens, not one block; "
            "take smaller blocks or longer sequences."
        )
    ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids.query
    if config.global_blocks == "transient":
        return transient(size, ids)
    return every_nth(size, ids, window=config.local_window, leading=config.global_tokens)


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


class AlibiSlopes(nnx.Module):
    """ALiBi in the place of a table."""

    def __init__(self, config: ModelConfig) -> None:
        """Slopes of `config.num_heads` heads."""
        self.num_heads = config.num_heads

    def __call__(self) -> Alibi:
        """What the kernel takes."""
        return Alibi.of(self.num_heads)


def shared_bias(config: ModelConfig, *, bidirectional: bool, rngs: nnx.Rngs) -> RelativeBiasTable | AlibiSlopes | None:
    """The bias that all layers of a stack share, if there is one."""
    if config.position == "alibi":
        return AlibiSlopes(config)
    if config.position == "relative_bias" and not config.relative_bias_per_layer:
        return RelativeBiasTable(config, bidirectional=bidirectional, rngs=rngs)
    return None


class Attention(nnx.Module):
    """Multi-head attention with as many key heads as `config.kv_heads`."""

    def __init__(self, config: ModelConfig, *, kind: str, transient: bool = False, rngs: nnx.Rngs) -> None:
        """`kind` is "global" or "local": it decides the window and the base of the rotation.

        With `transient` there are also tokens for blocks, which have a norm of their own.
        """
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
        self.global_norm = Norm(config) if transient else None
        self.config, self.local = config, kind == LOCAL

    def __call__(
        self,
        x: jax.Array,
        *,
        plan: Plan,
        memory: jax.Array | None = None,
        positions: jax.Array | None = None,
        relative_bias: Bias | None = None,
        global_relative_bias: Bias | None = None,
    ) -> jax.Array:
        """Attends from x to itself, or to `memory` (cross-attention, which knows no positions).

        Args:
          x: [B, T, embed_dim].
          plan: which keys the queries see, of `plan`.
          memory: [B, S, embed_dim], an encoder's output.
          positions: [B, T] int32 for the rotation.
          relative_bias: T5's bias or ALiBi's.
          global_relative_bias: T5's bias to the transient tokens of blocks, by distance in blocks.

        Returns:
          [B, T, embed_dim].
        """
        rotation = None
        if memory is None:
            rotation = jnp.arange(x.shape[1])[None] if positions is None else positions
        q = self.queries(x, rotation)
        k, v = self.keys_values(x if memory is None else memory, rotation)
        blocks = plan.side
        out = attention(
            q,
            k,
            v,
            plan,
            relative_bias=relative_bias,
            side=self._transient(x, blocks, rotation, global_relative_bias) if isinstance(blocks, Transient) else None,
            scale=self.scale,
            softcap=self.config.attention_softcap,
            backend=self.config.attention_backend,
            sequence=self.config.sequence_attention,
        )
        return self.output(out)

    def _transient(self, x: jax.Array, blocks: Transient, positions: jax.Array, bias: Bias | None) -> Part:
        """Keys and values of the blocks' tokens, each rotated to the position of its block's n-th token."""
        sums = self.global_norm(block_sums(x, self.config.global_block_size, blocks))
        keys = self.keys_values(sums, take(jnp.broadcast_to(positions, x.shape[:2]), blocks.index))
        return Part(*keys, bias, blocks.place)

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        return 1.0 if self.config.attention_scale == "none" else self.config.head_dim**-0.5

    @property
    def window(self) -> tuple[int, int] | None:
        """Positions that a query sees before and after itself; None for all."""
        return self.config.window(LOCAL) if self.local else None

    def queries(self, x: jax.Array, positions: jax.Array | None) -> jax.Array:
        """[B, T, embed_dim] -> [B, T, num_heads, head_dim], rotated to `positions` [B, T]; None for cross-attention."""
        q = self._heads(self.query(x), self.config.num_heads)
        if self.query_norm is not None:
            q = self.query_norm(q)
        return self._rotate(q, positions)

    def keys_values(self, x: jax.Array, positions: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """[B, S, embed_dim] -> two of [B, S, kv_heads, head_dim]; `positions` as of `queries`."""
        k = self._heads(self.key(x), self.config.kv_heads)
        if self.key_norm is not None:
            k = self.key_norm(k)
        return self._rotate(k, positions), self._heads(self.value(x), self.config.kv_heads)

    def output(self, x: jax.Array) -> jax.Array:
        """[B, T, num_heads, head_dim] -> [B, T, embed_dim]."""
        return self.out(x.reshape(*x.shape[:2], -1))

    def _rotate(self, x: jax.Array, positions: jax.Array | None) -> jax.Array:
        if self.config.position != "rope" or positions is None:
            return x
        return rotate(x, positions, self.config.rope_base_local if self.local else self.config.rope_base)

    def _heads(self, x: jax.Array, heads: int) -> jax.Array:
        """[B, T, H * D] -> [B, T, H, D]."""
        x = x.reshape(*x.shape[:2], heads, self.config.head_dim)
        return constrain(x, "batch", "length", "heads" if heads == self.config.num_heads else "kv_heads", None)
