"""Whether a model computes the same in transformers and here.

transformers runs in a process of its own, so that it may live in another environment (torch and JAX are not always at
hand for the same Python); `transformers_outputs.py` is all that is run there.
"""

import dataclasses
import math
import subprocess
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from t5x_domain.conversion.checkpoint import Checkpoint
from t5x_domain.conversion.huggingface_bert import global_positions
from t5x_domain.conversion.layout import leaves
from t5x_domain.conversion.placing import place
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import EncoderDecoder, EncoderOnly
from t5x_domain.models.config import LOCAL, ModelConfig

_SCRIPT = Path(__file__).with_name("transformers_outputs.py")
_ROWS, _INPUTS, _TARGETS = 2, 200, 150  # beyond the 128 positions after which T5's bias is the same for all


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Outputs of both sides: logits, or an encoder's hidden states.

    Attributes:
      difference: largest absolute difference.
      largest: largest absolute output.
      bound: the difference that float32 rounding can explain.
      same_choice: share of positions where both have their largest output at the same place.
    """

    difference: float
    largest: float
    bound: float
    same_choice: float


def rounding_bound(config: ModelConfig, largest: float) -> float:
    """Largest difference that float32 rounding explains between two implementations, for outputs up to `largest`.

    A product of length n has a relative error of about sqrt(n) u, u = 2^-24 (Higham & Mary 2019), with n the longest
    here. A sub-layer has about 7 such steps (norm, projections, products, sum) and a softmax, which makes a relative
    error of the weights of an absolute one of the scores; those are up to about 8, as T5 does not scale them. Errors of
    all steps add on the residual stream as independent ones do, by their squares: 7 + 8^2 for a sub-layer. Both models
    round, and the last norm makes what they differ by relative to the outputs.
    """
    sublayers = 2 * config.num_encoder_layers + 3 * config.num_decoder_layers
    longest = max(config.mlp_dim, config.embed_dim, config.num_heads * config.head_dim)
    return 2 * math.sqrt((7 + 8**2) * sublayers) * math.sqrt(longest) * 2**-24 * largest


def compare(ours: Checkpoint, folder: str, python: str) -> Comparison:
    """Runs both in float32 on random tokens with padding.

    Args:
      ours: what runs here.
      folder: the Hugging Face folder of the same model.
      python: an interpreter that has torch and transformers.

    Raises:
      UserError: transformers could not run, or the difference is more than rounding.
    """
    features = _features(ours)
    theirs = _transformers_outputs(features, folder, python)
    mine = outputs(ours, features)
    valid = features.get("decoder_attention_mask", features["attention_mask"]).astype(bool)
    difference, largest = np.abs(mine - theirs)[valid].max(), np.abs(theirs)[valid].max()
    result = Comparison(
        difference=float(difference),
        largest=float(largest),
        bound=rounding_bound(ours.config, float(largest)),
        same_choice=float((mine.argmax(-1) == theirs.argmax(-1))[valid].mean()),
    )
    if not result.difference <= result.bound:  # so that nan is seen
        raise UserError(
            f"--check: {ours.origin} and {folder} differ by {result.difference:.3g}, float32 rounding explains "
            f"{result.bound:.3g} (outputs up to {result.largest:.3g})."
        )
    return result


def require_transformers(python: str) -> None:
    """Raises UserError if the interpreter `python` lacks torch or transformers."""
    try:
        done = subprocess.run([python, "-c", "import torch, transformers"], capture_output=True, text=True, check=False)
        missing = (done.stderr.strip().splitlines() or [""])[-1] if done.returncode else None
    except OSError as error:
        missing = error.strerror
    if missing is not None:
        raise UserError(
            f"--check runs transformers in {python}, which cannot ({missing}); install torch and transformers there, "
            "or name an interpreter that has them with --check_python."
        )


def _features(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Random ids, the second row shorter, under transformers' names."""
    rng, config = np.random.default_rng(0), checkpoint.config
    features = {}
    # Some keys must lie outside a window.
    inputs = max(_INPUTS, 3 * config.local_window) if LOCAL in config.layer_pattern else _INPUTS
    inputs = min(inputs, config.longest or inputs)
    for prefix, length in (("", inputs), ("decoder_", _TARGETS)):
        mask = np.arange(length) < np.array([[length], [length - length // 10]])
        ids = np.where(mask, rng.integers(3, config.vocab_size, (_ROWS, length)), 0)
        features |= {f"{prefix}input_ids": ids.astype(np.int32), f"{prefix}attention_mask": mask.astype(np.int32)}
        if checkpoint.model is not EncoderDecoder:
            break
    if positions := global_positions(config, inputs):
        features["global_attention_mask"] = np.zeros((_ROWS, inputs), np.int32)
        features["global_attention_mask"][:, positions] = 1
    return features


def _transformers_outputs(features: dict[str, np.ndarray], folder: str, python: str) -> np.ndarray:
    with tempfile.TemporaryDirectory() as place:
        given, made = Path(place, "given.npz"), Path(place, "made.npy")
        np.savez(given, **features)
        command = [python, str(_SCRIPT), folder, str(given), str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"--check: transformers in {python} could not run {folder}: {reason}")
        return np.load(made)


def outputs(checkpoint: Checkpoint, features: dict[str, np.ndarray]) -> np.ndarray:
    """Logits, or an encoder's hidden states, in float32; `features` are [B, T] int32 under transformers' names."""
    config = dataclasses.replace(checkpoint.config, dtype="float32", dropout_rate=0.0)
    graph, state = nnx.split(nnx.eval_shape(lambda: checkpoint.model(config, rngs=nnx.Rngs(0))))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    by_name = {leaf.name: leaf for leaf in leaves(checkpoint.model, config)}
    for path, param in nnx.to_flat_state(state):
        leaf = by_name["/".join(map(str, path))]
        target = jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=here)
        param.set_value(place(leaf, checkpoint.tensors, target))
    mask = features["attention_mask"]

    @jax.jit
    def run(state: nnx.State) -> jax.Array:
        model = nnx.merge(graph, state)
        if checkpoint.model is EncoderDecoder:
            hidden = model(
                features["input_ids"],
                features["decoder_input_ids"],
                encoder_segment_ids=mask,
                decoder_segment_ids=features["decoder_attention_mask"],
            )
        elif checkpoint.model is EncoderOnly:
            return model(features["input_ids"], encoder_segment_ids=mask)
        else:
            hidden = model(features["input_ids"], decoder_segment_ids=mask)
        return model.logits(hidden)

    with jax.default_matmul_precision("highest"):
        return np.asarray(run(state))
