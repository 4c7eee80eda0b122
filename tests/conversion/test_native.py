import dataclasses
import functools
import json
import shutil

import gin
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small_models import CONFIG, all_bits, bits, random_checkpoint

from t5x_domain import cli
from t5x_domain.conversion.checkpoint import SecondMoments
from t5x_domain.conversion.description import describe, read_description, write_gin
from t5x_domain.conversion.layout import leaves
from t5x_domain.conversion.native import find_params, open_native, write_native
from t5x_domain.conversion.tensors import Tensor
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary, train_sentencepiece
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder, EncoderOnly
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.names import path_name
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.training.checkpoint import Checkpoints
from t5x_domain.training.optimizer import Adafactor, Updates
from t5x_domain.training.schedule import constant
from t5x_domain.training.state import Blueprint

DECODER = dataclasses.replace(
    CONFIG, num_encoder_layers=0, layer_pattern=("local", "global"), position="rope", attention_softcap=2.5
)
MODELS = {
    "encoder_decoder": (EncoderDecoder, CONFIG),
    "unrolled": (EncoderDecoder, dataclasses.replace(CONFIG, scan_layers=False, tie_embeddings=True)),
    "pattern": (DecoderOnly, DECODER),
    "encoder": (EncoderOnly, dataclasses.replace(CONFIG, num_decoder_layers=0)),
}


def write(folder, checkpoint):
    folder.mkdir()
    write_native(checkpoint, folder, home=str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Not to be changed; `broken` is a copy."""
    folder = tmp_path_factory.mktemp("native") / "model"
    write(folder, random_checkpoint(EncoderDecoder))
    return folder


@pytest.fixture
def broken(written, tmp_path):
    return shutil.copytree(written, tmp_path / "model")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_written_and_read_to_the_bit(tmp_path, name, dtype):
    before = random_checkpoint(*MODELS[name], dtype, facts={"notes": ["made up"]})
    after = open_native(write(tmp_path / "m", before))
    assert all_bits(after) == all_bits(before)
    assert (after.model, after.config, after.facts) == (before.model, before.config, before.facts)
    assert after.vocabulary is None and after.second_moments is None


def test_zeros_are_written(tmp_path):
    """TensorStore leaves out a chunk of zeros unless it is told not to, and a missing chunk is an error when read."""
    before = random_checkpoint(EncoderDecoder)
    zeros = {name: Tensor.of(np.zeros(tensor.shape, np.float32)) for name, tensor in before.tensors.items()}
    after = open_native(write(tmp_path / "m", dataclasses.replace(before, tensors=zeros)))
    assert all(not tensor.read().any() for tensor in after.tensors.values())


def test_one_layer_in_memory_at_a_time(tmp_path):
    before, reading = random_checkpoint(EncoderDecoder), []

    def recorded(name, tensor):
        def read(index):
            reading.append(name)
            return tensor.read(index)

        return Tensor(tensor.shape, tensor.dtype, read)

    tensors = {name: recorded(name, tensor) for name, tensor in before.tensors.items()}
    folder = write(tmp_path / "m", dataclasses.replace(before, tensors=tensors))
    assert sorted(reading) == sorted(tensors)  # each once
    layer = open_native(folder).tensors["decoder/1/mlp/inner/wo/kernel"]
    np.testing.assert_array_equal(
        layer.read((slice(3, 7), slice(1, 2))), before.tensors["decoder/1/mlp/inner/wo/kernel"].read()[3:7, 1:2]
    )


@pytest.mark.parametrize("scan_layers, shape", [(True, {"data": 2, "fsdp": 2, "tensor": 2}), (False, {"data": 1})])
def test_a_run_is_read_layer_by_layer(tmp_path, scan_layers, shape):
    config = dataclasses.replace(CONFIG, num_decoder_layers=2, scan_layers=scan_layers)
    devices = jax.devices()[: np.prod(list(shape.values()))]
    plan = Blueprint(EncoderDecoder, config, MeshShape(**shape).build(devices))
    transform = Updates(Adafactor(min_dim_size_to_factor=16), constant(0.1)).build(plan.axes)
    state = plan.init_state(plan.init(3), transform)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 12):
        checkpoints.save(state, step, {"step": step})
    checkpoints.close()
    describe(tmp_path, EncoderDecoder, config, ByteVocabulary(extra_ids=7))
    (tmp_path / "run.json").write_text('{"Run.seed": 3}')
    with pytest.raises(UserError, match="the vocabulary has 266 ids but the embedding only 40 rows"):
        open_native(str(tmp_path))
    describe(tmp_path, EncoderDecoder, config, None)
    found = open_native(str(tmp_path))
    arrays = {path_name(path): np.asarray(a) for path, a in jax.tree_util.tree_flatten_with_path(state.params)[0]}
    for leaf in leaves(EncoderDecoder, config):
        for layer, part in enumerate(leaf.parts):
            expected = arrays[leaf.name][layer] if leaf.stacked else arrays[leaf.name]
            assert bits(found.tensors[part].read()) == bits(expected), part
            assert bits(found.tensors[part].read((slice(1, 3),))) == bits(expected[1:3]), part
    assert found.facts == {"step": 12, "run": {"Run.seed": 3}}
    assert open_native(str(tmp_path / "checkpoints" / "1")).facts["step"] == 1


def test_second_moments(tmp_path):
    slots = {
        "encoder/0/mlp/inner/wo/kernel": {"v_row": np.arange(3, dtype=np.float32), "v_col": np.ones(2, np.float32)},
        "decoder/norm/scale": {"v": np.full(8, 1e-30, np.float32)},
    }
    before = random_checkpoint(EncoderDecoder, second_moments=SecondMoments(1_000_000, slots))
    path = write(tmp_path / "m", before)
    after = open_native(path).second_moments
    assert after.step == 1_000_000
    assert after.slots.keys() == slots.keys()
    for name, arrays in slots.items():
        assert {slot: bits(a) for slot, a in after.slots[name].items()} == {s: bits(a) for s, a in arrays.items()}
    saved = tmp_path / "m" / "second_moments.npz"
    content = saved.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"x" * 100):
        saved.write_bytes(damaged)
        with pytest.raises(UserError, match="second_moments.npz: damaged"):
            open_native(path)


def configs_that_differ():
    """One value other than the default of every setting."""
    other = {
        "vocab_size": 77,
        "embedding_dim": 4,
        "num_kv_heads": 1,
        "mlp_activations": ("silu", "linear"),
        "norm": "layernorm",
        "norm_epsilon": 1e-05,
        "norm_placement": "pre_post",
        "position": "rope",
        "attention_scale": "head_dim",
        "layer_pattern": ("local", "local", "global"),
        "decoder_layer_pattern": ("local", "global"),
        "global_tokens": 2,
        "global_blocks": "transient",
        "attention_softcap": 50.0,
        "final_logit_softcap": 30.0,
        "dtype": "bfloat16",
        "remat": "minimal",
        "rtd_generator_layers": 1,
        "rtd_embedding_sharing": "tied",
        "attention_backend": "xla",
        "sequence_attention": "ring",
    }
    for field in dataclasses.fields(ModelConfig):
        value = getattr(CONFIG, field.name)
        if field.name not in other:
            other[field.name] = not value if isinstance(value, bool) else value / 2 if value > 1 else 0.25
            other[field.name] = type(value)(other[field.name])
    other["num_heads"] = 4
    assert all(getattr(CONFIG, key) != value for key, value in other.items())
    local = {"global_tokens": {"layer_pattern": ("local",)}, "global_blocks": {"layer_pattern": ("local",)}}  # needed
    return [CONFIG, *(dataclasses.replace(CONFIG, **{k: value}, **local.get(k, {})) for k, value in other.items())]


def test_model_gin_and_model_json_say_every_setting(tmp_path):
    for config in configs_that_differ():
        describe(tmp_path, EncoderDecoder, config, None)
        assert read_description(tmp_path)[:2] == (EncoderDecoder, config)
        write_gin(tmp_path, EncoderDecoder, config, None, home=str(tmp_path))
        cli.load_gin([str(tmp_path / "model.gin")], [])
        how = {key: getattr(ModelConfig, key) for key in ModelConfig.HOW}  # which the including file decides
        assert cli.build(gin.get_configurable(ModelConfig)) == dataclasses.replace(config, **how)
        assert gin.query_parameter("%MODEL").configurable.wrapped is EncoderDecoder


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_the_vocabulary_goes_with_the_model(tmp_path, kind, monkeypatch):
    vocabulary = ByteVocabulary(extra_ids=5)
    if kind == "sentencepiece":
        train_sentencepiece(["heart liver kidney " * 9] * 20, str(tmp_path / "words.model"), 274)
        vocabulary = Vocabulary(str(tmp_path / "words.model"), extra_ids=5)
    config = dataclasses.replace(CONFIG, vocab_size=300)
    monkeypatch.chdir(tmp_path)
    partial = tmp_path / "partial"
    partial.mkdir()
    write_native(random_checkpoint(EncoderDecoder, config, vocabulary=vocabulary), partial, home="final")
    partial.rename(tmp_path / "final")
    (tmp_path / "words.model").unlink(missing_ok=True)
    monkeypatch.chdir("/")
    found = open_native(str(tmp_path / "final")).vocabulary
    cli.load_gin([str(tmp_path / "final" / "model.gin")], [])
    included = cli.build(gin.query_parameter("%VOCABULARY").configurable.wrapper)
    assert type(included) is type(found) is type(vocabulary)
    for other in (found, included):
        assert (other.vocab_size, other.extra_ids) == (vocabulary.vocab_size, 5)
        np.testing.assert_array_equal(other.encode("heart <extra_id_3>"), vocabulary.encode("heart <extra_id_3>"))


def edited(folder, **changes):
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CONFIG_JSON = dataclasses.asdict(CONFIG)
DESCRIPTIONS = {
    "not JSON": lambda folder: (folder / "model.json").write_text("{"),
    "empty": lambda folder: (folder / "model.json").write_text(""),
    "a list": lambda folder: (folder / "model.json").write_text("[]"),
    "not UTF-8": lambda folder: (folder / "model.json").write_bytes(b'"\xff"'),
    "a folder": lambda folder: ((folder / "model.json").unlink(), (folder / "model.json").mkdir()),
    "no model": lambda folder: (folder / "model.json").write_text("{}"),
    "unknown model": lambda folder: edited(folder, model="Mamba"),
    "no model but a class": lambda folder: edited(folder, model="Stack"),
    "no configuration": lambda folder: edited(folder, config=None),
    "unknown setting": lambda folder: edited(folder, config=CONFIG_JSON | {"dropout": 1}),
    "impossible setting": lambda folder: edited(folder, config=CONFIG_JSON | {"norm": "batchnorm"}),
    "unknown vocabulary": lambda folder: edited(folder, vocabulary={"kind": "words", "extra_ids": 1}),
}


@pytest.mark.parametrize("damage", DESCRIPTIONS)
def test_a_damaged_description(broken, damage):
    DESCRIPTIONS[damage](broken)
    with pytest.raises(UserError, match=r"model/model.json: no description of a model \(.+\); restore that file"):
        open_native(str(broken))


def test_a_description_of_another_model(broken):
    edited(broken, config=CONFIG_JSON | {"mlp_dim": 13})
    with pytest.raises(UserError, match=r"of another shape: .*wi/0/kernel \(8, 12\), not \(8, 13\)"):
        open_native(str(broken))


def test_a_missing_description(broken):
    (broken / "model.json").unlink()
    with pytest.raises(UserError, match="no model.json beside the parameters.*restore"):
        open_native(str(broken))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves reads behind
@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt", "d"])
@pytest.mark.parametrize("cut", [True, False])
def test_damaged_parameters(broken, name, cut):
    path = broken / "params" / name
    path = next(path.iterdir()) if path.is_dir() else path
    path.write_bytes(path.read_bytes()[:40]) if cut else path.unlink()
    with pytest.raises(UserError, match="params: incomplete or damaged|params/_METADATA: cut short or damaged"):
        open_native(str(broken))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_array_that_lost_its_data(broken):
    for path in (broken / "params" / "ocdbt.process_0" / "d").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="damaged or missing, copy it anew: .*embedding"):
        found = open_native(str(broken))
        all_bits(found)


def test_arrays_in_files_of_their_own(broken):
    """As Orbax writes them without OCDBT: a file for each chunk, and a missing one is not taken for zeros."""
    params = {}
    before = random_checkpoint(EncoderDecoder)
    for leaf in leaves(EncoderDecoder, CONFIG):
        *parents, last = leaf.name.split("/")
        parts = [before.tensors[part].read() for part in leaf.parts]
        node = functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, params)
        node[last] = np.stack(parts) if leaf.stacked else parts[0]
    shutil.rmtree(broken / "params")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(broken / "params", params)
    assert all_bits(open_native(str(broken))) == all_bits(before)
    (broken / "params" / "decoder.norm.scale" / "0").unlink()
    with pytest.raises(UserError, match="damaged or missing, copy it anew: .*decoder.norm.scale"):
        all_bits(open_native(str(broken)))


def test_missing_parameters(tmp_path):
    smaller = dataclasses.replace(CONFIG, tie_embeddings=True)
    path = write(tmp_path / "m", random_checkpoint(EncoderDecoder, smaller))
    edited(tmp_path / "m", config=CONFIG_JSON)
    with pytest.raises(UserError, match="missing: embedding/output"):
        open_native(path)


def test_left_over_parameters(tmp_path):
    path = write(tmp_path / "m", random_checkpoint(EncoderDecoder))
    edited(tmp_path / "m", config=CONFIG_JSON | {"tie_embeddings": True})
    with pytest.raises(UserError, match="left over: embedding/output"):
        open_native(path)


def test_nothing_there(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(UserError, match=f"{path}: no complete checkpoint"):
            find_params(str(path))
