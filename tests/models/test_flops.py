"""FLOPs by formula against the products that the program itself holds, and against published formulas."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from t5x_domain.kernels.mask import Mask, key_intervals
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder, EncoderOnly
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.flops import forward_flops, train_step_flops, visible_keys
from t5x_domain.models.rtd import DetectingEncoderDecoder, ReplacedTokenDetection
from t5x_domain.objectives.auxiliary_detection import denoising_with_detection_loss
from t5x_domain.objectives.losses import language_model_loss
from t5x_domain.objectives.rtd import replaced_token_detection_loss
from tests.tiny import CONFIG, batch, blueprint, masked_batch

LENGTHS = {"inputs": 40, "targets": 24}
ROWS = 2
FULL = dataclasses.replace(CONFIG, attention_backend="xla", position="none")  # T5's bias is gathered by a product
COMPONENTS = 3


def products(function, *args) -> int:
    """FLOPs of all matrix products of a function, those in loops as often as the loops turn."""
    return _products(jax.make_jaxpr(function)(*args).jaxpr)


def _products(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            if result != (COMPONENTS,):  # sums by component, to report
                total += 2 * math.prod(result) * math.prod(shape[i] for i in contracted)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += times * _products(inner)
    return total


def loss_products(model, config, loss, features) -> int:
    plan = blueprint(model=model, config=config)
    forward = lambda params: loss(plan.merge(params), features, None, num_components=COMPONENTS)[0]  # noqa: E731
    return products(forward, plan.shapes)


ASSEMBLIES = {
    "encoder_decoder": (EncoderDecoder, {}),
    "gated": (EncoderDecoder, {"mlp_activations": ("silu", "linear")}),
    "plain_mlp": (EncoderDecoder, {"mlp_activations": ("relu",)}),
    "grouped_query": (EncoderDecoder, {"num_kv_heads": 2}),
    "uneven_depth": (EncoderDecoder, {"num_encoder_layers": 3, "num_decoder_layers": 1}),
    "tied": (EncoderDecoder, {"tie_embeddings": True}),
    "wide_heads": (EncoderDecoder, {"head_dim": 64}),
    "narrow_embedding": (EncoderOnly, {"embedding_dim": 32}),
    "encoder_only": (EncoderOnly, {}),
}


@pytest.mark.parametrize("name", ASSEMBLIES)
def test_forward_is_what_the_program_multiplies(name):
    """To the last product: no mask cuts anything off in these but the decoder's triangle, which the program, a block of
    keys at a time, computes whole at such a length."""
    model, changes = ASSEMBLIES[name]
    config = dataclasses.replace(FULL, **changes)
    inputs, targets = LENGTHS.values()
    features = masked_batch(ROWS, inputs) if model is EncoderOnly else batch(ROWS, inputs, targets)
    found = loss_products(model, config, language_model_loss, features)
    layers = 0 if model is EncoderOnly else config.num_decoder_layers
    triangle = 4 * config.num_heads * config.head_dim * layers * (targets**2 - targets * (targets + 1) // 2)
    assert found == ROWS * (forward_flops(model, config, LENGTHS) + triangle)


def test_replaced_token_detection_multiplies_so_much():
    """The forward pass and the generator's logits once more, from which it draws."""
    config = dataclasses.replace(FULL, num_decoder_layers=0, rtd_generator_width=0.5)
    found = loss_products(
        ReplacedTokenDetection, config, replaced_token_detection_loss, masked_batch(ROWS, LENGTHS["inputs"])
    )
    forward = forward_flops(ReplacedTokenDetection, config, LENGTHS)
    drawn = train_step_flops(ReplacedTokenDetection, config, 1, LENGTHS) - 3 * forward
    assert drawn == 2 * 8 * 32 * config.vocab_size  # 20 % of 40 positions, a width of 32
    assert found == ROWS * (forward + drawn)


def test_detection_beside_a_decoder_multiplies_so_much():
    config = dataclasses.replace(FULL, rtd_generator_layers=1)
    features = batch(ROWS, LENGTHS["inputs"], LENGTHS["targets"])
    features["encoder_token_weights"] = (features["encoder_segment_ids"] > 0).astype(np.float32)
    loss = functools.partial(denoising_with_detection_loss, mask_id=1)
    found = loss_products(DetectingEncoderDecoder, config, loss, features)
    forward = forward_flops(DetectingEncoderDecoder, config, LENGTHS)
    drawn = train_step_flops(DetectingEncoderDecoder, config, 1, LENGTHS) - 3 * forward
    triangle = 4 * 64 * 2 * (24**2 - 24 * 25 // 2)
    assert found == ROWS * (forward + drawn + triangle)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("window", "leading"), [(None, 0), ((3, 3), 0), ((3, 3), 2), ((50, 50), 3), ((0, 0), 1)])
def test_pairs_are_those_of_the_mask(causal, window, leading):
    intervals = key_intervals(Mask(causal, window, leading), 17, 17)
    by_mask = (intervals.stop - intervals.start).clip(0).sum()
    if intervals.global_stop is not None:
        by_mask += (intervals.global_stop - intervals.global_start).clip(0).sum()
    assert visible_keys(17, causal=causal, window=window, global_tokens=leading) == by_mask


def test_pairs_of_global_blocks():
    """Ten tokens, a window of one, every fourth global (3 and 7): by the picture of the mask."""
    seen = np.abs(np.subtract.outer(np.arange(10), np.arange(10))) <= 1
    seen[[3, 7]] = seen[:, [3, 7]] = True
    assert visible_keys(10, causal=False, window=(1, 1), every=4) == seen.sum()


def test_a_longt5_encoder_has_keys_for_blocks():
    config = dataclasses.replace(FULL, layer_pattern=("local",), local_window=4)
    blocks = dataclasses.replace(config, global_blocks="transient", global_block_size=8)
    more = forward_flops(EncoderOnly, blocks, LENGTHS) - forward_flops(EncoderOnly, config, LENGTHS)
    assert more == 2 * (2 * 5 * 64 * 2 * 64 + 4 * 40 * 5 * 64)  # 2 layers, 5 blocks, 64 = width = heads x head_dim


def test_palms_formula_for_a_decoder():
    """PaLM, appendix B: 6 N + 12 L H Q T FLOPs a token, N parameters without embeddings' look-up, T the length; its
    attention is not halved for the triangle."""
    config = ModelConfig(
        vocab_size=1000, embed_dim=256, mlp_dim=1024, num_heads=4, num_encoder_layers=0, num_decoder_layers=6,
        tie_embeddings=True,
    )  # fmt: skip
    length = 128
    parameters = 6 * (4 * 256 * 256 + 3 * 256 * 1024) + 1000 * 256
    palm = length * (6 * parameters + 12 * 6 * 4 * 64 * length)
    halved = 12 * 6 * 4 * 64 * (length**2 - length * (length + 1) // 2)
    assert train_step_flops(DecoderOnly, config, 1, {"inputs": 100, "targets": 28}) == palm - halved
