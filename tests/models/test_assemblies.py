"""What the three models must do whatever their size: packing, causality, prefixes, dtypes, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_domain.errors import UserError
from t5x_domain.kernels.cross_entropy import cross_entropy
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder, EncoderOnly
from t5x_domain.models.config import ModelConfig

BASE = {
    "vocab_size": 40,
    "embed_dim": 8,
    "mlp_dim": 12,
    "num_heads": 2,
    "head_dim": 4,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "dtype": "float64",
}
POSITIONS = ["relative_bias", "rope", "alibi"]


@pytest.fixture(autouse=True)
def float64():
    """In float64, results that are equal but summed in another order agree to 1e-12."""
    with jax.enable_x64(True):
        yield


def build(assembly, **options):
    return assembly(ModelConfig(**BASE | options), rngs=nnx.Rngs(0))


def tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 1, 40)


def pack(lengths: list[int], length: int) -> tuple[jax.Array, jax.Array]:
    """Segment ids and positions, [1, length]."""
    ids, positions = np.zeros((1, length), np.int32), np.zeros((1, length), np.int32)
    start = 0
    for segment, size in enumerate(lengths, 1):
        ids[0, start : start + size] = segment
        positions[0, start : start + size] = np.arange(size)
        start += size
    return jnp.asarray(ids), jnp.asarray(positions)


@pytest.mark.parametrize("position", POSITIONS)
def test_packed_encoder_decoder_equals_examples_one_by_one(position):
    model = build(EncoderDecoder, position=position, layer_pattern=("local", "global"), local_window=3)
    sources, targets = [5, 1, 4], [2, 4, 3]
    encoder_ids, encoder_positions = pack(sources, 13)
    decoder_ids, decoder_positions = pack(targets, 10)
    inputs, outputs = tokens(1, 13), tokens(1, 10, seed=1)
    packed = nnx.jit(lambda m: m(
        inputs, outputs,
        encoder_segment_ids=encoder_ids, encoder_positions=encoder_positions,
        decoder_segment_ids=decoder_ids, decoder_positions=decoder_positions,
    ))(model)  # fmt: skip
    for segment in range(1, 4):
        source, target = encoder_ids[0] == segment, decoder_ids[0] == segment
        alone = model(inputs[:, source], outputs[:, target])
        np.testing.assert_allclose(packed[:, target], alone, atol=1e-12)


@pytest.mark.parametrize("position", POSITIONS)
def test_packed_prefix_lm_equals_examples_one_by_one(position):
    model = build(DecoderOnly, position=position, layer_pattern=("local", "global"), local_window=3)
    ids, positions = pack([6, 3, 4], 15)
    prefix = jnp.array([[1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0]])
    text = tokens(1, 15)
    arguments = {"decoder_segment_ids": ids, "decoder_positions": positions, "decoder_prefix": prefix}
    packed = nnx.jit(lambda m: m(text, **arguments))(model)
    for segment in range(1, 4):
        here = ids[0] == segment
        alone = model(text[:, here], decoder_prefix=prefix[:, here])
        np.testing.assert_allclose(packed[:, here], alone, atol=1e-12)


def sensitivity(function, text: jax.Array) -> np.ndarray:
    """[T, T] bool: whether the output at position i changes when token j does."""
    plain, length = function(text), text.shape[1]
    changed = [function(text.at[0, j].set(text[0, j] % 39 + 1)) for j in range(length)]
    return np.stack([np.asarray((c != plain).any(-1)[0]) for c in changed], axis=1)


def test_decoder_sees_its_past_and_its_prefix():
    model = build(DecoderOnly)
    run = nnx.jit(lambda model, text, prefix: model(text, decoder_prefix=prefix))
    prefix = jnp.array([[1, 1, 1, 0, 0, 0]])
    causal = np.tril(np.ones((6, 6), bool))
    np.testing.assert_array_equal(sensitivity(lambda t: run(model, t, 0 * prefix), tokens(1, 6)), causal)
    expected = causal.copy()
    expected[:3, :3] = True
    np.testing.assert_array_equal(sensitivity(lambda t: run(model, t, prefix), tokens(1, 6)), expected)


def test_encoder_sees_everything_but_padding():
    model = build(EncoderOnly)
    ids = jnp.array([[1, 1, 1, 1, 0]])
    run = nnx.jit(lambda model, text: model(text, encoder_segment_ids=ids))
    expected = np.zeros((5, 5), bool)
    expected[:4, :4] = True
    expected[4, 4] = True  # padding goes through the feed-forward layers, seen by nobody
    np.testing.assert_array_equal(sensitivity(lambda t: run(model, t), tokens(1, 5)), expected)


def test_local_layers_see_their_window():
    """Two local layers of window 1 reach two tokens to each side."""
    model = build(EncoderOnly, layer_pattern=("local",), local_window=1)
    run = nnx.jit(lambda model, text: model(text))
    distance = abs(np.arange(7)[:, None] - np.arange(7))
    np.testing.assert_array_equal(sensitivity(lambda t: run(model, t), tokens(1, 7)), distance <= 2)


def test_bfloat16_keeps_parameters_and_logits_in_float32():
    model = build(DecoderOnly, dtype="bfloat16")
    hidden = model(tokens(1, 6))
    assert hidden.dtype == jnp.bfloat16 and model.logits(hidden).dtype == jnp.float32
    graph, params = nnx.split(model)
    gradients = jax.grad(lambda p: nnx.merge(graph, p)(tokens(1, 6)).astype(jnp.float32).sum())(params)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, gradients))} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_embeddings": True, "scale_logits": True}, {"final_logit_softcap": 2.0}],
    ids=["free", "tied and scaled", "capped"],
)
def test_logits_are_those_of_the_chunked_loss(options):
    model = build(DecoderOnly, **options)
    hidden, targets = model(tokens(2, 6)), tokens(2, 6, seed=1)
    _, scores = cross_entropy(
        hidden,
        model.output_kernel,
        targets,
        jnp.ones((2, 6)),
        logit_scale=model.logit_scale,
        softcap=model.config.final_logit_softcap,
    )
    log_p = jax.nn.log_softmax(model.logits(hidden))
    np.testing.assert_allclose(scores.nll, -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0], atol=1e-12)


def test_t5_1_0_divides_its_logits():
    """By sqrt(embed_dim) = sqrt(8)."""
    scaled, plain = (build(DecoderOnly, tie_embeddings=True, scale_logits=scale) for scale in (True, False))
    hidden = plain(tokens(1, 4))
    np.testing.assert_allclose(scaled.logits(hidden) * 8**0.5, plain.logits(hidden), rtol=1e-12)


def test_dropout_needs_a_key():
    model = build(EncoderDecoder, dropout_rate=0.3)
    run = nnx.jit(lambda model, rng: model(tokens(1, 5), tokens(1, 4), rng=rng))
    assert (run(model, None) == run(build(EncoderDecoder), None)).all()
    first, second = run(model, jax.random.key(0)), run(model, jax.random.key(1))
    assert (first != second).any() and (first == run(model, jax.random.key(0))).all()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"norm": "batchnorm"}, "ModelConfig.norm = 'batchnorm'.*rmsnorm, layernorm"),
        ({"dtype": "int8"}, "ModelConfig.dtype"),
        ({"remat": "some"}, "ModelConfig.remat"),
        ({"position": "sinusoidal"}, "ModelConfig.position"),
        ({"mlp_activations": ("swish",)}, "ModelConfig.mlp_activations"),
        ({"mlp_activations": ()}, "ModelConfig.mlp_activations"),
        ({"layer_pattern": ("global", "dilated")}, "ModelConfig.layer_pattern"),
        ({"num_heads": 6, "num_kv_heads": 4}, "no multiple of num_kv_heads = 4"),
        ({"head_dim": 3, "position": "rope"}, "ModelConfig.head_dim = 3 must be even"),
        ({"dropout_rate": 1.0}, "ModelConfig.dropout_rate"),
    ],
)
def test_impossible_configurations_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        ModelConfig(**BASE | options)


@pytest.mark.parametrize(
    "assembly, missing",
    [(EncoderDecoder, "num_decoder_layers"), (DecoderOnly, "num_decoder_layers"), (EncoderOnly, "num_encoder_layers")],
)
def test_models_need_their_layers(assembly, missing):
    with pytest.raises(UserError, match=f"{missing} = 0"):
        build(assembly, **{missing: 0})
