"""`python -m t5x_domain.convert` as users call it, in this process."""

import dataclasses
import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from small_models import CONFIG, all_bits, bits, golden, random_checkpoint, write_folder

from t5x_domain import convert
from t5x_domain.conversion import safetensors_files
from t5x_domain.conversion.formats import open_checkpoint, write_checkpoint
from t5x_domain.conversion.huggingface import open_huggingface
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary, train_sentencepiece
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder, EncoderOnly
from t5x_domain.models.config import ModelConfig


@pytest.fixture
def run(capsys):
    """Calls it with flags; returns what it prints, which is its error if it ends with status 2."""

    def call(source, target, to_format="native", *flags, fails=False):
        with pytest.raises(SystemExit) as ended:
            convert.main([f"--from={source}", f"--to={target}", f"--to_format={to_format}", *flags])
        out, err = capsys.readouterr()
        assert ended.value.code == (2 if fails else 0), out + err
        if fails:
            assert "Traceback" not in err
            assert not os.path.exists(target) or target == source
            return err.strip()
        assert err == ""
        return out

    return call


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """Not to be changed."""
    return write_folder(tmp_path_factory.mktemp("hf") / "t5", "t5_1_1")


def weights_of(folder):
    return {name: bits(array) for name, array in safetensors.numpy.load_file(f"{folder}/model.safetensors").items()}


@pytest.mark.parametrize("name", ["t5_1_0", "t5_1_1", "umt5", "t5_encoder", "llama"])
def test_there_and_back_to_the_bit(run, tmp_path, name):
    source = write_folder(tmp_path / "hf", name)
    out = run(source, tmp_path / "ours", "native")
    count = sum(array.size for array in golden(name)[1].values())
    assert f"{count:,} parameters" in out and "native, complete" in out
    run(tmp_path / "ours", tmp_path / "back", "huggingface")
    assert weights_of(tmp_path / "back") == weights_of(source)
    again = json.loads((tmp_path / "back" / "config.json").read_text())
    before = golden(name)[0]
    assert again["architectures"] == before["architectures"]
    same = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "feed_forward_proj", "layer_norm_epsilon")
    same += ("hidden_size", "num_key_value_heads", "rms_norm_eps", "head_dim")
    assert {key: again.get(key) for key in same} == {key: before.get(key) for key in same}
    assert open_huggingface(str(tmp_path / "back")).config == open_huggingface(source).config


def test_bfloat16(run, tmp_path, t5):
    run(t5, tmp_path / "ours", "native", "--dtype=bfloat16")
    run(tmp_path / "ours", tmp_path / "back", "huggingface")
    found = {
        name: tensor.read() for name, tensor in safetensors_files.open_file(tmp_path / "back/model.safetensors").items()
    }
    expected = {name: array.astype(ml_dtypes.bfloat16) for name, array in golden("t5_1_1")[1].items()}
    assert {name: bits(a) for name, a in found.items()} == {name: bits(a) for name, a in expected.items()}
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    run(tmp_path / "back", tmp_path / "wide", "huggingface", "--dtype=float32")
    wide = {name: bits(array.astype(np.float32)) for name, array in expected.items()}
    assert weights_of(tmp_path / "wide") == wide


def test_a_tokenizer_of_another_kind_can_be_left(run, tmp_path, t5):
    folder = shutil.copytree(t5, tmp_path / "hf")
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    assert "BPE" in run(folder, tmp_path / "x", fails=True)
    assert "no vocabulary" in run(folder, tmp_path / "x", "native", "--skip_tokenizer")
    assert open_checkpoint(str(tmp_path / "x")).vocabulary is None
    error = run(tmp_path / "x", tmp_path / "y", "native", "--skip_tokenizer", fails=True)
    assert "--skip_tokenizer is for Hugging Face folders" in error


def test_shards_both_ways(run, tmp_path, t5, monkeypatch):
    write = safetensors_files.write_folder
    monkeypatch.setattr(safetensors_files, "write_folder", lambda folder, tensors: write(folder, tensors, 4000))
    run(t5, tmp_path / "sharded", "huggingface")
    monkeypatch.undo()
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 3
    run(tmp_path / "sharded", tmp_path / "whole", "huggingface")
    assert weights_of(tmp_path / "whole") == weights_of(t5)


def broken_weights(name="t5_1_1", drop=(), **more):
    weights = {key: array for key, array in golden(name)[1].items() if key not in drop}
    return weights | more


def test_missing_and_left_over_tensors_are_listed(run, tmp_path):
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    weights = broken_weights(drop=[name], **{"classifier.weight": np.zeros((2, 16), np.float32)})
    error = run(write_folder(tmp_path / "hf", "t5_1_1", weights=weights), tmp_path / "x", fails=True)
    assert "missing: encoder/1/self_attention/inner/query/kernel" in error
    assert "left over: classifier.weight" in error


def test_a_long_list_is_said_by_ranges(run, tmp_path):
    weights = broken_weights(drop=[key for key in golden("t5_1_1")[1] if "decoder.block" in key])
    error = run(write_folder(tmp_path / "hf", "t5_1_1", weights=weights), tmp_path / "x", fails=True)
    assert "decoder/{0-2}/cross_attention/norm/scale" in error and len(error) < 1500


def test_tensors_of_another_shape(run, tmp_path):
    weights = broken_weights(**{"shared.weight": np.zeros((81, 16), np.float32)})
    error = run(write_folder(tmp_path / "hf", "t5_1_1", weights=weights), tmp_path / "x", fails=True)
    assert "of another shape: embedding/embedding (81, 16), not (80, 16)" in error


CONFIGS = {
    "{": "not JSON",
    "": "not JSON",
    '{"model_type": "bert"}': r"model_type = 'bert' is not converted; t5, mt5, umt5 and llama are",
    "{}": "model_type = None is not converted",
    '{"model_type": "t5"}': "has no 'num_layers'; it is not the configuration of a t5 model",
    '{"model_type": "llama"}': "has no 'num_attention_heads'",
    '{"model_type": ["t5"]}': "model_type = ['t5'] is not converted",
}


@pytest.mark.parametrize("content", CONFIGS)
def test_a_configuration_that_is_none(run, tmp_path, t5, content):
    folder = shutil.copytree(t5, tmp_path / "hf")
    (folder / "config.json").write_text(content)
    error = run(folder, tmp_path / "x", fails=True)
    assert str(folder / "config.json") in error and CONFIGS[content] in error


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_layers": -1}, "num_layers = -1"),
        ({"dropout_rate": 3}, "dropout_rate = 3"),
        ({"feed_forward_proj": 3}, "config.json"),
        ({"feed_forward_proj": "gated-swiglu"}, "feed_forward_proj = 'gated-swiglu'"),
        ({"architectures": ["T5ForTokenClassification"]}, "architectures = ['T5ForTokenClassification']"),
        ({"relative_attention_num_buckets": 0}, "relative_attention_num_buckets = 0"),
        ({"num_heads": 5}, "query/kernel (16, 24), not (16, 30)"),
        ({"num_decoder_layers": 4}, "missing: decoder/3/"),
        ({"num_layers": 1}, "left over: encoder.block.1."),
    ],
)
def test_values_that_no_t5_has(run, tmp_path, changes, said):
    folder = write_folder(tmp_path / "hf", "t5_1_1", **changes)
    assert said in run(folder, tmp_path / "x", fails=True)


WRONG_TYPES = [
    *(("t5_1_1", {key: value}) for key in ("num_layers", "vocab_size", "d_model") for value in ("2", 2.5, None, [2])),
    *(("t5_1_1", change) for change in ({"num_heads": 0}, {"d_kv": "6"}, {"layer_norm_epsilon": "small"})),
    *(("llama", change) for change in ({"num_attention_heads": 0}, {"hidden_size": "16"})),
]


@pytest.mark.parametrize("name, changes", WRONG_TYPES, ids=str)
def test_values_of_the_wrong_type(run, tmp_path, name, changes):
    error = run(write_folder(tmp_path / "hf", name, **changes), tmp_path / "x", fails=True)
    assert "config.json" in error and next(iter(changes)) in error


def test_a_configuration_that_is_a_list(run, tmp_path, t5):
    folder = shutil.copytree(t5, tmp_path / "hf")
    (folder / "config.json").write_text("[]")
    assert "config.json" in run(folder, tmp_path / "x", fails=True)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0}}, "rope_type = 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "rope_type = 'linear'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"num_key_value_heads": 3}, "num_kv_heads = 3"),
        ({"rope_parameters": [1]}, "a value of the wrong type"),
    ],
)
def test_llamas_that_are_not_converted(run, tmp_path, changes, said):
    folder = write_folder(tmp_path / "hf", "llama", **changes)
    error = run(folder, tmp_path / "x", fails=True)
    assert said in error


OTHER = {
    "embedding_dim": 4,
    "num_kv_heads": 1,
    "mlp_activations": ("gelu", "gelu"),
    "norm": "layernorm",
    "norm_unit_offset": True,
    "norm_placement": "pre_post",
    "embedding_norm": True,
    "relative_bias_per_layer": True,
    "layer_pattern": ("local", "global"),
    "decoder_layer_pattern": ("local",),
    "qk_norm": True,
    "attention_softcap": 50.0,
    "final_logit_softcap": 30.0,
    "scale_embedding": True,
    "scale_logits": True,
}
T5 = dataclasses.replace(CONFIG, num_decoder_layers=2)
LLAMA = dataclasses.replace(
    CONFIG,
    num_encoder_layers=0,
    position="rope",
    attention_scale="head_dim",
    mlp_activations=("silu", "linear"),
)
_ANY_LLAMA = ("num_kv_heads", "relative_bias_per_layer")
INEXPRESSIBLE = (
    [("T5", EncoderDecoder, T5, k, OTHER[k]) for k in OTHER if k != "relative_bias_per_layer"]
    + [("T5", EncoderDecoder, T5, "position", "rope"), ("T5", EncoderDecoder, T5, "position", "none")]
    + [("T5", EncoderDecoder, T5, "position", "alibi"), ("Llama", DecoderOnly, LLAMA, "position", "alibi")]
    + [("T5", EncoderDecoder, T5, "attention_scale", "head_dim"), ("T5", EncoderDecoder, T5, "tie_embeddings", True)]
    + [("T5", EncoderOnly, dataclasses.replace(T5, num_decoder_layers=0), "tie_embeddings", False)]
    + [("Llama", DecoderOnly, LLAMA, k, OTHER[k]) for k in OTHER if k not in _ANY_LLAMA]
    + [("Llama", DecoderOnly, LLAMA, "position", "relative_bias"), ("Llama", DecoderOnly, LLAMA, "position", "none")]
    + [("Llama", DecoderOnly, LLAMA, "attention_scale", "none")]
    + [("T5", EncoderDecoder, T5, k, v) for k, v in (("position", "learned"), ("norm_placement", "post"))]
)
# What both families express, or what does not change what a model computes.
EXPRESSIBLE = {"vocab_size", "embed_dim", "mlp_dim", "num_heads", "head_dim", "num_encoder_layers"}
EXPRESSIBLE |= {"num_decoder_layers", "norm_epsilon", "dropout_rate", "rope_base", *ModelConfig.HOW}
EXPRESSIBLE |= {"relative_bias_buckets", "relative_bias_max_distance", "relative_bias_per_layer"}
EXPRESSIBLE |= {"max_positions"}  # of learned positions, which `position` refuses for T5 and Llama
EXPRESSIBLE |= {"rtd_generator_width", "rtd_generator_layers", "rtd_embedding_sharing"}  # of pretraining alone
# Of local layers, which `layer_pattern` refuses.
EXPRESSIBLE |= {"rope_base_local", "local_window", "global_tokens", "global_blocks", "global_block_size"}


def test_every_setting_is_thought_of():
    named = {key for *_, key, _ in INEXPRESSIBLE}
    assert named | EXPRESSIBLE == {field.name for field in dataclasses.fields(ModelConfig)}


@pytest.mark.parametrize("family, model, config, key, value", INEXPRESSIBLE, ids=lambda v: str(v)[:20])
def test_what_transformers_cannot_compute_is_refused(run, tmp_path, family, model, config, key, value):
    checkpoint = random_checkpoint(model, dataclasses.replace(config, **{key: value}))
    write_checkpoint(checkpoint, str(tmp_path / "ours"), "native")
    error = run(tmp_path / "ours", tmp_path / "hf", "huggingface", fails=True)
    assert f"no Hugging Face {family} model computes what this one does" in error
    assert f"{key} = {value!r}" in error


@pytest.mark.parametrize("model, config", [(EncoderDecoder, T5), (DecoderOnly, LLAMA)])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_what_it_can_compute_comes_back(run, tmp_path, model, config, scan_layers):
    changes = {"norm_epsilon": 1e-5, "scan_layers": scan_layers}
    changes |= {"rope_base": 700.0, "num_kv_heads": 1} if model is DecoderOnly else {"relative_bias_max_distance": 50}
    before = random_checkpoint(model, dataclasses.replace(config, **changes))
    write_checkpoint(before, str(tmp_path / "ours"), "native")
    run(tmp_path / "ours", tmp_path / "hf", "huggingface")
    after = open_checkpoint(str(tmp_path / "hf"))
    assert all_bits(after) == all_bits(before)
    for key, value in changes.items():
        assert key == "scan_layers" or getattr(after.config, key) == value


def test_the_target_must_be_free(run, tmp_path, t5):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").write_text("precious")
    with pytest.raises(AssertionError):  # it is there, and stays
        run(t5, tmp_path / "x", fails=True)
    assert os.listdir(tmp_path / "x") == ["file"]
    assert "exists and is not empty" in run(t5, t5, fails=True)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--extra_ids=5"], "--extra_ids has no effect without --vocabulary"),
        (["--check_python=python3"], "--check_python has no effect without --check"),
        (["--init_embedding=mean"], "--init_embedding has no effect without --new_vocabulary or"),
        (["--vocab_multiple=0"], "--vocab_multiple=0: it must be at least 1"),
        (["--new_extra_ids=-1"], "--new_extra_ids=-1: it must be at least 0"),
        (["--vocabulary=bytes"], "is huggingface, which says all of its model itself"),
        (["--skip_optimizer"], "is huggingface, which says all of its model itself"),
        (["--gin.ModelConfig.num_heads=3"], "is huggingface, which says all of its model itself"),
        (["--gin_file=a.gin"], "is huggingface, which says all of its model itself"),
        (["--new_vocabulary=bytes"], "does not say its vocabulary"),
        (["--new_extra_ids=0"], "does not say its vocabulary"),
        (["--check", "--dtype=bfloat16"], "--check compares the result with --from, but another dtype"),
        (
            ["--check", "--vocab_multiple=8"],
            "--check compares the result with --from, but another dtype, vocabulary or decoder",
        ),
        (["--check", "--check_python=/no/python"], "install torch and transformers there, or name an interpreter"),
        (["--check", "--check_python=/bin/false"], "install torch and transformers there, or name an interpreter"),
        (["--from_format=t5x"], "hf"),
        (["--from_format=native"], "no complete checkpoint there"),
    ],
)
def test_flags_that_do_not_go_together(run, tmp_path, t5, flags, said):
    assert said in run(t5, tmp_path / "x", "native", *flags, fails=True)


def test_a_check_needs_a_side_that_transformers_runs(run, tmp_path, t5):
    run(t5, tmp_path / "ours")
    error = run(tmp_path / "ours", tmp_path / "x", "native", "--check", fails=True)
    assert "neither native nor native runs there; convert to huggingface with --check" in error


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda folder: folder.rmdir(), "there is no such folder; download a model of a hub first"),
        (lambda folder: (folder.rmdir(), folder.write_text("x")), "a file; give the folder"),
        (lambda folder: (folder / "notes.txt").write_text(""), "no model there; give a run"),
        (lambda folder: (folder / "model.safetensors").write_text(""), "but no config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "neither model.safetensors"),
    ],
)
def test_a_source_that_is_no_model(run, tmp_path, make, said):
    folder = tmp_path / "source"
    folder.mkdir()
    make(folder)
    error = run(folder, tmp_path / "x", fails=True)
    assert said in error and str(folder) in error


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    file = str(tmp_path_factory.mktemp("words") / "words.model")
    train_sentencepiece(["heart liver kidney " * 9] * 20, file, 274)
    return Vocabulary(file, extra_ids=4)


def with_words(folder, words, rows):
    checkpoint = random_checkpoint(EncoderDecoder, dataclasses.replace(CONFIG, vocab_size=rows), vocabulary=words)
    write_checkpoint(checkpoint, str(folder), "native")
    return checkpoint


def test_a_vocabulary_larger_than_the_embedding(run, tmp_path, words):
    folder = tmp_path / "hf"
    config = dataclasses.replace(CONFIG, vocab_size=278)
    write_checkpoint(random_checkpoint(EncoderDecoder, config, vocabulary=words), str(folder), "huggingface")
    content = json.loads((folder / "config.json").read_text())
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    for name in ("shared.weight", "lm_head.weight"):
        weights[name] = weights[name][:270]
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(content | {"vocab_size": 270}))
    error = run(folder, tmp_path / "x", fails=True)
    assert "the vocabulary has 278 ids but the embedding only 270 rows" in error


def test_sentinels_are_taken_away(run, tmp_path, words):
    """`--new_extra_ids=0` is a number like others. 274 pieces, 278 rows: the number of rows stays."""
    before = with_words(tmp_path / "ours", words, 278)
    run(tmp_path / "ours", tmp_path / "none", "native", "--new_extra_ids=0")
    after = open_checkpoint(str(tmp_path / "none"))
    assert (after.vocabulary.extra_ids, after.vocabulary.vocab_size, after.config.vocab_size) == (0, 274, 278)
    name = "embedding/embedding"
    np.testing.assert_array_equal(after.tensors[name].read()[:274], before.tensors[name].read()[:274])


def test_more_rows_and_mode_tokens(run, tmp_path, words):
    """274 pieces, 2 mode tokens and 6 sentinels: 282 ids, so 288 rows with a multiple of 32."""
    before = with_words(tmp_path / "ours", words, 278)
    flags = ("--mode_tokens=[NLU],[S2S]", "--new_extra_ids=6", "--vocab_multiple=32")
    out = run(tmp_path / "ours", tmp_path / "hf", "huggingface", *flags)
    assert "Embedding fitted to a vocabulary of 282 ids" in out
    after = open_checkpoint(str(tmp_path / "hf"))
    assert after.config.vocab_size == 288 and after.vocabulary.vocab_size == 282
    for name in ("embedding/embedding", "embedding/output"):
        old, new = before.tensors[name].read(), after.tensors[name].read()
        assert new.shape == (288, 8)
        np.testing.assert_array_equal(new[:274], old[:274])
        np.testing.assert_array_equal(new[281 - np.arange(4)], old[277 - np.arange(4)])  # sentinels 0 to 3
    assert not any("vocabulary.model" in files for _, _, files in os.walk(tmp_path / "hf"))


def test_a_new_vocabulary(run, tmp_path, words):
    with_words(tmp_path / "ours", words, 300)
    run(tmp_path / "ours", tmp_path / "bytes", "native", "--new_vocabulary=bytes", "--init_embedding=random")
    after = open_checkpoint(str(tmp_path / "bytes"))
    assert after.vocabulary == ByteVocabulary(4) and after.config.vocab_size == 259 + 4
    error = run(tmp_path / "ours", tmp_path / "x", "native", "--new_vocabulary=/no/such.model", fails=True)
    assert "--new_vocabulary=/no/such.model: there is no such file" in error
    error = run(tmp_path / "bytes", tmp_path / "x", "native", "--mode_tokens=[NLU]", fails=True)
    assert "--mode_tokens: a vocabulary of bytes has no room" in error
