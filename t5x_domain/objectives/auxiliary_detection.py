"""Replaced-token detection on the encoder of an encoder-decoder, beside the loss of its decoder.

As in METRO-T0 (Gong et al. 2023, arXiv:2305.12567) the head of detection sits on the encoder. There the decoder reads
the replaced text; here detection has a pass of its own, so that what the decoder learns from stays as it was.
"""

from collections.abc import Callable, Mapping
from typing import Any

import gin
import jax
import jax.numpy as jnp

from t5x_domain.errors import UserError
from t5x_domain.models.rtd import DetectingEncoderDecoder
from t5x_domain.objectives.losses import language_model_loss, total
from t5x_domain.objectives.rtd import detection

Batch = Mapping[str, jax.Array]
# The model's own call splits `rng` into n keys, which are fold_in(rng, 0) … fold_in(rng, n - 1); n is far smaller.
_STREAM = 2**16


@gin.configurable
def denoising_with_detection_loss(
    model: Any,
    batch: Batch,
    rng: jax.Array | None,
    *,
    num_components: int,
    mask_id: int,
    weight: float | Callable[[jax.Array], jax.Array] = 1.0,
    detection_weight: float = 50.0,
    share: float = 0.15,
    temperature: float = 1.0,
    sampling_dropout: bool = True,
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, Any]]:
    """`language_model_loss` + `weight` * (masked language modelling of the generator + `detection_weight` * detection).

    The first is the mean over targets, and a `weight` of 0 leaves it and its gradient to the bit. For the second,
    tokens of the encoder's text are chosen and masked, the generator draws others in their places, and in a second pass
    the encoder detects which were replaced. Detection is the mean over the text. The generator's cross-entropy is that
    of the chosen tokens, each weighted by the text tokens of its row for one that was chosen: an unbiased mean over the
    text. Both are means over the whole batch of which `batch` may be a part.

    Args:
      model: a `DetectingEncoderDecoder`.
      batch: features of `language_model_loss`, `encoder_token_weights` [B, S] float32, 1 at tokens of the text and 0 at
        metadata, mode tokens, sentinels, EOS and padding, and in training `step`, the update's number from 0, int32.
      rng: key for dropout, for what is chosen and for sampling; None in evaluation, which draws with fixed keys.
      num_components: length of the per-component sums.
      mask_id: what stands in the place of a chosen token.
      weight: a number, or a schedule of it by step.
      detection_weight: 50 in ELECTRA.
      share: of each row's text that is chosen, rounded, one token at least.
      temperature, sampling_dropout: see `replaced_token_detection_loss`.
      z_loss: of the generator, see `kernels.cross_entropy`.

    Returns:
      The sum to differentiate (float32 scalar; without `step` that of `language_model_loss` alone), and the sums that
      `language_model_loss` reports, with `ratios`, as of `replaced_token_detection_loss`, and `detection_loss` (nats)
      and `detection_accuracy` among them.

    Raises:
      UserError: another model, a negative weight, a share or a temperature out of range.
    """
    if not isinstance(model, DetectingEncoderDecoder):
        raise UserError(
            f"{type(model).__name__} has no generator to replace tokens and no head to detect them beside a decoder; "
            "set MODEL = @DetectingEncoderDecoder for the loss @denoising_with_detection_loss."
        )
    _require_weights(weight=weight, detection_weight=detection_weight)
    value, sums = language_model_loss(model, batch, rng, num_components=num_components)
    own = None if rng is None else jax.random.fold_in(rng, _STREAM)
    choice, rest = (jax.random.key(1), None) if own is None else jax.random.split(own)
    weights = batch["encoder_token_weights"]
    options = {"temperature": temperature, "sampling_dropout": sampling_dropout, "max_share": share, "z_loss": z_loss}
    found = detection(model, masked(batch, choice, share, mask_id), weights, rest, **options)
    detected = found.nll.sum()
    if "step" in batch:
        now = weight(batch["step"]) if callable(weight) else weight
        # The step divides by the number of targets: what this leaves is 1 / tokens of the text.
        ratio = now * total(batch, "decoder_loss_weights") / jnp.maximum(total(batch, "encoder_token_weights"), 1)
        value = value + ratio.astype(value.dtype) * (found.generator_loss + detection_weight * detected)
    tokens = weights.sum()
    own_ratios = {
        "detection_loss": jnp.stack([detected, tokens]),
        "detection_accuracy": jnp.stack([(found.correct * weights).sum(), tokens]),
    }
    return value, {**sums, "ratios": found.ratios | own_ratios}


def masked(batch: Batch, key: jax.Array, share: float, mask_id: int) -> dict[str, jax.Array]:
    """The encoder's features of masked language modelling of its input.

    Args:
      batch: features [B, S] of an encoder-decoder with `encoder_token_weights`.
      key: for the draw.
      share, mask_id: see `denoising_with_detection_loss`.

    Returns:
      `encoder_input_tokens` with `mask_id` at the chosen positions, `encoder_target_tokens`, the input as it was,
      `encoder_loss_weights`, at chosen positions the number of the row's text tokens by chosen ones and 0 elsewhere,
      and segment ids and positions as they were.
    """
    tokens, text = batch["encoder_input_tokens"], batch["encoder_token_weights"] > 0
    chosen = choose(key, text, share)
    each = text.sum(axis=1) / jnp.maximum(chosen.sum(axis=1), 1)
    return {
        **{name: batch[name] for name in ("encoder_segment_ids", "encoder_positions")},
        "encoder_input_tokens": jnp.where(chosen, mask_id, tokens),
        "encoder_target_tokens": tokens,
        "encoder_loss_weights": jnp.where(chosen, each[:, None], 0).astype(jnp.float32),
    }


def choose(key: jax.Array, text: jax.Array, share: float) -> jax.Array:
    """round(n * share) of the n positions of each row that are text, one at least, all choices alike; bool [B, S]."""
    noise = jnp.where(text, jax.random.uniform(key, text.shape), 2.0)  # what is no text comes last
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)  # argsort is stable, so ties are no harm
    there = text.sum(axis=1)
    count = jnp.minimum(jnp.maximum(jnp.round(there * share), 1), there)
    return rank < count[:, None]


def _require_weights(**weights: Any) -> None:
    for name, value in weights.items():
        if isinstance(value, (int, float)) and value < 0:
            raise UserError(f"denoising_with_detection_loss.{name} = {value}: it must be 0 or more.")
