"""Checkpoints of T5X: every format and layout, damage, and what arrays do not tell."""

import os
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import t5x_fixtures as fixtures
import tensorstore as ts
from flax import nnx, serialization
from hypothesis import given, settings
from hypothesis import strategies as st
from t5x_fixtures import refused, without

from t5x_domain.conversion.check import rounding_bound
from t5x_domain.conversion.layout import leaves
from t5x_domain.conversion.stores import orbax_spec
from t5x_domain.conversion.t5x import is_t5x, open_t5x, zarr_spec
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder
from tests.models.test_golden import GOLDEN, MODELS, SHAPE, outputs

# What golden models have that arrays do not tell.
GOLDEN_OPTIONS = {"relative_bias_max_distance": 12, "dtype": "float32"}
HEADS = SHAPE["num_heads"]


def weights_of(name: str) -> dict[str, np.ndarray]:
    golden = np.load(GOLDEN / f"{name}.npz")
    return {key.removeprefix("weights/"): golden[key] for key in golden if key.startswith("weights/")}


@pytest.fixture(scope="module")
def tree():
    """T5X's tree of the golden T5.1.1."""
    return fixtures.tree_of(weights_of("t5_1_1"))


def filled(checkpoint):
    """The model with the checkpoint's parameters."""
    model = checkpoint.model(checkpoint.config, rngs=nnx.Rngs(0))
    values = {}
    for leaf in leaves(checkpoint.model, checkpoint.config):
        parts = [checkpoint.tensors[part].read() for part in leaf.parts]
        values[leaf.name] = np.stack(parts) if leaf.stacked else parts[0]
    state = nnx.state(model)
    for path, param in nnx.to_flat_state(state):
        param.set_value(jnp.asarray(values.pop("/".join(map(str, path)))))
    nnx.update(model, state)
    assert not values
    return model


LAYOUTS = {
    "joined": lambda tree: tree,
    "split": lambda tree: fixtures.split_heads(tree, HEADS),
    "scanned": lambda tree: fixtures.scanned(fixtures.split_heads(tree, HEADS)),
    "scanned_joined": fixtures.scanned,
    "scanned_first": lambda tree: fixtures.scanned(fixtures.split_heads(tree, HEADS), axis=0),
    "scanned_last": lambda tree: fixtures.scanned(fixtures.split_heads(tree, HEADS), axis=-1),
}


@pytest.mark.parametrize(
    "name, layout, written",
    [
        ("t5_1_0", "joined", "msgpack"),
        ("t5_1_1", "split", "zarr"),
        ("t5_gated_tied", "scanned_joined", "msgpack"),
        ("umt5", "scanned", "orbax"),
    ],
)
def test_logits_equal_hugging_face(name, layout, written, tmp_path):
    state = fixtures.state_of(LAYOUTS[layout](fixtures.tree_of(weights_of(name))))
    fixtures.FORMATS[written](tmp_path / "checkpoint_7", state)
    checkpoint = open_t5x(str(tmp_path), overrides=GOLDEN_OPTIONS)
    _, assembly, options = MODELS[name]
    assert checkpoint.model is assembly is EncoderDecoder
    for key, value in options.items():
        assert getattr(checkpoint.config, key) == value, key
    golden = dict(np.load(GOLDEN / f"{name}.npz"))
    ids = {key: value for key, value in golden.items() if value.dtype == np.int32}
    predicted = np.asarray(nnx.jit(outputs)(filled(checkpoint), ids))
    valid = golden["decoder_attention_mask"].astype(bool)
    expected = golden["expected"][valid]
    bound = rounding_bound(checkpoint.config, abs(expected).max())
    np.testing.assert_allclose(predicted[valid], expected, rtol=0, atol=bound)


def read_all(path, **options):
    checkpoint = open_t5x(str(path), overrides=GOLDEN_OPTIONS, **options)
    return {name: tensor.read() for name, tensor in checkpoint.tensors.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.fixture(scope="module")
def expected(tree, tmp_path_factory):
    """The golden T5.1.1 as the case above, which Hugging Face's logits vouch for, reads it."""
    folder = tmp_path_factory.mktemp("t5x")
    fixtures.write_zarr(folder, fixtures.state_of(fixtures.split_heads(tree, HEADS)))
    return read_all(folder)


@pytest.mark.parametrize("written", fixtures.FORMATS)
def test_formats_hold_the_same(written, tree, expected, tmp_path):
    fixtures.FORMATS[written](tmp_path, fixtures.state_of(tree, slots=fixtures.unused_slots(tree)))
    assert is_t5x(str(tmp_path))
    assert_same(read_all(tmp_path), expected)
    moments = open_t5x(str(tmp_path)).second_moments
    assert moments.step == 7
    assert moments.slots.keys() == expected.keys()
    assert all(slots["v"].shape == expected[name].shape for name, slots in moments.slots.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same(layout, tree, expected, tmp_path):
    laid_out = LAYOUTS[layout](tree)
    assert "encoder/relpos_bias/rel_embedding" in laid_out  # flaxformer shares a bias even between scanned layers
    fixtures.write_msgpack(tmp_path, fixtures.state_of(laid_out))
    assert_same(read_all(tmp_path / "checkpoint"), expected)
    assert open_t5x(str(tmp_path)).second_moments is None


@pytest.mark.parametrize("layout", ["joined", "scanned"])
def test_a_decoder_alone(layout, tree, expected, tmp_path):
    fixtures.write_msgpack(tmp_path, fixtures.state_of(LAYOUTS[layout](fixtures.decoder_alone(tree))))
    checkpoint = open_t5x(str(tmp_path))
    assert checkpoint.model is DecoderOnly
    assert (checkpoint.config.num_encoder_layers, checkpoint.config.num_decoder_layers) == (0, 3)
    found = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    assert_same(found, {n: v for n, v in expected.items() if not n.startswith("encoder/") and "cross_" not in n})


def test_bfloat16_arrays_stay_bfloat16(tree, tmp_path):
    tree = {name: value.astype(ml_dtypes.bfloat16) for name, value in tree.items()}
    for written in ("msgpack", "zarr"):
        fixtures.FORMATS[written](tmp_path / written, fixtures.state_of(tree))
        read = read_all(tmp_path / written)
        assert {value.dtype for value in read.values()} == {np.dtype(ml_dtypes.bfloat16)}
        np.testing.assert_array_equal(read["embedding/embedding"], tree["token_embedder/embedding"])


def test_the_newest_of_a_model_dir_is_taken(tree, tmp_path):
    for step in (900, 1000):
        fixtures.write_msgpack(tmp_path / f"checkpoint_{step}", fixtures.state_of(tree, step))
    fixtures.write_msgpack(tmp_path / "checkpoint_2000.tmp-1234", fixtures.state_of(tree, 2000))
    assert open_t5x(str(tmp_path)).facts["step"] == 1000
    assert open_t5x(str(tmp_path / "checkpoint_900")).facts["step"] == 900


def test_only_what_is_asked_for_is_read(tree, expected, tmp_path):
    fixtures.write_zarr(tmp_path, fixtures.state_of(tree), chunk=40)  # the embedding of 80 rows in two files
    table = open_t5x(str(tmp_path)).tensors["embedding/embedding"]
    (tmp_path / "target.token_embedder.embedding" / "1.0").write_bytes(b"no gzip")
    np.testing.assert_array_equal(table.read((slice(3, 40),)), expected["embedding/embedding"][3:40])
    with pytest.raises(UserError, match="token_embedder.embedding/1.0"):
        table.read()


def test_a_bucket_is_read_from_itself():
    written = {
        "driver": "zarr",
        "dtype": "float32",
        "kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket"},
        "path": "target.token_embedder.embedding/",
        "metadata": {"shape": [80, 16], "chunks": [80, 16], "compressor": {"id": "gzip"}},
    }
    run = "gs://bucket/runs/t5/checkpoint_7"
    place = {"driver": "gcs", "bucket": "bucket", "path": "runs/t5/checkpoint_7/target.token_embedder.embedding/"}
    spec = zarr_spec(run, written)
    assert spec["kvstore"] == place
    assert spec["metadata"] == {"shape": [80, 16]}
    assert orbax_spec(run, "target.token_embedder.embedding", bundled=False, zarr3=False)["kvstore"] == place
    bundled = orbax_spec(run, "target.a.b", bundled=True, zarr3=True)
    base = {"driver": "gcs", "bucket": "bucket", "path": "runs/t5/checkpoint_7/"}
    assert bundled["driver"] == "zarr3"
    assert bundled["kvstore"] == {"driver": "ocdbt", "base": base, "path": "target.a.b/"}
    for whole in (spec, bundled):
        assert ts.Spec(whole).kvstore.to_json()["path"].startswith(("runs/t5/checkpoint_7/", "target.a.b/"))


GIN_LINES = """
DROPOUT_RATE = 0.1

# Parameters for network.T5Config:
# ==============================================================================
network.T5Config.dropout_rate = %DROPOUT_RATE
network.T5Config.mlp_activations = \\
    ('swish', 'linear')
other.Thing.mlp_activations = ('relu',)
"""
GIN_BLOCK = """
DROPOUT_RATE = 0.1  # a macro
network.T5Config:
  vocab_size = 32128  # vocab size rounded

  mlp_activations = ('silu', 'linear')
  dropout_rate = %DROPOUT_RATE
other.Thing:
  mlp_activations = ('relu',)
"""


@pytest.mark.parametrize("text", [GIN_LINES, GIN_BLOCK])
@pytest.mark.parametrize("written", ["msgpack", "orbax"])
def test_config_gin_says_what_arrays_do_not(text, written, tree, tmp_path):
    fixtures.FORMATS[written](tmp_path / "checkpoint_7", fixtures.state_of(tree))
    guessed = open_t5x(str(tmp_path))
    assert guessed.config.mlp_activations == ("gelu", "linear")
    assert [line.split()[0] for line in guessed.facts["assumed"]] == [
        "mlp_activations", "dropout_rate", "norm_epsilon", "relative_bias_max_distance",
    ]  # fmt: skip
    (tmp_path / "config.gin").write_text(text)
    read = open_t5x(str(tmp_path), overrides={"norm_epsilon": 1e-5})
    assert read.config.mlp_activations == ("silu", "linear")
    assert (read.config.dropout_rate, read.config.norm_epsilon) == (0.1, 1e-5)
    assert [line.split()[0] for line in read.facts["assumed"]] == ["relative_bias_max_distance"]


def test_config_gin_of_another_model_is_refused(tree, tmp_path):
    fixtures.write_msgpack(tmp_path, fixtures.state_of(tree))
    (tmp_path / "config.gin").write_text("network.T5Config.mlp_activations = ('relu',)\n")
    with pytest.raises(UserError, match=r"config.gin: mlp_activations = \('relu',\), but .* 2 input"):
        open_t5x(str(tmp_path))
    given = open_t5x(str(tmp_path), overrides={"mlp_activations": ("silu", "linear")})
    assert given.config.mlp_activations == ("silu", "linear")


def test_other_formats_are_refused_with_the_reason(tree, tmp_path):
    state = fixtures.state_of(tree)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-0"\n')
    assert is_t5x(str(tmp_path))
    refused(tmp_path, "Mesh TensorFlow.*convert_tf_checkpoint")
    fixtures.write_msgpack(tmp_path, state, version=2)
    refused(tmp_path, "version 2 .* whole numbers")
    fixtures.write_msgpack(tmp_path, state, version=4)
    refused(tmp_path, "version 4 .* unknown")
    fixtures.write_msgpack(tmp_path, {**state, "target/decoder/decoder_norm/scale": np.ones(16, np.uint16)})
    refused(tmp_path, "decoder/decoder_norm/scale holds uint16")
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize({"state": {"step": 1}}))
    refused(tmp_path, "neither 'optimizer' nor 'target'")
    (tmp_path / "checkpoint").write_bytes(b"PK")
    assert not is_t5x(str(tmp_path))
    refused(tmp_path, "no T5X checkpoint there")
    refused(tmp_path / "absent", "no T5X checkpoint there")


def test_arrays_without_a_place_are_listed(tree, tmp_path):
    strange = {
        "encoder/layers_0/attention/qkv_fused/kernel": np.ones((16, 3, 24), np.float32),
        "decoder/position_embedder/pos_embedding": np.ones((9, 16), np.float32),
    }
    fixtures.write_msgpack(tmp_path, fixtures.state_of(tree | strange))
    refused(tmp_path, r"position_embedder/pos_embedding \(9, 16\), .*qkv_fused/kernel \(16, 3, 24\)\. Fused kernels")
    twice = {"encoder/layers_0/mlp/wi/kernel": tree["encoder/layers_0/mlp/wi_0/kernel"]}
    fixtures.write_msgpack(tmp_path, fixtures.state_of(tree | twice))
    refused(tmp_path, r"belong to no T5 known here: encoder/layers_0/mlp/wi_0/kernel \(16, 24\)\.$")
    fixtures.write_msgpack(tmp_path, {**fixtures.state_of(tree), "flax_mutables/cache/a": np.ones(3)})
    refused(tmp_path, "flax_mutables/cache/a")
    fixtures.write_msgpack(tmp_path, fixtures.state_of(without(tree, "decoder/layers_1/mlp/wo/kernel")))
    refused(tmp_path, "missing: decoder/1/mlp/inner/wo/kernel")
    refused(tmp_path, "no field 'width'", overrides={"width": 3})


def test_damage_is_named(tree, tmp_path):
    fixtures.write_zarr(tmp_path, fixtures.state_of(tree), chunk=40)
    table = tmp_path / "target.token_embedder.embedding"
    (table / "1.0").unlink()
    refused(tmp_path, "1 files of target/token_embedder/embedding are missing")
    (table / ".zarray").unlink()
    refused(tmp_path, "checkpoint: target/token_embedder/embedding cannot be read .*/.zarray.* does not exist")
    fixtures.write_orbax(tmp_path / "orbax", fixtures.state_of(tree))
    database = tmp_path / "orbax" / "state"
    (database / "manifest.ocdbt").write_bytes(b"damaged")
    refused(tmp_path / "orbax", "cannot be read .DATA_LOSS.*manifest.ocdbt")
    (database / "_METADATA").write_text('{"tree_metadata": {')
    refused(tmp_path / "orbax", "_METADATA: cut short or damaged")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_file_cut_short_is_refused(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    fixtures.write_msgpack(folder, {"target/encoder/a": np.arange(99.0), "state/step": np.int32(3)})
    whole = (folder / "checkpoint").read_bytes()
    (folder / "checkpoint").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(UserError, match="checkpoint: cut short or damaged|no T5X checkpoint there"):
        open_t5x(str(folder))


def test_a_fixture_of_t5x_itself():
    """`t5x/testdata/test_t5_tiny.checkpoint_0`: two layers each, 4 heads of 3, 8 wide."""
    if "T5X_TESTDATA" not in os.environ:
        pytest.skip("set T5X_TESTDATA to the folder t5x/testdata of T5X's repository")
    checkpoint = open_t5x(str(Path(os.environ["T5X_TESTDATA"]) / "test_t5_tiny.checkpoint_0"))
    config = checkpoint.config
    assert (config.vocab_size, config.embed_dim, config.mlp_dim, config.num_heads, config.head_dim) == (
        32128, 8, 16, 4, 3,
    )  # fmt: skip
    assert (config.num_encoder_layers, config.num_decoder_layers, config.tie_embeddings) == (2, 2, False)
    assert checkpoint.second_moments.slots["embedding/output"]["v"].shape == (32128, 8)
    assert all(np.isfinite(tensor.read()).all() for tensor in checkpoint.tensors.values())
