import dataclasses
import functools

import jax
import numpy as np
import pytest
from small_models import CONFIG, SHAPE, all_bits, bits, random_checkpoint

from t5x_domain.conversion.checkpoint import SecondMoments
from t5x_domain.conversion.formats import write_checkpoint
from t5x_domain.conversion.huggingface import open_huggingface, require_exportable
from t5x_domain.conversion.native import open_native, write_native
from t5x_domain.conversion.rtd import discriminator, remaining_model
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import EncoderDecoder, EncoderOnly
from t5x_domain.models.heads import head
from t5x_domain.models.names import path_name
from t5x_domain.models.rtd import DetectingEncoderDecoder, ReplacedTokenDetection
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.training.initial import restore_params
from t5x_domain.training.state import Blueprint

CONFIG = dataclasses.replace(CONFIG, num_decoder_layers=0, embedding_dim=4, rtd_generator_layers=1)
SHARINGS = ("none", "tied", "gdes")


def blueprint(model, config):
    return Blueprint(model, config, MeshShape().build(jax.devices()[:1]))


def trained(sharing):
    return random_checkpoint(ReplacedTokenDetection, dataclasses.replace(CONFIG, rtd_embedding_sharing=sharing))


def restored(checkpoint, model, config, **options):
    """The model with what it takes from a checkpoint; the rest is random."""
    plan = blueprint(model, config)
    found = restore_params(checkpoint, plan, **options).params
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: found.get(path_name(path), leaf), plan.init(0))
    return plan.merge(params)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_the_encoder_computes_what_the_discriminator_did(sharing):
    checkpoint = trained(sharing)
    encoder = discriminator(checkpoint).checked()  # every parameter of an EncoderOnly, and no other
    assert encoder.model is EncoderOnly
    tokens = np.random.default_rng(0).integers(1, SHAPE["vocab_size"], (2, 6)).astype(np.int32)
    models = [restored(c, c.model, c.config) for c in (checkpoint, encoder)]
    outputs = [np.asarray(jax.jit(lambda tokens, model=model: model(tokens))(tokens)) for model in models]
    np.testing.assert_array_equal(*outputs)
    table = encoder.tensors["embedding/embedding"]
    np.testing.assert_array_equal(table.read(), models[0].table)  # materialised to the bit
    assert bits(table.read((slice(3, 5),))) == bits(table.read()[3:5])


@pytest.mark.parametrize(
    ("sharing", "tie"),
    [
        ("none", False),
        ("tied", True),
        ("gdes", False),
        ("gdes", True),
    ],
)
def test_the_encoder_decoder_computes_what_the_detector_did(sharing, tie):
    config = dataclasses.replace(CONFIG, num_decoder_layers=2, rtd_embedding_sharing=sharing, tie_embeddings=tie)
    checkpoint = random_checkpoint(DetectingEncoderDecoder, config)
    remaining = discriminator(checkpoint).checked()
    assert remaining.model is EncoderDecoder
    unset = {"rtd_generator_layers": None, "rtd_embedding_sharing": "gdes"}
    assert remaining.config == dataclasses.replace(config, **unset)
    tokens = np.random.default_rng(0).integers(1, SHAPE["vocab_size"], (2, 2, 6)).astype(np.int32)
    models = [restored(c, c.model, c.config) for c in (checkpoint, remaining)]
    outputs = [np.asarray(jax.jit(lambda model=model: model.logits(model(*tokens)))()) for model in models]
    np.testing.assert_array_equal(*outputs)


def test_nothing_of_the_pretraining_remains():
    checkpoint = dataclasses.replace(trained("gdes"), second_moments=SecondMoments(1, {}), facts={"step": 7})
    encoder = discriminator(checkpoint)
    assert encoder.config == dataclasses.replace(CONFIG, rtd_generator_layers=None, tie_embeddings=True)
    assert (encoder.second_moments, encoder.facts) == (None, {"step": 7})
    other = random_checkpoint(EncoderDecoder)
    assert discriminator(other) is other
    assert remaining_model(other.model, other.config) == (other.model, other.config)


def test_a_head_takes_the_encoder():
    checkpoint = trained("gdes")
    headed = restored(checkpoint, head("tagging", num_labels=3), CONFIG, strict=False)
    wanted = discriminator(checkpoint).tensors["embedding/embedding"].read()
    np.testing.assert_array_equal(headed.embedding.embedding[...], wanted)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_detector_begins_with_the_table_of_a_finished_model(sharing):
    config = dataclasses.replace(CONFIG, num_decoder_layers=2, rtd_embedding_sharing=sharing)
    finished = random_checkpoint(EncoderDecoder, config)
    model = restored(finished, DetectingEncoderDecoder, config, strict=False)
    np.testing.assert_array_equal(model.table, finished.tensors["embedding/embedding"].read())
    for name in ("encoder/norm/scale", "embedding/output"):
        part = functools.reduce(getattr, name.split("/"), model)
        np.testing.assert_array_equal(part[...], finished.tensors[name].read())


@pytest.mark.parametrize("sharing", SHARINGS)
def test_native_folder_keeps_both_models(tmp_path, sharing):
    checkpoint, folder = trained(sharing), tmp_path / "model"
    folder.mkdir()
    write_native(checkpoint, folder, home=str(folder))
    again = open_native(str(folder))
    assert (again.model, again.config) == (checkpoint.model, checkpoint.config)
    assert all_bits(again) == all_bits(checkpoint)


def test_a_run_goes_on_from_both_models_only_with_the_same_sharing():
    other = dataclasses.replace(CONFIG, rtd_embedding_sharing="tied")
    with pytest.raises(UserError, match="rtd_embedding_sharing is 'gdes' there and 'tied' in this run"):
        restore_params(trained("gdes"), blueprint(ReplacedTokenDetection, other))


def test_the_encoder_goes_to_hugging_face_and_back_to_the_bit(tmp_path):
    config = dataclasses.replace(CONFIG, embedding_dim=None)
    encoder = discriminator(random_checkpoint(ReplacedTokenDetection, config))
    write_checkpoint(encoder, str(tmp_path / "hf"), "huggingface")
    again = open_huggingface(str(tmp_path / "hf"))
    assert again.model is EncoderOnly
    assert all_bits(again) == all_bits(encoder)


def test_a_narrow_embedding_is_no_model_of_hugging_face():
    with pytest.raises(UserError, match=r"no Hugging Face T5 model .* ModelConfig\.embedding_dim = 4 \(not None\)"):
        require_exportable(*remaining_model(ReplacedTokenDetection, CONFIG), None)
