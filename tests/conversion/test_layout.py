import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import CONFIG, SHAPE

from t5x_domain.conversion.layout import Leaf, leaves, part_shapes
from t5x_domain.conversion.placing import place
from t5x_domain.conversion.tensors import Tensor
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder, EncoderOnly
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.rtd import DetectingEncoderDecoder, ReplacedTokenDetection

PATTERN = ModelConfig(
    **SHAPE,
    num_encoder_layers=0,
    num_decoder_layers=5,
    position="rope",
    layer_pattern=("local", "global"),
    local_window=2,
    qk_norm=True,
    norm_placement="pre_post",
)
MODELS = {
    "encoder_decoder": (EncoderDecoder, CONFIG),
    "bias in every layer": (EncoderDecoder, dataclasses.replace(CONFIG, relative_bias_per_layer=True)),
    "tied": (EncoderDecoder, dataclasses.replace(CONFIG, tie_embeddings=True, mlp_activations=("relu",))),
    "layers left over": (DecoderOnly, PATTERN),
    "fewer layers than the pattern": (DecoderOnly, dataclasses.replace(PATTERN, num_decoder_layers=1)),
    "encoder": (EncoderOnly, dataclasses.replace(CONFIG, embedding_norm=True)),
    "generator of another depth": (
        ReplacedTokenDetection,
        dataclasses.replace(
            CONFIG, num_encoder_layers=5, layer_pattern=("local", "global"), rtd_generator_layers=3, embedding_dim=4
        ),
    ),
    "generator beside an encoder-decoder": (
        DetectingEncoderDecoder,
        dataclasses.replace(CONFIG, rtd_generator_layers=1, rtd_embedding_sharing="tied", tie_embeddings=True),
    ),
}


def by_name(model, config):
    return {leaf.name: leaf for leaf in leaves(model, config)}


def test_scanned_layers_are_named_one_by_one():
    found = by_name(EncoderDecoder, CONFIG)
    name = "decoder/layers/blocks/0/mlp/inner/wo/kernel"
    parts = tuple(f"decoder/{i}/mlp/inner/wo/kernel" for i in range(3))
    assert found[name] == Leaf(name, (3, 12, 8), parts, stacked=True)
    assert found[name].part_shape == (12, 8)
    for name, shape in {"embedding/embedding": (40, 8), "encoder/norm/scale": (8,)}.items():
        assert found[name] == Leaf(name, shape, (name,), stacked=False)


def test_unrolled_layers_have_the_same_names():
    found = by_name(EncoderDecoder, dataclasses.replace(CONFIG, scan_layers=False))
    name = "decoder/rest/blocks/2/mlp/inner/wo/kernel"
    assert found[name] == Leaf(name, (12, 8), ("decoder/2/mlp/inner/wo/kernel",), stacked=False)


def test_a_pattern_with_layers_left_over():
    """5 layers of the pattern (local, global): blocks 0 and 1 twice, then the beginning of the pattern."""
    found = by_name(DecoderOnly, PATTERN)
    kernel = "self_attention/inner/query/kernel"
    assert found[f"decoder/layers/blocks/0/{kernel}"].parts == (f"decoder/0/{kernel}", f"decoder/2/{kernel}")
    assert found[f"decoder/layers/blocks/1/{kernel}"].parts == (f"decoder/1/{kernel}", f"decoder/3/{kernel}")
    assert found[f"decoder/rest/blocks/0/{kernel}"].parts == (f"decoder/4/{kernel}",)


def test_a_generator_counts_its_own_layers():
    """5 and 3 layers of a pattern of two: two turns and a rest, one turn and a rest."""
    found = by_name(*MODELS["generator of another depth"])
    kernel = "self_attention/inner/query/kernel"
    assert found[f"encoder/layers/blocks/1/{kernel}"].parts == (f"encoder/1/{kernel}", f"encoder/3/{kernel}")
    assert found[f"encoder/rest/blocks/0/{kernel}"].parts == (f"encoder/4/{kernel}",)
    assert found[f"generator/encoder/layers/blocks/1/{kernel}"].parts == (f"generator/encoder/1/{kernel}",)
    assert found[f"generator/encoder/rest/blocks/0/{kernel}"].parts == (f"generator/encoder/2/{kernel}",)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_exactly_one_place(name):
    model, config = MODELS[name]
    state = nnx.state(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))))
    shapes = {"/".join(map(str, path)): param.shape for path, param in nnx.to_flat_state(state)}
    found = leaves(model, config)
    assert {leaf.name: leaf.shape for leaf in found} == shapes
    parts = [part for leaf in found for part in leaf.parts]
    assert len(parts) == len(set(parts))
    sizes = sum(np.prod(shape) for shape in part_shapes(model, config).values())
    assert sizes == sum(np.prod(shape) for shape in shapes.values())
    assert part_shapes(model, config) == part_shapes(
        model, dataclasses.replace(config, scan_layers=not config.scan_layers)
    )


@given(st.integers(1, 7), st.lists(st.sampled_from(["local", "global"]), min_size=1, max_size=4), st.booleans())
@settings(max_examples=15, deadline=None)
def test_any_depth_and_pattern(depth, pattern, scanned):
    config = dataclasses.replace(
        PATTERN, num_decoder_layers=depth, layer_pattern=tuple(pattern), scan_layers=scanned, qk_norm=False
    )
    numbers = [int(part.split("/")[1]) for part in part_shapes(DecoderOnly, config) if part.endswith("wo/kernel")]
    assert sorted(numbers) == list(range(depth))


@pytest.mark.parametrize("name", ["bias in every layer", "layers left over", "encoder", "generator of another depth"])
def test_scanned_and_unrolled_models_with_the_same_values_compute_the_same(name):
    model, config = MODELS[name]
    rng = np.random.default_rng(0)
    tensors = {
        part: Tensor.of(rng.normal(0, 0.3, shape).astype(np.float32))
        for part, shape in part_shapes(model, config).items()
    }
    tokens = rng.integers(1, SHAPE["vocab_size"], (2, 6)).astype(np.int32)

    def outputs(scan_layers):
        built = model(dataclasses.replace(config, scan_layers=scan_layers), rngs=nnx.Rngs(0))
        by_path = by_name(model, built.config)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        for path, param in nnx.to_flat_state(nnx.state(built)):
            leaf = by_path["/".join(map(str, path))]
            value = place(leaf, tensors, jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=here))
            nnx.update(built, nnx.from_flat_state([(path, param.replace(value))]))
        return np.asarray(nnx.jit(lambda m: m(*[tokens] * (1 + issubclass(model, EncoderDecoder))))(built))

    scanned, unrolled = outputs(True), outputs(False)
    np.testing.assert_allclose(scanned, unrolled, rtol=0, atol=1e-5)
    assert scanned.std() > 0.1  # not because all is nought
