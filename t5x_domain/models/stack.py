"""A stack of transformer blocks: one repeating pattern, compiled once and scanned."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from t5x_domain.kernels.mask import Mask, SegmentIds
from t5x_domain.models.attention import Attention, RelativeBiasTable, plan, shared_bias
from t5x_domain.models.config import LOCAL, ModelConfig
from t5x_domain.models.layers import Mlp, Norm, dropout
from t5x_domain.parallel.attention import Plan
from t5x_domain.parallel.sharding import constrain

_REMAT_POLICIES = {
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class SubLayer(nnx.Module):
    """Residual connection around `inner`, with norms where `config.norm_placement` puts them.

    "pre": x + inner(norm(x)); "pre_post": x + post_norm(inner(norm(x))); "post": norm(x + inner(x)).
    """

    def __init__(self, config: ModelConfig, inner: nnx.Module) -> None:
        """`inner` maps [B, T, embed_dim] to the same."""
        self.norm = Norm(config)
        self.inner = inner
        self.post_norm = Norm(config) if config.norm_placement == "pre_post" else None
        self.norm_last, self.dropout_rate = config.norm_placement == "post", config.dropout_rate

    def __call__(self, x: jax.Array, rng: jax.Array | None, /, **inputs: Any) -> jax.Array:
        """[B, T, embed_dim] -> the same; `inner` is called with `inputs`."""
        return self.add(x, self.inner(self.enter(x), **inputs), rng)

    def enter(self, x: jax.Array) -> jax.Array:
        """What `inner` takes of x."""
        return x if self.norm_last else self.norm(x)

    def add(self, x: jax.Array, y: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """x and dropout(y), where y is what `inner` made of `enter(x)`."""
        if self.post_norm is not None:
            y = self.post_norm(y)
        x = constrain(x + dropout(y, self.dropout_rate, rng), "batch", "length", "embed_activation")
        return self.norm(x) if self.norm_last else x


class Block(nnx.Module):
    """Self-attention, cross-attention if there is a memory, feed-forward."""

    def __init__(self, config: ModelConfig, *, kind: str, causal: bool, cross_attention: bool, rngs: nnx.Rngs) -> None:
        """`kind` is "global" or "local"."""
        own_bias = config.position == "relative_bias" and config.relative_bias_per_layer
        self.relative_bias = RelativeBiasTable(config, bidirectional=not causal, rngs=rngs) if own_bias else None
        transient = config.global_blocks == "transient" and kind == LOCAL and not causal
        self.global_relative_bias = (
            RelativeBiasTable(config, bidirectional=True, rngs=rngs) if own_bias and transient else None
        )
        self.self_attention = SubLayer(config, Attention(config, kind=kind, transient=transient, rngs=rngs))
        self.cross_attention = (
            SubLayer(config, Attention(config, kind="global", rngs=rngs)) if cross_attention else None
        )
        self.mlp = SubLayer(config, Mlp(config, rngs=rngs))
        self.kind = kind

    def __call__(
        self, x: jax.Array, rng: jax.Array | None, shared: Mapping[str, Any], cross: Mapping[str, Any] | None
    ) -> jax.Array:
        """[B, T, embed_dim] -> the same; `shared` and `cross` are what self- and cross-attention are called with."""
        rngs = (None,) * 4 if rng is None else jax.random.split(rng, 4)
        own = {"relative_bias": self.relative_bias, "global_relative_bias": self.global_relative_bias}
        biases = {name: shared[name] if table is None else table() for name, table in own.items()}
        plan, positions = shared["plans"][self.kind], shared["positions"]
        x = self.self_attention(x, rngs[0], plan=plan, positions=positions, **biases)
        if self.cross_attention is not None:
            x = self.cross_attention(x, rngs[1], **cross)
        return self.mlp(x, rngs[2], rng=rngs[3])


class Pattern(nnx.Module):
    """One turn of a stack's pattern of layers, or its beginning."""

    def __init__(
        self, config: ModelConfig, kinds: tuple[str, ...], *, scanned: bool, rngs: nnx.Rngs, **options: bool
    ) -> None:
        """One block for each kind; `scanned` if the pattern is the body of a scan."""
        self.blocks = nnx.List([Block(config, kind=kind, rngs=rngs, **options) for kind in kinds])
        self.remat, self.scanned = config.remat, scanned

    def __call__(
        self, x: jax.Array, rng: jax.Array | None, shared: Mapping[str, Any], cross: Mapping[str, Any] | None
    ) -> jax.Array:
        """Runs the blocks one after the other."""
        for i, block in enumerate(self.blocks):
            x = self._remat(block)(x, None if rng is None else jax.random.fold_in(rng, i), shared, cross)
        return x

    def _remat(self, block: Block) -> Any:
        """`block`, whose backward pass recomputes what `config.remat` says."""
        if self.remat == "none":
            return block
        graph, params = nnx.split(block)
        call = lambda params, *inputs: nnx.merge(graph, params)(*inputs)  # noqa: E731
        # Inside a scan XLA cannot undo the recomputation, so the costly barrier against that is not needed.
        checkpointed = jax.checkpoint(call, policy=_REMAT_POLICIES[self.remat], prevent_cse=not self.scanned)
        return functools.partial(checkpointed, params)


class Stack(nnx.Module):
    """All blocks of an encoder or a decoder, and the norm after the last, which post-norm blocks need not."""

    def __init__(
        self, config: ModelConfig, num_layers: int, *, causal: bool, cross_attention: bool = False, rngs: nnx.Rngs
    ) -> None:
        """`num_layers` blocks: whole patterns are scanned, what is left over follows."""
        kinds, options = config.pattern(causal=causal), {"causal": causal, "cross_attention": cross_attention}
        repeats, rest = divmod(num_layers, len(kinds))
        if not config.scan_layers:
            kinds, repeats, rest = kinds * repeats + kinds[:rest], 0, num_layers
        self.relative_bias = shared_bias(config, bidirectional=not causal, rngs=rngs)
        transient = config.global_blocks == "transient" and not causal
        self.global_relative_bias = shared_bias(config, bidirectional=True, rngs=rngs) if transient else None
        self.layers = _stacked(lambda rngs: Pattern(config, kinds, scanned=True, rngs=rngs, **options), repeats, rngs)
        self.rest = Pattern(config, kinds[:rest], scanned=False, rngs=rngs, **options) if rest else None
        self.norm = None if config.norm_placement == "post" else Norm(config)
        self.config, self.causal = config, causal

    def plans(self, x: jax.Array, segment_ids: jax.Array | None, prefix: jax.Array | None = None) -> Mapping[str, Plan]:
        """Which keys self-attention sees, by kind of layer: found once for all layers."""
        ids = None if segment_ids is None else SegmentIds(segment_ids, segment_ids)

        def plan_of(kind: str) -> Plan:
            mask = Mask(self.causal, self.config.window(kind), 0 if self.causal else self.config.global_tokens)
            return plan(self.config, x, mask=mask, segment_ids=ids, prefix=prefix)

        return {kind: plan_of(kind) for kind in sorted(set(self.config.pattern(causal=self.causal)))}

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        prefix: jax.Array | None = None,
        memory: jax.Array | None = None,
        memory_segment_ids: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Runs the stack.

        Args:
          x: [B, T, embed_dim], embedded tokens, after dropout.
          segment_ids: [B, T] int32, packed examples; 0 is padding.
          positions: [B, T] int32, restarting with each segment.
          prefix: [B, T], tokens seen by their whole segment although the stack is causal.
          memory: [B, S, embed_dim], an encoder's output to attend to.
          memory_segment_ids: [B, S] int32.
          rng: key for dropout; None for none.

        Returns:
          [B, T, embed_dim], normalised.
        """
        shared = {
            "plans": self.plans(x, segment_ids, prefix),
            "positions": positions,
            "relative_bias": None if self.relative_bias is None else self.relative_bias(),
            "global_relative_bias": None if self.global_relative_bias is None else self.global_relative_bias(),
        }
        cross = None
        if memory is not None:
            ids = None if segment_ids is None else SegmentIds(segment_ids, memory_segment_ids)
            cross = {"memory": memory, "plan": plan(self.config, x, memory, mask=Mask(), segment_ids=ids)}
        if rng is None:
            scan_rng = rest_rng = norm_rng = None
        else:
            scan_rng, rest_rng, norm_rng = jax.random.split(rng, 3)

        if self.layers is not None:
            x = self._scan(x, scan_rng, shared, cross)
        if self.rest is not None:
            x = self.rest(x, rest_rng, shared, cross)
        return self.close(x, norm_rng)

    def close(self, x: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """What follows the last block, for some of its positions [B, T, embed_dim] or all."""
        return x if self.norm is None else dropout(self.norm(x), self.config.dropout_rate, rng)

    def _scan(self, x: jax.Array, rng: jax.Array | None, shared: Mapping[str, Any], cross: Any) -> jax.Array:
        graph, params = nnx.split(self.layers)
        repeats = jax.tree.leaves(params)[0].shape[0]
        rngs = None if rng is None else jax.random.split(rng, repeats)

        def body(x: jax.Array, layer: tuple[Any, Any]) -> tuple[jax.Array, None]:
            params, rng = layer
            return nnx.merge(graph, params)(x, rng, shared, cross), None

        return jax.lax.scan(body, x, (params, rngs))[0]


def _stacked(make: Any, repeats: int, rngs: nnx.Rngs) -> nnx.Module | None:
    """`repeats` modules as one, whose parameters have a leading axis named "layers"."""
    if repeats == 0:
        return None
    stacked = nnx.split_rngs(splits=repeats)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)
    for _, param in nnx.to_flat_state(nnx.state(stacked)):
        param.set_metadata("logical_axes", ("layers", *param.logical_axes))
    return stacked
