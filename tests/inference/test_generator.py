"""What is written equals what transformers writes with the same weights, and does not depend on the batch."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from t5x_domain.conversion.check import rounding_bound
from t5x_domain.errors import UserError
from t5x_domain.inference.decoding import Decoding
from t5x_domain.inference.generator import Generator, row_length
from t5x_domain.inference.opened import Opened
from t5x_domain.models.assemblies import EncoderOnly
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.training.state import Blueprint
from tests.models.test_golden import GOLDEN, load

EXPECTED = json.loads((GOLDEN / "decoding.json").read_text())
MAX_TOKENS = EXPECTED["max_tokens"]


def opened(name: str, **facts) -> tuple[Opened, list[np.ndarray]]:
    """The golden model and its prompts."""
    case = EXPECTED["cases"][name]
    model, _, _ = load(name, scan_layers=False)
    vocabulary = SimpleNamespace(eos_id=case["eos_id"], vocab_size=model.config.vocab_size, decode=str)
    blueprint = Blueprint(type(model), model.config, MeshShape(data=1).build(jax.devices()[:1]))
    params = nnx.to_pure_dict(nnx.state(model))
    return Opened(name, blueprint, params, vocabulary, facts), [np.array(p, np.int32) for p in case["prompts"]]


def until_end(tokens: list[int], eos_id: int) -> list[int]:
    return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens


@pytest.mark.parametrize("name", EXPECTED["cases"])
def test_greedy_equals_transformers(name):
    model, prompts = opened(name)
    case = EXPECTED["cases"][name]
    outputs = Generator(model, Decoding(max_tokens=MAX_TOKENS), batch_size=4)(prompts)
    assert [list(o[0].tokens) for o in outputs] == [until_end(row, case["eos_id"]) for row in case["greedy"]]
    assert any(case["eos_id"] in row for row in case["greedy"])  # otherwise no end was put to the test


@pytest.mark.parametrize("name", EXPECTED["cases"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_beam_search_equals_transformers(name, number):
    model, prompts = opened(name)
    case = EXPECTED["cases"][name]
    wanted = case["beams"][number]
    decoding = Decoding(
        max_tokens=MAX_TOKENS,
        num_beams=wanted["num_beams"],
        num_outputs=wanted["num_beams"],
        length_penalty=wanted["length_penalty"],
    )
    outputs = Generator(model, decoding, batch_size=4)(prompts)
    for output, tokens, scores in zip(outputs, wanted["tokens"], wanted["scores"], strict=True):
        assert [list(o.tokens) for o in output] == [until_end(row, case["eos_id"]) for row in tokens]
        # Every token adds the rounding of its logits; a score is their sum over a power of their number, at least 1.
        bound = MAX_TOKENS * rounding_bound(model.blueprint.config, 10.0)
        np.testing.assert_allclose([o.score for o in output], scores, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("t5_1_1", {"data": 2, "tensor": 2}), ("gemma3", {"data": 1})],
)
def test_the_tpus_kernels_write_the_same(name, shape):
    """Beams of an input, which share its memory, over a mesh; and a window."""
    model, prompts = opened(name)
    config = dataclasses.replace(model.blueprint.config, attention_backend="tpu_interpreted")
    mesh = MeshShape(**shape).build(jax.devices()[: math.prod(shape.values())])
    model = dataclasses.replace(model, blueprint=Blueprint(model.blueprint.model_class, config, mesh))
    case = EXPECTED["cases"][name]
    wanted, beams = (case["beams"][2]["tokens"], 2) if name == "t5_1_1" else ([[row] for row in case["greedy"]], 1)
    decoding = Decoding(max_tokens=MAX_TOKENS, num_beams=beams, num_outputs=beams, length_penalty=2.0)
    outputs = Generator(model, decoding, batch_size=4)(prompts)
    for output, tokens in zip(outputs, wanted, strict=True):
        assert [list(o.tokens) for o in output] == [until_end(row, case["eos_id"]) for row in tokens]


@pytest.mark.parametrize("name", ["t5_1_1", "gemma3"])
def test_what_is_written_does_not_depend_on_the_batch(name):
    model, prompts = opened(name)
    for how in ({}, {"num_beams": 3}, {"temperature": 1.5, "num_outputs": 2, "seed": 3}):
        decoding = Decoding(max_tokens=MAX_TOKENS, **how)
        together = Generator(model, decoding, batch_size=4)(prompts)
        alone = Generator(model, decoding, batch_size=1)
        for number, prompt in enumerate(prompts):
            (output,) = alone([prompt], first=number)
            assert [list(o.tokens) for o in output] == [list(o.tokens) for o in together[number]]


def test_a_prefix_lm_sees_its_whole_prompt():
    """The first token after a bidirectional prompt is that of the whole model run over the prompt with `prefix`."""
    model, prompts = opened("gemma2", prefix_lm=["prefix_lm"])
    (output,) = Generator(model, Decoding(max_tokens=1), batch_size=1)(prompts[:1])
    network = model.blueprint.merge(model.params)
    tokens = np.concatenate([[0], prompts[0]])[None].astype(np.int32)
    hidden = network(tokens, decoder_prefix=np.ones_like(tokens))
    causal = network(tokens)
    best = int(network.logits(hidden)[0, -1].argmax())
    assert list(output[0].tokens) == until_end([best], model.vocabulary.eos_id)
    assert np.abs(np.asarray(hidden - causal)).max() > 1e-2  # the prompt's direction matters to this model


def with_alibi(model: Opened) -> Opened:
    """The same weights under another bias."""
    config = dataclasses.replace(model.blueprint.config, position="alibi")
    params = {name: dict(part) for name, part in model.params.items()}
    for stack in ("encoder", "decoder"):
        del params[stack]["relative_bias"]
    blueprint = Blueprint(model.blueprint.model_class, config, model.blueprint.mesh)
    return dataclasses.replace(model, blueprint=blueprint, params=params)


@pytest.mark.parametrize("change", [lambda model: model, with_alibi])
def test_greedy_score_is_the_models_log_probability(change):
    model, prompts = opened("t5_1_1")
    model = change(model)
    (output,) = Generator(model, Decoding(max_tokens=MAX_TOKENS, length_penalty=0.0), batch_size=1)(prompts[:1])
    tokens = [*output[0].tokens, model.vocabulary.eos_id][:MAX_TOKENS]
    network = model.blueprint.merge(model.params)
    shifted = np.array([[0, *tokens[:-1]]], np.int32)
    logits = network.logits(network(prompts[0][None], shifted))[0]
    expected = jax.nn.log_softmax(logits)[np.arange(len(tokens)), np.array(tokens)].sum()
    assert output[0].score == pytest.approx(float(expected), abs=MAX_TOKENS * rounding_bound(network.config, 10.0))


def test_ids_without_a_token_are_never_written():
    model, prompts = opened("t5_1_1")
    short = dataclasses.replace(model, vocabulary=SimpleNamespace(eos_id=1, vocab_size=40, decode=str))
    for how in ({}, {"num_beams": 3}, {"temperature": 3.0}):
        outputs = Generator(short, Decoding(max_tokens=MAX_TOKENS, **how), batch_size=4)(prompts)
        assert max(max(o[0].tokens, default=0) for o in outputs) < 40
    assert max(max(row) for row in EXPECTED["cases"]["t5_1_1"]["greedy"]) >= 40  # it would have written some


def test_row_lengths_are_few():
    lengths = [row_length([np.zeros(n, np.int32)]) for n in range(1, 600)]
    assert sorted(set(lengths)) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768]
    assert all(n <= length for n, length in enumerate(lengths, 1))


def test_an_encoder_cannot_write():
    model, _ = opened("t5_1_1")
    encoder = dataclasses.replace(model.blueprint, model_class=EncoderOnly)
    with pytest.raises(UserError, match="EncoderOnly has no decoder"):
        Generator(dataclasses.replace(model, blueprint=encoder), Decoding())


def test_no_inputs_no_outputs():
    model, _ = opened("t5_1_1")
    assert Generator(model, Decoding())([]) == []
