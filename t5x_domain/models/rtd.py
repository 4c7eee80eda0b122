"""Replaced-token detection: an encoder finds the tokens that a masked language model has put into its text.

Clark et al. 2020 (ELECTRA) train a narrow generator, He et al. 2021 (DeBERTaV3) and Meng et al. 2021 (COCO-LM) one that
is as wide as the discriminator and shallower. The loss is `objectives.rtd`.
"""

import dataclasses

import gin
import jax
import jax.numpy as jnp
from flax import nnx

from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import EncoderOnly
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.heads import Scores
from t5x_domain.models.layers import ACTIVATIONS, Linear
from t5x_domain.parallel.sharding import constrain


@gin.configurable
class ReplacedTokenDetection(EncoderOnly):
    """A discriminator, which is the model itself, and its `generator`.

    So `encoder/…` is what remains after pretraining, named as in `EncoderOnly`, and `generator/…` and `head/…` are left
    behind. The discriminator's token embedding is, by `config.rtd_embedding_sharing`,
      "none": its own, `embedding/embedding`;
      "tied": the generator's, which learns from both losses (ELECTRA, section 3.2);
      "gdes": the generator's, through which no gradient of detection flows, plus `embedding_delta`, which starts at 0
        (gradient-disentangled embedding sharing: DeBERTaV3, section 3.3).
    Each model has its own projection and norm of embeddings, and its own positions.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Builds both.

        Raises:
          UserError: the generator would be larger than the discriminator.
        """
        super().__init__(dataclasses.replace(config, tie_embeddings=True), rngs=rngs)  # it scores no vocabulary
        self.config = config
        self.generator = EncoderOnly(generator_config(config), rngs=rngs)
        self.head = DetectionHead(config, rngs=rngs)
        table = self.embedding.embedding
        if config.rtd_embedding_sharing != "none":
            self.embedding.embedding = None
        if config.rtd_embedding_sharing == "gdes":
            self.embedding_delta = nnx.Param(jnp.zeros_like(table[...]), logical_axes=table.logical_axes)

    @property
    def table(self) -> jax.Array:
        """The discriminator's token embedding [vocab_size, embedding_dim] float32."""
        if self.config.rtd_embedding_sharing == "none":
            return self.embedding.embedding[...]
        shared = self.generator.embedding.embedding[...]
        if self.config.rtd_embedding_sharing == "tied":
            return shared
        return jax.lax.stop_gradient(shared) + self.embedding_delta[...]

    @property
    def output_kernel(self) -> jax.Array:
        """Raises UserError: a discriminator predicts no tokens."""
        raise UserError(
            "ReplacedTokenDetection predicts no tokens; set Run.loss = @replaced_token_detection_loss, "
            "or MODEL = @EncoderOnly for masked language modelling."
        )

    def embed(self, tokens: jax.Array, positions: jax.Array | None = None, rng: jax.Array | None = None) -> jax.Array:
        """[B, S] int32 -> [B, S, embed_dim]; positions [B, S] and `rng` as of `Embedding`."""
        x = self.embedding.look_up(self.table, tokens, positions, rng)
        return constrain(x, "batch", "length", "embed_activation")


class DetectionHead(nnx.Module):
    """Whether a token was replaced: dense, GELU, one score. As ELECTRA's, but the first has no bias, as in T5."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """A square kernel, and the score's kernel and bias."""
        dim = config.embed_dim
        self.dense = Linear(dim, dim, axes=("embed", "mlp"), dtype=config.dtype, rngs=rngs)
        self.score = Scores(dim, 1, rngs=rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[B, S, embed_dim] -> logits [B, S] float32, positive where a token is taken to be replaced."""
        return self.score(ACTIVATIONS["gelu"](self.dense(hidden)))[..., 0]


def generator_config(config: ModelConfig) -> ModelConfig:
    """The generator's shape: narrower, shallower or both; its head_dim and embedding_dim are the discriminator's.

    Raises:
      UserError: it would be larger than the discriminator.
    """
    share, layers = config.rtd_generator_width, config.rtd_generator_layers or config.num_encoder_layers
    for key, value, most in (
        ("rtd_generator_width", share, 1),
        ("rtd_generator_layers", layers, config.num_encoder_layers),
    ):
        if not 0 < value <= most:
            raise UserError(
                f"ModelConfig.{key} = {value}: the generator must not be larger than the discriminator; "
                f"give more than 0 and at most {most}."
            )
    scaled = lambda size: max(1, round(size * share))  # noqa: E731
    return dataclasses.replace(
        config,
        embed_dim=scaled(config.embed_dim),
        embedding_dim=config.embedding_dim or config.embed_dim,
        mlp_dim=scaled(config.mlp_dim),
        num_heads=scaled(config.num_heads),
        num_kv_heads=config.num_kv_heads and scaled(config.num_kv_heads),
        num_encoder_layers=layers,
    )
