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
from t5x_domain.models.assemblies import EncoderDecoder, EncoderOnly, LanguageModel
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.heads import Scores
from t5x_domain.models.layers import ACTIVATIONS, Linear


class Detector(LanguageModel):
    """An assembly with an encoder, and what replaced-token detection adds to it: `generator/…` and `head/…`.

    The token embedding of the assembly itself is, by `config.rtd_embedding_sharing`,
      "none": its own, `embedding/embedding`;
      "tied": the generator's, which learns from every loss (ELECTRA, section 3.2);
      "gdes": the generator's, which learns from the generator's loss alone, plus `embedding_delta`, which starts at 0
        and takes the gradient of all other losses (gradient-disentangled embedding sharing: DeBERTaV3, section 3.3).
    Either way it starts with the values it has without a generator. Each model has its own projection and norm of
    embeddings, and its own positions.
    """

    def _add_detection(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        """Builds generator and head beside the assembly, which is built already.

        Raises:
          UserError: the generator would be larger than the encoder.
        """
        self.config = config
        self.generator = EncoderOnly(generator_config(config), rngs=rngs)
        self.head = DetectionHead(config, rngs=rngs)
        if config.rtd_embedding_sharing != "none":
            shared = self.embedding.embedding
            self.generator.embedding.embedding, self.embedding.embedding = shared, None
        if config.rtd_embedding_sharing == "gdes":
            self.embedding_delta = nnx.Param(jnp.zeros_like(shared[...]), logical_axes=shared.logical_axes)

    @property
    def table(self) -> jax.Array:
        """The assembly's token embedding [vocab_size, embedding_dim] float32."""
        if self.config.rtd_embedding_sharing == "none":
            return self.embedding.embedding[...]
        shared = self.generator.embedding.embedding[...]
        if self.config.rtd_embedding_sharing == "tied":
            return shared
        return jax.lax.stop_gradient(shared) + self.embedding_delta[...]

    def detect(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, S] float32, positive where the encoder takes a token to be replaced; the others are [B, S] int32.

        `rng` is a key for dropout; None for none.
        """
        embed_rng, stack_rng = (None, None) if rng is None else jax.random.split(rng)
        x = self.embed(tokens, positions, embed_rng)
        return self.head(self.encoder(x, segment_ids=segment_ids, positions=positions, rng=stack_rng))


@gin.configurable
class ReplacedTokenDetection(Detector, EncoderOnly):
    """A discriminator, which is the model itself, and its `generator`.

    So `encoder/…` is what remains after pretraining, named as in `EncoderOnly`, and `generator/…` and `head/…` are left
    behind; see `Detector`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Builds both.

        Raises:
          UserError: the generator would be larger than the discriminator.
        """
        unscored = dataclasses.replace(config, tie_embeddings=True)  # it scores no vocabulary
        EncoderOnly.__init__(self, unscored, rngs=rngs)
        self._add_detection(config, rngs)

    @property
    def output_kernel(self) -> jax.Array:
        """Raises UserError: a discriminator predicts no tokens."""
        raise UserError(
            "ReplacedTokenDetection predicts no tokens; set Run.loss = @replaced_token_detection_loss, "
            "or MODEL = @EncoderOnly for masked language modelling."
        )


@gin.configurable
class DetectingEncoderDecoder(Detector, EncoderDecoder):
    """An encoder-decoder whose encoder also learns to find replaced tokens, as METRO-T0's does (Gong et al. 2023).

    `embedding/…`, `encoder/…` and `decoder/…` are named as in `EncoderDecoder` and start with its values; they are what
    remains after pretraining. The loss is `objectives.auxiliary_detection`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Builds all.

        Raises:
          UserError: the generator would be larger than the encoder.
        """
        EncoderDecoder.__init__(self, config, rngs=rngs)
        self._add_detection(config, rngs)


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
