"""The three models made from one stack: encoder-decoder, decoder-only, encoder-only.

Each maps features of a batch to the hidden states of the positions that are to be predicted; `logits` or the chunked
loss turns these into scores. Feature names are SeqIO's.
"""

import gin
import jax
import jax.numpy as jnp
from flax import nnx

from t5x_domain.errors import UserError
from t5x_domain.kernels.precision import accumulator
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.layers import Embedding
from t5x_domain.models.stack import Stack
from t5x_domain.parallel.sharding import constrain


class LanguageModel(nnx.Module):
    """What the assemblies share: the embedding and its use as output."""

    inputs: tuple[str, ...]  # features of a batch that __call__ takes
    target_side: str  # "encoder" or "decoder": which features hold what the hidden states are to predict

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Builds the embedding."""
        self.embedding = Embedding(config, rngs=rngs)
        self.config = config

    @property
    def logit_scale(self) -> float:
        """Factor of the logits: 1/sqrt(embed_dim) in T5 1.0, else 1."""
        return self.config.embed_dim**-0.5 if self.config.scale_logits else 1.0

    @property
    def table(self) -> jax.Array:
        """The token embedding [vocab_size, embedding_dim] float32."""
        return self.embedding.embedding[...]

    @property
    def output_kernel(self) -> jax.Array:
        """[vocab_size, embed_dim] float32: hidden states times its transpose, scaled and capped, are the logits."""
        return self.embedding.output_kernel(self.table)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, T, embed_dim] -> [B, T, vocab_size] float32. For losses use `kernels.cross_entropy`, which holds none."""
        kernel = self.output_kernel.astype(hidden.dtype)
        logits = self.logit_scale * jnp.einsum(
            "btd,vd->btv", hidden, kernel, preferred_element_type=accumulator(hidden.dtype)
        )
        cap = self.config.final_logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def embed(self, tokens: jax.Array, positions: jax.Array | None = None, rng: jax.Array | None = None) -> jax.Array:
        """[B, T] int32 -> [B, T, embed_dim]; positions [B, T] and `rng` as of `Embedding`."""
        return constrain(self.embedding(tokens, self.table, positions, rng), "batch", "length", "embed_activation")


@gin.configurable
class EncoderDecoder(LanguageModel):
    """A bidirectional encoder and a causal decoder that attends to it (T5)."""

    inputs = (
        "encoder_input_tokens",
        "encoder_segment_ids",
        "encoder_positions",
        "decoder_input_tokens",
        "decoder_segment_ids",
        "decoder_positions",
    )
    target_side = "decoder"

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Builds both stacks."""
        _require_layers(config, "num_encoder_layers", "num_decoder_layers")
        super().__init__(config, rngs=rngs)
        self.encoder = Stack(config, config.num_encoder_layers, causal=False, rngs=rngs)
        self.decoder = Stack(config, config.num_decoder_layers, causal=True, cross_attention=True, rngs=rngs)

    def __call__(
        self,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        *,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        encoder_positions: jax.Array | None = None,
        decoder_positions: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, T, embed_dim] of the decoder; tokens, segment ids and positions are [B, S] or [B, T] int32.

        Without segment ids a row is one example without padding; give ids, 1 for tokens and 0 for padding, otherwise.
        """
        rngs = (None,) * 4 if rng is None else jax.random.split(rng, 4)
        memory = self.encoder(
            self.embed(encoder_input_tokens, encoder_positions, rngs[0]),
            segment_ids=encoder_segment_ids,
            positions=encoder_positions,
            rng=rngs[1],
        )
        return self.decoder(
            self.embed(decoder_input_tokens, decoder_positions, rngs[2]),
            segment_ids=decoder_segment_ids,
            positions=decoder_positions,
            memory=memory,
            memory_segment_ids=encoder_segment_ids,
            rng=rngs[3],
        )


@gin.configurable
class DecoderOnly(LanguageModel):
    """One causal stack; tokens marked as prefix are seen by their whole segment (prefix LM)."""

    inputs = ("decoder_input_tokens", "decoder_segment_ids", "decoder_positions", "decoder_prefix")
    target_side = "decoder"

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Builds the stack of `config.num_decoder_layers` blocks."""
        _require_layers(config, "num_decoder_layers")
        if (key := config.global_option) is not None:
            raise UserError(
                f"ModelConfig.{key} = {getattr(config, key)!r} is for encoders, but DecoderOnly has none; leave it out."
            )
        super().__init__(config, rngs=rngs)
        self.decoder = Stack(config, config.num_decoder_layers, causal=True, rngs=rngs)

    def __call__(
        self,
        decoder_input_tokens: jax.Array,
        *,
        decoder_segment_ids: jax.Array | None = None,
        decoder_positions: jax.Array | None = None,
        decoder_prefix: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, T, embed_dim]; all other arguments are [B, T] int32."""
        rngs = (None, None) if rng is None else jax.random.split(rng)
        return self.decoder(
            self.embed(decoder_input_tokens, decoder_positions, rngs[0]),
            segment_ids=decoder_segment_ids,
            positions=decoder_positions,
            prefix=decoder_prefix,
            rng=rngs[1],
        )


@gin.configurable
class EncoderOnly(LanguageModel):
    """One bidirectional stack (BERT, ModernBERT)."""

    inputs = ("encoder_input_tokens", "encoder_segment_ids", "encoder_positions")
    target_side = "encoder"

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Builds the stack of `config.num_encoder_layers` blocks."""
        _require_layers(config, "num_encoder_layers")
        super().__init__(config, rngs=rngs)
        self.encoder = Stack(config, config.num_encoder_layers, causal=False, rngs=rngs)

    def __call__(
        self,
        encoder_input_tokens: jax.Array,
        *,
        encoder_segment_ids: jax.Array | None = None,
        encoder_positions: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, S, embed_dim]; all other arguments are [B, S] int32."""
        rngs = (None, None) if rng is None else jax.random.split(rng)
        return self.encoder(
            self.embed(encoder_input_tokens, encoder_positions, rngs[0]),
            segment_ids=encoder_segment_ids,
            positions=encoder_positions,
            rng=rngs[1],
        )


def _require_layers(config: ModelConfig, *keys: str) -> None:
    for key in keys:
        if getattr(config, key) < 1:
            raise UserError(f"ModelConfig.{key} = {getattr(config, key)}: this model needs at least one.")
