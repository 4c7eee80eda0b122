"""Every knob of the transformer. T5, UL2, Llama-, Gemma- and ModernBERT-shaped models are settings of these."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import gin

from t5x_domain.errors import UserError

GLOBAL, LOCAL = "global", "local"


@gin.configurable
@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and options of a transformer; the defaults are those of T5.1.1 (gated GELU, untied output embedding).

    Attributes:
      vocab_size: rows of the embedding; at least the vocabulary's, often a multiple of 128.
      embed_dim: width of the residual stream.
      embedding_dim: width of the token embedding, which is projected to `embed_dim` (Lan et al. 2020, section 3.1); a
        tied output uses the product of both matrices. None for `embed_dim`, without projection. Learned positions, the
        norm and dropout of the embedding come before the projection (ELECTRA).
      mlp_dim: width of the feed-forward layer.
      num_heads: query heads.
      head_dim: width of a head.
      num_kv_heads: key and value heads; None for as many as query heads (Ainslie et al. 2023 for fewer).
      num_encoder_layers: 0 in a decoder-only model.
      num_decoder_layers: 0 in an encoder-only model.
      mlp_activations: one activation, or several whose branches are multiplied (Shazeer 2020): ("gelu", "linear") is
        GEGLU, ("silu", "linear") SwiGLU, ("relu",) the plain layer of T5 1.0. "gelu" is the tanh form of T5 and
        Gemma, "gelu_exact" (with erf) that of BERT and ModernBERT.
      norm: "rmsnorm" or "layernorm" (without bias).
      norm_epsilon: added to the variance.
      norm_unit_offset: scale by 1 + weight, weight starting at 0 (Gemma).
      norm_placement: "pre"; "pre_post" for a norm before and after each sub-layer (Gemma 2); "post" for one after each
        residual sum and none after the stack (Devlin et al. 2019, BERT).
      embedding_norm: a norm right after the embedding (BERT, ModernBERT).
      position: "relative_bias" (T5), "rope" (Su et al. 2021), "alibi" (Press et al. 2022), "learned" for a table whose
        rows are added to the token embedding (BERT), or "none".
      max_positions: rows of that table: the longest row or text of a model with learned positions.
      relative_bias_buckets, relative_bias_max_distance: of T5's bias.
      relative_bias_per_layer: a table for each layer (umT5) instead of one shared by the stack.
      rope_base: base of the rotation in global layers.
      rope_base_local: base in local layers.
      layer_pattern: kinds of consecutive layers, "global" or "local", repeated through the stack. Layers left over
        when the depth is no multiple of the pattern follow its beginning.
      decoder_layer_pattern: of decoders, where it differs: a long encoder's windows are seldom wanted in a decoder.
      local_window: a local layer's query sees keys at most this many positions away.
      global_tokens: the first tokens of each example, so many, that see all and are seen by all in the local layers of
        encoders (Beltagy et al. 2020, "Longformer"). Decoders have none, whatever this and the next two say.
      global_blocks: what else is seen from everywhere in the local layers of encoders, by each `global_block_size`
        tokens of an example: "every", the last of them, which also sees everything; "transient", a token that is
        their normed sum (Guo et al. 2022, "LongT5"), with a relative bias of its own by distance in blocks, or rotated
        to the position of the last of them; "none". Tokens left over belong to the last block.
      global_block_size: tokens of such a block.
      attention_scale: "none" as T5, whose initialiser makes up for it, or "head_dim" for 1/sqrt(head_dim).
      qk_norm: RMSNorm of queries and keys, per head (Dehghani et al. 2023).
      attention_softcap, final_logit_softcap: soft caps of Gemma 2; None for none.
      tie_embeddings: use the input embedding for the output as well.
      scale_embedding: multiply embeddings by sqrt(embed_dim) (Gemma).
      scale_logits: divide logits by sqrt(embed_dim) (T5 1.0, with tied embeddings).
      dropout_rate: on embeddings, sub-layer outputs and inside the feed-forward layer.
      dtype: of activations and matrix products; parameters, softmax, norms and the loss are float32 (float64 with
        "float64", which is for tests of exactness).
      scan_layers: compile one pattern of layers and loop over it, so that depth costs no compile time.
      remat: what the backward pass recomputes: "none", "minimal" (all but matrix products without a batch dimension),
        "full" (all).
      rtd_generator_width: of replaced-token detection: the generator's share of embed_dim, mlp_dim and heads.
      rtd_generator_layers: the generator's layers; None for num_encoder_layers.
      rtd_embedding_sharing: what the discriminator's token embedding shares with the generator's, see `models.rtd`.
      attention_backend: see `kernels.attention.backend_for`.
      sequence_attention: how keys on other devices are reached, "gather" or "ring", see `parallel.attention`.
    """

    # Fields that change how a model is computed, not what it is; a run may go on elsewhere with others of PLACE.
    PLACE: ClassVar = ("remat", "attention_backend", "sequence_attention")
    HOW: ClassVar = ("dtype", "scan_layers", *PLACE)

    vocab_size: int
    embed_dim: int = 512
    embedding_dim: int | None = None
    mlp_dim: int = 1024
    num_heads: int = 6
    head_dim: int = 64
    num_kv_heads: int | None = None
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    mlp_activations: Sequence[str] = ("gelu", "linear")
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_epsilon: float = 1e-6
    norm_unit_offset: bool = False
    norm_placement: Literal["pre", "pre_post", "post"] = "pre"
    embedding_norm: bool = False
    position: Literal["relative_bias", "rope", "alibi", "learned", "none"] = "relative_bias"
    max_positions: int = 512
    relative_bias_buckets: int = 32
    relative_bias_max_distance: int = 128
    relative_bias_per_layer: bool = False
    rope_base: float = 10_000.0
    rope_base_local: float = 10_000.0
    layer_pattern: Sequence[str] = (GLOBAL,)
    decoder_layer_pattern: Sequence[str] | None = None
    local_window: int = 128
    global_tokens: int = 0
    global_blocks: Literal["none", "every", "transient"] = "none"
    global_block_size: int = 16
    attention_scale: Literal["none", "head_dim"] = "none"
    qk_norm: bool = False
    attention_softcap: float | None = None
    final_logit_softcap: float | None = None
    tie_embeddings: bool = False
    scale_embedding: bool = False
    scale_logits: bool = False
    dropout_rate: float = 0.0
    rtd_generator_width: float = 1.0
    rtd_generator_layers: int | None = None
    rtd_embedding_sharing: Literal["none", "tied", "gdes"] = "gdes"
    dtype: str = "bfloat16"
    scan_layers: bool = True
    remat: Literal["none", "minimal", "full"] = "none"
    attention_backend: Literal["auto", "xla", "tpu", "tpu_interpreted"] = "auto"
    sequence_attention: Literal["gather", "ring"] = "gather"

    def __post_init__(self) -> None:
        """Raises UserError for a value that no model can have."""
        for field in dataclasses.fields(self):
            _require_number(field, getattr(self, field.name))
        choices = {
            "norm": ("rmsnorm", "layernorm"),
            "norm_placement": ("pre", "pre_post", "post"),
            "position": ("relative_bias", "rope", "alibi", "learned", "none"),
            "global_blocks": ("none", "every", "transient"),
            "attention_scale": ("none", "head_dim"),
            "remat": ("none", "minimal", "full"),
            "rtd_embedding_sharing": ("none", "tied", "gdes"),
            "dtype": ("float32", "bfloat16", "float64"),
            "attention_backend": ("auto", "xla", "tpu", "tpu_interpreted"),
            "sequence_attention": ("gather", "ring"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise UserError(f"ModelConfig.{key} = {getattr(self, key)!r}: choose one of {', '.join(allowed)}.")
        lists = {
            "mlp_activations": ("gelu", "gelu_exact", "relu", "silu", "linear"),
            "layer_pattern": (GLOBAL, LOCAL),
            "decoder_layer_pattern": (GLOBAL, LOCAL),
        }
        if self.decoder_layer_pattern is None:
            del lists["decoder_layer_pattern"]
        for key, allowed in lists.items():
            if not getattr(self, key) or not set(getattr(self, key)) <= set(allowed):
                raise UserError(f"ModelConfig.{key} = {getattr(self, key)!r}: a list of {', '.join(allowed)}.")
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"ModelConfig.num_heads = {self.num_heads} is no multiple of num_kv_heads = {self.kv_heads}; "
                "each key head serves the same number of query heads."
            )
        if self.position == "rope" and self.head_dim % 2:
            raise UserError(f"ModelConfig.head_dim = {self.head_dim} must be even for position = 'rope'.")
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"ModelConfig.dropout_rate = {self.dropout_rate} must be in [0, 1).")
        self._check_global_tokens()

    def _check_global_tokens(self) -> None:
        if (key := self.global_option) is not None and LOCAL not in self.layer_pattern:
            raise UserError(
                f"ModelConfig.{key} = {getattr(self, key)!r} is for local layers, but layer_pattern = "
                f"{tuple(self.layer_pattern)} has none; add 'local' to it."
            )
        if self.global_blocks != "none" and self.sequence_attention == "ring":
            raise UserError(
                f"ModelConfig.global_blocks = {self.global_blocks!r} does not go with sequence_attention = 'ring'; "
                "take 'gather'."
            )
        if self.global_blocks == "transient" and self.position == "alibi":
            raise UserError(
                "ModelConfig.global_blocks = 'transient' does not go with position = 'alibi', which knows no distance "
                "to a block; take 'every', or another position."
            )

    @property
    def global_option(self) -> str | None:
        """The first key that asks for global tokens in local layers, if there is one."""
        asked = {"global_tokens": self.global_tokens > 0, "global_blocks": self.global_blocks != "none"}
        return next((key for key, value in asked.items() if value), None)

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def longest(self) -> int | None:
        """Tokens that a row may have; None for any number."""
        return self.max_positions if self.position == "learned" else None

    def pattern(self, *, causal: bool) -> tuple[str, ...]:
        """Kinds of consecutive layers of a decoder's stack, which is causal, or of an encoder's."""
        return tuple((causal and self.decoder_layer_pattern) or self.layer_pattern)

    def window(self, kind: str) -> tuple[int, int] | None:
        """Positions before and after a query that a layer of this kind sees; None for all."""
        return (self.local_window, self.local_window) if kind == LOCAL else None


def _require_number(field: dataclasses.Field, value: Any) -> None:
    """Raises UserError if the field is for numbers (or yes and no) and `value` is none of its kind."""
    kinds = get_args(field.type) or (field.type,)
    least = 0 if field.name in ("num_encoder_layers", "num_decoder_layers", "global_tokens") else 1
    if value is None and type(None) in kinds:
        return
    if int in kinds:
        fits, wanted = type(value) is int and value >= least, f"a whole number, {least} or more"
    elif float in kinds:
        fits, wanted = type(value) in (int, float) and 0 <= value < math.inf, "a number, 0 or more"
    elif bool in kinds:
        fits, wanted = type(value) is bool, "True or False"
    else:
        return
    if not fits:
        raise UserError(f"ModelConfig.{field.name} = {value!r}: it must be {wanted}.")
