"""The device half of replaced-token detection (Clark et al. 2020, ELECTRA, section 2; He et al. 2021, DeBERTaV3)."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp

from t5x_domain.errors import UserError
from t5x_domain.kernels.cross_entropy import TokenScores
from t5x_domain.kernels.sample import sample_tokens
from t5x_domain.models.rtd import Detector, ReplacedTokenDetection
from t5x_domain.objectives.losses import target_scores, total

Batch = Mapping[str, jax.Array]


@gin.configurable
def replaced_token_detection_loss(
    model: Any,
    batch: Batch,
    rng: jax.Array | None,
    *,
    num_components: int,
    detection_weight: float = 50.0,
    masked_only: bool = False,
    temperature: float = 1.0,
    sampling_dropout: bool = True,
    max_share: float = 0.2,
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, Any]]:
    """Masked language modelling of the generator and detection of what it puts in place of the chosen tokens.

    The gradient is that of (sum of cross-entropies / positions chosen) + detection_weight * (sum of binary
    cross-entropies / tokens), over the whole batch of which `batch` may be a part. No gradient flows through sampling.

    Args:
      model: a `ReplacedTokenDetection`.
      batch: features [B, S]: `encoder_input_tokens`, the text as the generator reads it, `encoder_target_tokens`, as it
        was, `encoder_loss_weights`, 1 at chosen positions, `encoder_token_weights`, 1 at tokens of the text and 0 at
        metadata and padding, and `component_ids`.
      rng: key for dropout and sampling; None in evaluation, which samples with a fixed key.
      num_components: length of the per-component sums.
      detection_weight: 50 in ELECTRA.
      masked_only: detect at chosen positions only, and divide by their number (ELECTRA, section 3.4: "ELECTRA 15%").
      temperature: of sampling.
      sampling_dropout: sample from what the generator computes with dropout (ELECTRA), or without (COCO-LM).
      max_share: share of a row's positions that have room for a prediction. Chosen ones beyond keep their token; they
        count as chosen, and the ratio `without_room` says how many they are.
      z_loss: of the generator, see `kernels.cross_entropy`.

    Returns:
      The sum to differentiate (float32 scalar), and sums to report, of detection: `weight` (tokens, or positions
      chosen), `binary_nll` (nats), `correct`, `component_nll`, `component_weight` [num_components]. And `ratios`, pairs
      [2] of numerator and denominator that add up: `generator_loss` (nats), `generator_accuracy`, `share_replaced`,
      `precision`, `recall` and `f1` of the replaced tokens, `without_room`.

    Raises:
      UserError: another model.
    """
    if not isinstance(model, ReplacedTokenDetection):
        raise UserError(
            f"{type(model).__name__} has no generator to replace tokens and no head to detect them; "
            "set MODEL = @ReplacedTokenDetection, an encoder, for the loss @replaced_token_detection_loss."
        )
    name = "encoder_loss_weights" if masked_only else "encoder_token_weights"
    weights, chosen = batch[name], "encoder_loss_weights"
    options = {"temperature": temperature, "sampling_dropout": sampling_dropout, "max_share": max_share}
    found = detection(model, batch, weights, rng, z_loss=z_loss, **options)
    # The step divides by the sum of `weights`: what this leaves of the generator's part is 1 / positions chosen.
    ratio = total(batch, name) / jnp.maximum(total(batch, chosen), 1)
    component = jax.nn.one_hot(batch["component_ids"], num_components, dtype=jnp.float32)
    detection_loss = found.nll.sum()
    return found.generator_loss * ratio.astype(found.generator_loss.dtype) + detection_weight * detection_loss, {
        "weight": weights.sum(),
        "binary_nll": detection_loss,
        "correct": (found.correct * weights).sum(),
        "component_nll": jnp.einsum("bs,bsc->c", found.nll, component),
        "component_weight": jnp.einsum("bs,bsc->c", weights, component),
        "ratios": found.ratios,
    }


class Detection(NamedTuple):
    """What generator and detector have to say of a batch.

    Attributes:
      generator_loss: weighted sum of cross-entropies of the chosen tokens, float32 scalar.
      nll: [B, S] float32, binary cross-entropies times their weights.
      correct: [B, S] bool, whether the token was taken for what it is.
      ratios: to report, see `replaced_token_detection_loss`.
    """

    generator_loss: jax.Array
    nll: jax.Array
    correct: jax.Array
    ratios: dict[str, jax.Array]


def detection(
    model: Detector,
    batch: Batch,
    weights: jax.Array,
    rng: jax.Array | None,
    *,
    temperature: float,
    sampling_dropout: bool,
    max_share: float,
    z_loss: float,
) -> Detection:
    """Lets the generator replace the chosen tokens and the model detect which tokens were replaced.

    Args:
      model: holds both.
      batch: features [B, S], see `replaced_token_detection_loss`; `encoder_loss_weights` may be others than 0 and 1.
      weights: [B, S] float32, of the tokens in detection.
      rng, temperature, sampling_dropout, max_share, z_loss: see `replaced_token_detection_loss`.

    Raises:
      UserError: temperature or share are out of range.
    """
    if temperature <= 0 or not 0 < max_share <= 1:
        raise UserError(
            f"replaced-token detection with temperature = {temperature} and a share of {max_share}: set the loss's "
            "temperature above 0, its share (or max_share) above 0 and at most 1."
        )
    generator_rng, detection_rng = (None, None) if rng is None else jax.random.split(rng)
    chosen = Chosen.of(batch, max_share)
    generator_loss, scores, samples = _generate(
        model.generator, batch, chosen, generator_rng, temperature, sampling_dropout, z_loss
    )
    original = batch["encoder_target_tokens"]
    tokens = chosen.replace(original, samples)
    replaced = tokens != original
    places = {name: batch[f"encoder_{name}"] for name in ("segment_ids", "positions")}
    logits = model.detect(tokens, **places, rng=detection_rng)
    nll = (jax.nn.softplus(logits) - replaced * logits) * weights
    detected = logits > 0
    ratios = _generator_ratios(scores, chosen, batch) | _detection_ratios(detected, replaced, weights)
    return Detection(generator_loss, nll, detected == replaced, ratios)


class Chosen(NamedTuple):
    """The chosen positions, gathered: of each row the first K that are chosen, then others of weight 0.

    Attributes:
      positions: [B, K] int32.
      targets: [B, K] int32, the tokens that were there.
      weights: [B, K] float32, the chosen positions' weights, 0 of the others.
      slot: [B, S] int32, where among the K a position stands.
      with_room: [B, S] bool, whether it is one of them.
    """

    positions: jax.Array
    targets: jax.Array
    weights: jax.Array
    slot: jax.Array
    with_room: jax.Array

    @classmethod
    def of(cls, batch: Batch, max_share: float) -> "Chosen":
        """K is the share of the row's length, rounded up."""
        weights, targets = batch["encoder_loss_weights"], batch["encoder_target_tokens"]
        chosen = weights > 0
        length = chosen.shape[1]
        room = math.ceil(length * max_share)
        positions = jax.lax.top_k(jnp.where(chosen, length - jnp.arange(length), 0), room)[1]
        slot = jnp.cumsum(chosen, axis=1) - 1
        with_room = chosen & (slot < room)
        targets, weights = (jnp.take_along_axis(of_row, positions, axis=1) for of_row in (targets, weights))
        return cls(positions, targets, weights, slot, with_room)

    def gather(self, hidden: jax.Array) -> jax.Array:
        """[B, S, D] -> [B, K, D]."""
        return jnp.take_along_axis(hidden, self.positions[..., None], axis=1)

    def replace(self, tokens: jax.Array, samples: jax.Array) -> jax.Array:
        """[B, S] with samples [B, K] at the chosen positions."""
        sampled = jnp.take_along_axis(samples, jnp.clip(self.slot, 0, samples.shape[1] - 1), axis=1)
        return jnp.where(self.with_room, sampled, tokens)


def _generate(
    generator: Any,
    batch: Batch,
    chosen: Chosen,
    rng: jax.Array | None,
    temperature: float,
    sampling_dropout: bool,
    z_loss: float,
) -> tuple[jax.Array, TokenScores, jax.Array]:
    """The generator's summed loss, its scores [B, K], and the tokens [B, K] that it draws."""
    dropout_rng, key = (None, jax.random.key(0)) if rng is None else jax.random.split(rng)

    def states(rng: jax.Array | None) -> jax.Array:
        return chosen.gather(generator(**{name: batch[name] for name in generator.inputs}, rng=rng))

    hidden = states(dropout_rng)
    loss, scores = target_scores(generator, hidden, chosen.targets, chosen.weights, z_loss=z_loss)
    if not sampling_dropout and rng is not None and generator.config.dropout_rate:
        hidden = states(None)
    options = {"logit_scale": generator.logit_scale, "softcap": generator.config.final_logit_softcap}
    return loss, scores, sample_tokens(hidden, generator.output_kernel, key, temperature=temperature, **options)


def _generator_ratios(scores: TokenScores, chosen: Chosen, batch: Batch) -> dict[str, jax.Array]:
    predicted, wanted = chosen.weights.sum(), (batch["encoder_loss_weights"] > 0).sum()
    return {
        "generator_loss": _pair((scores.nll * chosen.weights).sum(), predicted),
        "generator_accuracy": _pair((scores.correct * chosen.weights).sum(), predicted),
        "without_room": _pair(wanted - (chosen.weights > 0).sum(), wanted),
    }


def _detection_ratios(detected: jax.Array, replaced: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
    found, said, there = ((mask * weights).sum() for mask in (detected & replaced, detected, replaced))
    return {
        "share_replaced": _pair(there, weights.sum()),
        "precision": _pair(found, said),
        "recall": _pair(found, there),
        "f1": _pair(2 * found, said + there),
    }


def _pair(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    return jnp.stack([numerator, denominator]).astype(jnp.float32)
