"""Heads for labelled tasks: classes, tags, answer spans and sentence embeddings on a pretrained backbone.

Each is a subclass of its backbone, so the backbone's parameters keep their names (`embedding/…`, `encoder/…`,
`decoder/…`) and restore from any checkpoint that has them: an encoder-only head takes the encoder of an
encoder-decoder. The head's own parameters are under `head/…`. `Blueprint(head("tagging", num_labels=9), config, mesh)`
builds one.
"""

import dataclasses
import functools
from collections.abc import Callable

import gin
import jax
import jax.numpy as jnp
from flax import nnx

from t5x_domain.errors import UserError
from t5x_domain.kernels.precision import accumulator
from t5x_domain.models.assemblies import EncoderDecoder, EncoderOnly
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.layers import normal_param

MASKED = -1e9  # score of a position that cannot be chosen
_START_ID = 0  # what T5's decoder starts with
_INITIAL_STD = 0.02  # of a new classifier (Devlin et al. 2019, BERT)


class Scores(nnx.Module):
    """An affine map to scores, computed in float32."""

    def __init__(self, embed_dim: int, num_scores: int, *, rngs: nnx.Rngs) -> None:
        """A small random kernel and a bias of 0."""
        self.kernel = normal_param(rngs, (embed_dim, num_scores), _INITIAL_STD, ("embed", None))
        self.bias = nnx.Param(jnp.zeros(num_scores, jnp.float32), logical_axes=(None,))

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[..., embed_dim] -> [..., num_scores]."""
        return hidden.astype(accumulator(hidden.dtype)) @ self.kernel[...] + self.bias[...]


class _Headed(EncoderOnly):
    """What heads on an encoder share. `encoder_segment_ids` are 1 for tokens and 0 for padding; a row is one text."""

    inputs = ("encoder_input_tokens", "encoder_segment_ids")

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(_without_output(config), rngs=rngs)

    def _hidden(self, tokens: jax.Array, segment_ids: jax.Array, rng: jax.Array | None) -> jax.Array:
        return super().__call__(tokens, encoder_segment_ids=segment_ids, rng=rng)


class _Scored(_Headed):
    """An encoder under scores."""

    def __init__(self, config: ModelConfig, *, num_labels: int, rngs: nnx.Rngs) -> None:
        """Builds the encoder and the scores."""
        super().__init__(config, rngs=rngs)
        self.head = Scores(config.embed_dim, num_labels, rngs=rngs)


class EncoderClassifier(_Scored):
    """Classes of a text from the mean of the encoder's states."""

    def __call__(
        self, encoder_input_tokens: jax.Array, encoder_segment_ids: jax.Array, *, rng: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B, num_labels] float32; tokens and segment ids are [B, S] int32."""
        return self.head(mean_pool(self._hidden(encoder_input_tokens, encoder_segment_ids, rng), encoder_segment_ids))


class EncoderDecoderClassifier(EncoderDecoder):
    """Classes of a text from the decoder's state at its start token (EncT5: Liu et al. 2021, arXiv:2110.08426).

    EncT5 keeps one decoder layer: `num_decoder_layers = 1` takes the checkpoint's first.
    """

    inputs = ("encoder_input_tokens", "encoder_segment_ids")

    def __init__(self, config: ModelConfig, *, num_labels: int, rngs: nnx.Rngs) -> None:
        """Builds both stacks and the classifier."""
        super().__init__(_without_output(config), rngs=rngs)
        self.head = Scores(config.embed_dim, num_labels, rngs=rngs)

    def __call__(
        self, encoder_input_tokens: jax.Array, encoder_segment_ids: jax.Array, *, rng: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B, num_labels] float32; tokens and segment ids are [B, S] int32."""
        start = jnp.full_like(encoder_input_tokens[:, :1], _START_ID)
        hidden = super().__call__(
            encoder_input_tokens,
            start,
            encoder_segment_ids=encoder_segment_ids,
            decoder_segment_ids=jnp.ones_like(start),
            rng=rng,
        )
        return self.head(hidden[:, 0])


class EncoderTagger(_Scored):
    """A tag for every token."""

    def __call__(
        self, encoder_input_tokens: jax.Array, encoder_segment_ids: jax.Array, *, rng: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B, S, num_labels] float32; tokens and segment ids are [B, S] int32."""
        return self.head(self._hidden(encoder_input_tokens, encoder_segment_ids, rng))


class EncoderSpans(_Scored):
    """First and last token of an answer (Devlin et al. 2019, sections 4.2 and 4.3); position 0 is "no answer"."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Builds the encoder and the two scores."""
        super().__init__(config, num_labels=2, rngs=rngs)

    def __call__(
        self, encoder_input_tokens: jax.Array, encoder_segment_ids: jax.Array, *, rng: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B, S, 2] float32 of start and end, `MASKED` at padding; the inputs are [B, S] int32."""
        scores = self.head(self._hidden(encoder_input_tokens, encoder_segment_ids, rng))
        return jnp.where(encoder_segment_ids[..., None] > 0, scores, MASKED)


class EncoderEmbedder(_Headed):
    """A unit vector for a text: mean of the encoder's states, projected (Sentence-T5: Ni et al. 2022, section 3).

    The projection starts as the identity, so that an untrained embedder gives the plain mean.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Builds the encoder and the projection."""
        super().__init__(config, rngs=rngs)
        self.head = Projection(config.embed_dim)

    def __call__(
        self, encoder_input_tokens: jax.Array, encoder_segment_ids: jax.Array, *, rng: jax.Array | None = None
    ) -> jax.Array:
        """[B, embed_dim] float32 of length 1 (0 for a row of padding); the inputs are [B, S] int32."""
        x = self.head(mean_pool(self._hidden(encoder_input_tokens, encoder_segment_ids, rng), encoder_segment_ids))
        return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-12))


class Projection(nnx.Module):
    """A square linear map that starts as the identity, computed in float32."""

    def __init__(self, embed_dim: int) -> None:
        """The kernel is [embed_dim, embed_dim]."""
        self.kernel = nnx.Param(jnp.eye(embed_dim, dtype=jnp.float32), logical_axes=("embed", None))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., embed_dim] -> the same."""
        return x @ self.kernel[...]


def mean_pool(hidden: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Mean over the tokens of each row, [B, S, D] -> [B, D] float32; 0 for a row of padding. Ids are [B, S]."""
    mask = (segment_ids > 0)[..., None].astype(accumulator(hidden.dtype))
    return (hidden * mask).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1.0)


@gin.configurable
def head(kind: str, *, num_labels: int | None = None, pooling: str = "mean") -> Callable[..., nnx.Module]:
    """The model class of a task of this kind: called with (config, rngs=…), as `Blueprint` does.

    Args:
      kind: as in `data.labelled.LabelledTask`: "classification", "tagging", "spans" or "pairs" (embeddings).
      num_labels: classes or tags.
      pooling: of classification: "mean" over the encoder's states, or "decoder" for its state at the start token.

    Raises:
      UserError: no such kind or pooling, or a number of labels is missing.
    """
    models = {
        ("classification", "mean"): EncoderClassifier,
        ("classification", "decoder"): EncoderDecoderClassifier,
        ("tagging", "mean"): EncoderTagger,
        ("spans", "mean"): EncoderSpans,
        ("pairs", "mean"): EncoderEmbedder,
    }
    if (kind, pooling) not in models:
        choices = ", ".join(f"{kind!r} with pooling {pooling!r}" for kind, pooling in models)
        raise UserError(f"head.kind = {kind!r} with pooling = {pooling!r}: there is no such head; choose {choices}.")
    model = models[kind, pooling]
    if kind not in ("classification", "tagging"):
        return model
    if num_labels is None or num_labels < 1:
        raise UserError(f"head.num_labels = {num_labels}: {kind} needs the number of its labels.")
    return functools.partial(model, num_labels=num_labels)


def _without_output(config: ModelConfig) -> ModelConfig:
    """A head scores no vocabulary, so it holds no output embedding."""
    return dataclasses.replace(config, tie_embeddings=True)
