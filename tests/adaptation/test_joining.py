"""Encoders that get a decoder."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import random_checkpoint

from t5x_domain import convert
from t5x_domain.adaptation.finetune_config import FineTuning
from t5x_domain.adaptation.finetuning import finetune
from t5x_domain.adaptation.joining import with_decoder, with_new_decoder
from t5x_domain.conversion.formats import open_checkpoint, write_checkpoint
from t5x_domain.data.labelled import LabelledTask
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.inference.decoding import Decoding
from t5x_domain.models.assemblies import EncoderDecoder, EncoderOnly
from t5x_domain.models.config import ModelConfig
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.training.initial import restore_params
from t5x_domain.training.optimizer import AdamW, Updates
from t5x_domain.training.schedule import constant
from t5x_domain.training.state import Blueprint

BYTES = ByteVocabulary(8)
SIZES = {"vocab_size": BYTES.vocab_size, "embed_dim": 16, "mlp_dim": 24, "num_heads": 2, "head_dim": 8}
LONG = ModelConfig(
    **SIZES,
    num_encoder_layers=5,
    num_decoder_layers=0,
    layer_pattern=("local", "local", "global"),
    local_window=3,
    tie_embeddings=True,
    dtype="float32",
)
WRITER = dataclasses.replace(LONG, num_encoder_layers=2, num_decoder_layers=2, layer_pattern=("global",))


def encoder(**changes):
    return dataclasses.replace(random_checkpoint(EncoderOnly, dataclasses.replace(LONG, **changes)), vocabulary=BYTES)


def writer(**changes):
    made = random_checkpoint(EncoderDecoder, dataclasses.replace(WRITER, **changes))
    return dataclasses.replace(made, vocabulary=BYTES, origin="models/writer")


def built(checkpoint):
    """The model itself."""
    blueprint = Blueprint(checkpoint.model, checkpoint.config, MeshShape().build())
    found = restore_params(checkpoint, blueprint, include=[".*"], strict=True).params
    named = lambda path, _: found["/".join(str(key.key) for key in path)]  # noqa: E731
    return blueprint.merge(jax.tree_util.tree_map_with_path(named, blueprint.shapes))


def same(a, b):
    np.testing.assert_array_equal(a.read(), b.read())


def test_both_halves_compute_what_they_did():
    """The encoder's windows do not reach the decoder: each gives what it gave in its own model, bit for bit."""
    long, other = encoder(), writer(tie_embeddings=False)
    joined = with_decoder(long, other)
    assert joined.config.pattern(causal=False) == ("local", "local", "global")
    assert joined.config.pattern(causal=True) == ("global",)
    model, alone, theirs = built(joined), built(long), built(other)
    tokens = jnp.arange(1, 41).reshape(2, 20) % 200
    np.testing.assert_array_equal(model.encoder(model.embed(tokens)), alone(tokens))
    memory, written = alone(tokens), model.embed(tokens[:, :7])
    np.testing.assert_array_equal(model.decoder(written, memory=memory), theirs.decoder(written, memory=memory))
    np.testing.assert_array_equal(model.output_kernel, theirs.output_kernel)


def test_a_new_decoder_is_made_of_the_encoder():
    """Three of five layers: the first, the middle and the last. Cross-attention and the causal bias are new."""
    long = encoder()
    joined = with_new_decoder(long, 3, seed=1)
    for layer, source in enumerate((0, 2, 4)):
        for part in ("self_attention/inner/query/kernel", "self_attention/norm/scale", "mlp/inner/wo/kernel"):
            same(joined.tensors[f"decoder/{layer}/{part}"], long.tensors[f"encoder/{source}/{part}"])
    same(joined.tensors["decoder/norm/scale"], long.tensors["encoder/norm/scale"])
    cross = [joined.tensors[f"decoder/{i}/cross_attention/inner/key/kernel"].read() for i in range(3)]
    assert all(array.std() > 0 for array in cross) and not np.array_equal(cross[0], cross[1])
    bias = joined.tensors["decoder/relative_bias/table"]
    assert not np.array_equal(bias.read(), long.tensors["encoder/relative_bias/table"].read())
    again, other = with_new_decoder(long, 3, seed=1), with_new_decoder(long, 3, seed=2)
    same(again.tensors["decoder/relative_bias/table"], bias)
    assert not np.array_equal(other.tensors["decoder/relative_bias/table"].read(), bias.read())
    assert with_new_decoder(long, 1).facts["notes"][1].endswith("copies of the encoder's 0.")


@pytest.mark.parametrize(
    "decoder, said",
    [
        (lambda: writer(embed_dim=8), "ModelConfig.embed_dim is 8, not 16"),
        (lambda: writer(num_kv_heads=1), "ModelConfig.num_kv_heads is 1, not None"),
        (lambda: writer(layer_pattern=("local",), local_window=5), "5 positions wide"),
        (lambda: dataclasses.replace(writer(), vocabulary=ByteVocabulary(9)), "its vocabulary is not known"),
        (lambda: dataclasses.replace(writer(), vocabulary=None), "its vocabulary is not known"),
        (encoder, "it has to be an encoder-decoder"),
    ],
)
def test_decoders_that_do_not_fit(decoder, said):
    with pytest.raises(UserError, match="--decoder=") as error:
        with_decoder(encoder(), decoder())
    assert said in str(error.value)


def test_what_cannot_get_a_decoder():
    with pytest.raises(UserError, match="it has to be an encoder alone"):
        with_decoder(writer(), writer())
    for layers in (0, 6):
        with pytest.raises(UserError, match=f"--new_decoder_layers={layers}: give 1 to 5"):
            with_new_decoder(encoder(), layers)


def test_from_an_encoder_to_a_summariser(tmp_path, capsys):
    """`convert` joins, `finetune` learns to write from documents longer than the windows."""
    long = encoder(num_encoder_layers=2, layer_pattern=("local",))
    write_checkpoint(long, str(tmp_path / "long"), "native")
    write_checkpoint(writer(), str(tmp_path / "writer"), "native")
    flags = [f"--from={tmp_path / 'long'}", "--to_format=native"]

    def call(*more, code=0):
        with pytest.raises(SystemExit) as ended:
            convert.main([*flags, *more])
        assert ended.value.code == code
        return "".join(capsys.readouterr())

    assert "one of them" in call(f"--to={tmp_path / 'x'}", "--decoder=a", "--new_decoder_layers=1", code=2)
    assert "The decoder is that of writer" in call(f"--to={tmp_path / 'taken'}", f"--decoder={tmp_path / 'writer'}")
    assert "copies of the encoder's 0." in call(f"--to={tmp_path / 'made'}", "--new_decoder_layers=1")
    assert open_checkpoint(str(tmp_path / "taken")).config.decoder_layer_pattern == ("global",)

    file = tmp_path / "documents.jsonl"
    lines = [{"text": f"a{i} " * 20, "label": f"a{i}", "split": "train" if i < 6 else "test"} for i in range(8)]
    file.write_text("\n".join(map(json.dumps, lines)))
    task = LabelledTask(
        "summaries", dict.fromkeys(("train", "test"), str(file)), kind="text_to_text", split_field="split"
    )
    tuning = FineTuning(
        task,
        init_from=str(tmp_path / "made"),
        out_dir=str(tmp_path / "tuned"),
        updates=Updates(AdamW(), constant(1e-2)),
        steps=2,
        batch_size=2,
        lengths={"inputs": 64, "targets": 8},
        decoding=Decoding(max_tokens=4),
    )
    assert finetune(tuning) == 0
    scores = json.loads((tmp_path / "tuned/seed_0/scores.json").read_text())["test"]
    assert set(scores) == {"exact_match", "token_f1"}
    tuned = open_checkpoint(str(tmp_path / "tuned/seed_0/model"))
    assert tuned.config.pattern(causal=False) == ("local",)
    assert tuned.config.pattern(causal=True) == ("global",)
