"""The device half of the language-modelling objectives: one loss for span corruption, prefix, causal and masked LM."""

from collections.abc import Mapping
from typing import Any

import gin
import jax
import jax.numpy as jnp

from t5x_domain.kernels.cross_entropy import TokenScores
from t5x_domain.parallel.cross_entropy import cross_entropy

Batch = Mapping[str, jax.Array]

_CHUNK_TOKENS = 1024  # whose logits a device holds at once


@gin.configurable
def language_model_loss(
    model: Any,
    batch: Batch,
    rng: jax.Array | None,
    *,
    num_components: int,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of the target tokens, summed so that parts of a batch add up to the whole.

    Args:
      model: an assembly of `models`; it is called with the features it names in `inputs`.
      batch: features [B, T]; on the model's `target_side`, `decoder_loss_weights` or `encoder_loss_weights` are 0 where
        a target does not count; `component_ids` name the component.
      rng: key for dropout; None in evaluation.
      num_components: length of the per-component sums.
      z_loss, label_smoothing: see `kernels.cross_entropy`.

    Returns:
      The sum to differentiate (float32 scalar), and sums to report: `weight` (number of targets), `nll` (nats),
      `correct`, and `component_nll`, `component_weight` of shape [num_components].
    """
    weights = batch[f"{model.target_side}_loss_weights"]
    loss, scores = token_scores(model, batch, rng, z_loss=z_loss, label_smoothing=label_smoothing)
    nll = scores.nll * weights
    component = jax.nn.one_hot(batch["component_ids"], num_components, dtype=jnp.float32)
    return loss, {
        "weight": weights.sum(),
        "nll": nll.sum(),
        "correct": (scores.correct * weights).sum(),
        "component_nll": jnp.einsum("bt,btc->c", nll, component),
        "component_weight": jnp.einsum("bt,btc->c", weights, component),
    }


def token_scores(
    model: Any, batch: Batch, rng: jax.Array | None = None, **options: float
) -> tuple[jax.Array, TokenScores]:
    """The weighted sum of cross-entropies of the target tokens on the model's `target_side`, and the scores of each.

    Args:
      model: an assembly of `models`; it is called with the features it names in `inputs`.
      batch: features [B, T].
      rng: key for dropout; None for none.
      **options: see `kernels.cross_entropy`.
    """
    features = {name: batch[name] for name in model.inputs if name in batch}
    hidden = model(**features, rng=rng)
    targets, weights = (batch[f"{model.target_side}_{name}"] for name in ("target_tokens", "loss_weights"))
    return target_scores(model, hidden, targets, weights, **options)


def target_scores(
    model: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array, **options: float
) -> tuple[jax.Array, TokenScores]:
    """As `token_scores`, of hidden states [B, T, embed_dim] that the model has already computed."""
    return cross_entropy(
        hidden,
        model.output_kernel,
        targets,
        weights,
        logit_scale=model.logit_scale,
        softcap=model.config.final_logit_softcap,
        chunk_tokens=_CHUNK_TOKENS,
        **options,
    )


def weight_totals(batch: Batch) -> dict[str, jax.Array]:
    """Sums of the features of weights, to go with the parts that a batch is cut into, for `total`."""
    return {f"{name}_total": weights.sum() for name, weights in batch.items() if name.endswith("_weights")}


def total(batch: Batch, name: str) -> jax.Array:
    """Sum of a feature of weights over the batch, or over the whole batch that it is a part of.

    A loss of several terms divides each by a total of its own; a part's own sum would weigh the parts unevenly.
    """
    return batch[f"{name}_total"] if f"{name}_total" in batch else batch[name].sum()


def ratios(sums: Mapping[str, Any]) -> dict[str, float | None]:
    """What a loss reports as `ratios`, pairs of sums by name, as numbers; None where the second is 0."""
    return {name: float(a / b) if b else None for name, (a, b) in sums.get("ratios", {}).items()}
