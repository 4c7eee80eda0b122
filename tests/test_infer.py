"""`infer` as a user runs it: files, interruptions, prompts and mistakes."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from small_models import random_checkpoint

from t5x_domain import infer
from t5x_domain.conversion.check import rounding_bound
from t5x_domain.conversion.formats import write_checkpoint
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.inference import generator as generator_module
from t5x_domain.inference.embedding import Embedder
from t5x_domain.inference.heads import Predictor, open_head
from t5x_domain.inference.interactive import converse, filled, with_blanks
from t5x_domain.inference.opened import open_model, unrolled
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder
from t5x_domain.models.config import ModelConfig
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.training.state import Blueprint

BYTES = ByteVocabulary(extra_ids=8)
SHAPE = {"vocab_size": BYTES.vocab_size, "embed_dim": 8, "mlp_dim": 12, "num_heads": 2, "head_dim": 4}
SHORT = "--gin.Decoding.max_tokens=6"
TEXTS = ["one", "two words", "a third line", "four"]


def mesh():
    return MeshShape(data=1).build(jax.devices()[:1])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An encoder-decoder whose layers are stacked, and a decoder alone."""
    folder = tmp_path_factory.mktemp("models")
    for name, kind, layers in (("both", EncoderDecoder, 2), ("decoder", DecoderOnly, 0)):
        config = ModelConfig(**SHAPE, dtype="float32", num_encoder_layers=layers, num_decoder_layers=2)
        checkpoint = random_checkpoint(kind, config, vocabulary=BYTES)
        write_checkpoint(checkpoint, str(folder / name), "native")
    return folder


@pytest.fixture
def asked(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    return file


def run(*flags) -> int:
    with pytest.raises(SystemExit) as exit_:
        infer.main([*map(str, flags)])
    return exit_.value.code


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_record_gets_its_answer(models, asked, tmp_path):
    out = tmp_path / "out.jsonl"
    assert run("--model", models / "both", "--input", asked, "--output", out, "--batch_size", 2, SHORT) == 0
    assert [(a["id"], a["text"]) for a in answers(out)] == list(enumerate(TEXTS))
    assert all(len(a["outputs"]) == 1 and isinstance(a["outputs"][0]["score"], float) for a in answers(out))
    assert not list(tmp_path.glob("*.partial"))


def test_an_interrupted_file_goes_on_to_the_same_answers(models, asked, tmp_path, monkeypatch):
    flags = ["--model", models / "both", "--input", asked, "--batch_size", 1, SHORT, "--gin.Decoding.temperature=1.0"]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    monkeypatch.setattr(infer, "_BATCHES_A_SAVE", 1)
    assert run(*flags, "--output", whole) == 0

    calls, answer = [], generator_module.Generator.__call__

    def stops(self, inputs, *, first=0, params=None):
        calls.append(first)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(self, inputs, first=first)

    monkeypatch.setattr(generator_module.Generator, "__call__", stops)
    assert run(*flags, "--output", out) == 130
    partial = tmp_path / "out.jsonl.partial"
    assert not out.exists() and len(partial.read_text().splitlines()) == 1 + 2
    partial.write_bytes(partial.read_bytes() + b'{"id": 2, "te')  # and a line was torn
    assert run(*flags, "--output", out) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert calls == [0, 1, 2, 2, 3]


def test_a_choice_is_made_by_probability(models, asked, tmp_path):
    out = tmp_path / "out.jsonl"
    assert run("--model", models / "decoder", "--input", asked, "--output", out, "--choices", "yes|no|perhaps") == 0
    for answer in answers(out):
        assert answer["choice"] == max(answer["scores"], key=answer["scores"].get)
        assert set(answer["scores"]) == {"yes", "no", "perhaps"}


def test_metadata_and_mode_stand_before_the_input(models, asked, tmp_path):
    plain, conditioned = tmp_path / "plain.jsonl", tmp_path / "conditioned.jsonl"
    flags = ["--model", models / "both", "--input", asked, "--choices", "yes|no"]
    assert run(*flags, "--output", plain) == 0
    assert run(*flags, "--output", conditioned, "--metadata", "Id: {id}\\n", "--mode", "[S2S]") == 0
    assert all(p["scores"] != c["scores"] for p, c in zip(answers(plain), answers(conditioned), strict=True))


def test_blanks_become_sentinels_and_are_filled(models):
    model = open_model(str(models / "both"))
    ids = with_blanks(model, ["The ", " of Paris"], np.zeros(0, np.int32))
    assert model.vocabulary.decode(ids) == "The <extra_id_0> of Paris"
    assert ids[-1] == model.vocabulary.eos_id
    written = np.concatenate([[model.vocabulary.sentinel_id(0)], model.vocabulary.encode(" city")])
    assert filled(model, ["The ", " of Paris"], written) == "The [city] of Paris"
    assert filled(model, ["The ", " of Paris"], written[:0]) == "The [] of Paris"


def test_the_prompt_answers_until_it_is_left(models):
    from t5x_domain.inference.decoding import Decoding
    from t5x_domain.inference.generator import Generator

    for name, says in (("both", ["x [", "hello"]), ("decoder", ["error: this model continues", "hello"])):
        model = open_model(str(models / name))
        generator = Generator(model, Decoding(max_tokens=4), batch_size=1)
        said = []
        converse(model, generator, np.zeros(0, np.int32), ["x ___ y", "", "hello", ":q", "never"], said.append)
        assert len(said) == 2
        assert said[0].startswith(says[0])
        assert name == "both" or said[1].startswith(says[1])


def test_a_model_is_opened_unrolled_with_all_its_parameters(models):
    model = open_model(str(models / "both"))
    assert not model.blueprint.config.scan_layers
    scanned = Blueprint(
        EncoderDecoder, ModelConfig(**SHAPE, dtype="float32", num_encoder_layers=2, num_decoder_layers=2), mesh()
    )
    stacked = scanned.init(0)
    blueprint, params = unrolled(scanned, stacked)
    assert jax.tree.structure(params) == jax.tree.structure(model.params)
    for layer, block in params["encoder"]["rest"]["blocks"].items():
        of_stack = jax.tree.map(lambda a: a[layer], stacked["encoder"]["layers"]["blocks"][0])  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, block, of_stack)
    tokens = np.array([[5, 9, 3]], np.int32)
    hidden = [model.merge(p)(tokens, tokens) for model, p in ((scanned, stacked), (blueprint, params))]
    # Another order of sums, in states of size 1.
    np.testing.assert_allclose(hidden[0], hidden[1], rtol=0, atol=rounding_bound(scanned.config, 1.0))


def test_parameters_stay_float32_whatever_the_products_are(models):
    model = open_model(str(models / "both"))
    again = open_model(str(models / "both"), dtype="bfloat16")
    assert again.blueprint.config.dtype == "bfloat16"
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(again.params), strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "give one of --input=FILE"),
        (["--input", "IN"], "--output=FILE is missing"),
        (["--input", "nothing.jsonl", "--output", "o"], "--input=nothing.jsonl: there is no such file"),
        (
            ["--input", "IN", "--output", "OUT", "--text_field", "body"],
            "line 1: there is no field 'body', only id, text; name",
        ),
        (["--input", "IN", "--output", "OUT", "--choices", "yes"], "at least two different answers"),
        (
            ["--input", "IN", "--output", "OUT", "--choices", "yes|no", SHORT],
            "Decoding.max_tokens is set, but nothing is written here",
        ),
        (
            ["--input", "IN", "--output", "OUT", "--embed", SHORT],
            "Decoding.max_tokens is set, but nothing is written here",
        ),
        (["--input", "IN", "--output", "OUT", "--metadata", "{date}"], "needs the fields date"),
        (["--input", "IN", "--output", "OUT", "--split", "test"], "--split has no effect without --seqio_task"),
        (["--interactive", "--output", "OUT"], "leave out --output"),
        (["--input", "IN", "--output", "OUT", "--gin.Decoding.top_k=3"], "Decoding.top_k has no effect"),
    ],
)
def test_mistakes_are_named(models, asked, tmp_path, capsys, flags, said):
    names = {"IN": asked, "OUT": tmp_path / "out.jsonl"}
    assert run("--model", models / "both", *(names.get(flag, flag) for flag in flags)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_answers_are_never_mixed(models, asked, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    flags = ["--model", models / "both", "--input", asked, "--output", out, "--choices", "yes|no"]
    assert run(*flags) == 0
    assert run(*flags) == 2
    assert "exists and is complete" in capsys.readouterr().err
    shutil.move(out, tmp_path / "kept")
    (tmp_path / "out.jsonl.partial").write_text(json.dumps({"asked": {"model": "another"}}) + "\n")
    assert run(*flags) == 2
    assert "holds answers to another question (model" in capsys.readouterr().err


def test_texts_are_embedded(models, asked, tmp_path):
    out = tmp_path / "out.jsonl"
    assert run("--model", models / "both", "--input", asked, "--output", out, "--embed") == 0
    found = np.array([answer["embedding"] for answer in answers(out)])
    np.testing.assert_array_equal(found, Embedder(open_model(str(models / "both")))(TEXTS))


@pytest.fixture
def headed(models, tmp_path):
    """A classifier of two labels, "long" and "short", as fine-tuning stores it."""
    shutil.copytree(models / "both", tmp_path / "headed")
    kernel = np.random.default_rng(0).standard_normal((SHAPE["embed_dim"], 2)).astype(np.float32)
    head = {"kernel": kernel, "bias": np.zeros(2, np.float32), "labels": np.array(["long", "short"])}
    np.savez(tmp_path / "headed/head.npz", kind="classification", length=16, **head)
    return tmp_path / "headed"


def test_a_model_with_a_head_answers_with_it(headed, asked, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    flags = ["--model", headed, "--input", asked, "--output", out]
    assert run(*flags) == 0
    assert [a["prediction"] for a in answers(out)] == Predictor(open_head(str(headed)))(TEXTS)
    for flag, said in ((("--choices", "a|b"), "--choices"), (("--mode", "[S2S]"), "--mode")):
        assert run(*flags, *flag) == 2
        assert f"{said} does not go with a model with head.npz" in capsys.readouterr().err


def test_inputs_are_made_as_in_fine_tuning(models, asked, tmp_path, capsys):
    model = random_checkpoint(
        EncoderDecoder,
        ModelConfig(**SHAPE, dtype="float32", num_encoder_layers=1, num_decoder_layers=1),
        vocabulary=BYTES,
    )
    tuned = dataclasses.replace(model, facts={"input_template": "item {id}: {text}"})
    write_checkpoint(tuned, str(tmp_path / "tuned"), "native")
    flags = ["--model", tmp_path / "tuned", "--choices", "yes|no"]
    assert run(*flags, "--input", asked, "--output", tmp_path / "found.jsonl") == 0
    assert "'item {id}: {text}'" in capsys.readouterr().out
    ready = tmp_path / "ready.jsonl"
    ready.write_text("".join(json.dumps({"body": f"item {i}: {text}"}) + "\n" for i, text in enumerate(TEXTS)))
    assert run(*flags, "--input", ready, "--text_field", "body", "--output", tmp_path / "expected.jsonl") == 0
    found, expected = (answers(tmp_path / f"{name}.jsonl") for name in ("found", "expected"))
    assert [answer["scores"] for answer in found] == [answer["scores"] for answer in expected]


def test_a_decoder_alone_embeds_nothing(models, asked, tmp_path, capsys):
    flags = ["--model", models / "decoder", "--input", asked, "--output", tmp_path / "out.jsonl", "--embed"]
    assert run(*flags) == 2
    assert "has no encoder to embed texts with" in capsys.readouterr().err
    assert run(*flags, "--metadata", "{id}") == 2
    assert "--metadata does not go with --embed; leave it out" in capsys.readouterr().err
