"""Run.init_longer: a model of short texts reads long ones (Longformer: Beltagy et al. 2020, section 5)."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_models import random_checkpoint
from tiny import CONFIG, blueprint, mesh

from t5x_domain.conversion.formats import write_checkpoint
from t5x_domain.conversion.layout import leaves
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import EncoderOnly
from t5x_domain.models.names import path_name
from t5x_domain.models.rtd import ReplacedTokenDetection
from t5x_domain.training.checkpoint import Checkpoints
from t5x_domain.training.initial import restore_params, starting_state
from t5x_domain.training.optimizer import AdamW, Updates
from t5x_domain.training.run import Run
from t5x_domain.training.schedule import constant

SHORT = dataclasses.replace(
    CONFIG,
    num_encoder_layers=1,
    num_decoder_layers=0,
    position="learned",
    max_positions=6,
    tie_embeddings=True,
    rtd_generator_width=0.5,
)
LONG = dataclasses.replace(SHORT, max_positions=16, layer_pattern=("local",), local_window=4)


@pytest.mark.parametrize("model", [EncoderOnly, ReplacedTokenDetection])
@pytest.mark.parametrize("shape", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_positions_are_repeated(model, shape):
    """16 of 6: two times all and the first four; everything else as it was, on any mesh."""
    short = random_checkpoint(model, SHORT)
    plan = blueprint(mesh(**shape), model, LONG)
    found, left, _ = restore_params(short, plan, init_longer=True)
    tables = [name for name in found if name.endswith("embedding/positions")]
    assert left == [] and len(tables) == (2 if model is ReplacedTokenDetection else 1)
    targets = {path_name(p): a for p, a in jax.tree_util.tree_flatten_with_path(plan.abstract_params)[0]}
    for leaf in leaves(model, LONG):
        value, stored = found[leaf.name], short.tensors[leaf.parts[0]].read()
        expected = np.concatenate([stored] * 3)[:16] if leaf.name in tables else stored
        np.testing.assert_array_equal(value[0] if leaf.stacked else value, expected)
        assert value.sharding.is_equivalent_to(targets[leaf.name].sharding, value.ndim)


def test_a_run_starts_so(tmp_path, capsys):
    """From the encoder of replaced-token detection, without its generator."""
    write_checkpoint(random_checkpoint(ReplacedTokenDetection, SHORT), str(tmp_path / "short"), "native")
    config = dataclasses.replace(LONG, rtd_generator_width=1.0)
    plan, checkpoints = blueprint(None, EncoderOnly, config), Checkpoints(tmp_path / "run")
    run = SimpleNamespace(
        init_from=str(tmp_path / "short"),
        config=config,
        vocabulary=ByteVocabulary(100),
        init_embedding=None,
        init_longer=True,
        init_optimizer=False,
        seed=5,
    )
    state, _ = starting_state(run, plan, Updates(AdamW(), constant(0.1)).build(plan.axes), checkpoints)
    table = np.asarray(state.params["embedding"]["positions"])
    np.testing.assert_array_equal(table[6:], np.concatenate([table[:6], table[:4]]))
    assert "the 6 positions of" in capsys.readouterr().out


def test_without_it_all_has_to_be_the_same():
    short, plan = random_checkpoint(EncoderOnly, SHORT), blueprint(None, EncoderOnly, LONG)
    with pytest.raises(UserError, match=r"max_positions is 6 there and 16 in this run.*Run.init_longer"):
        restore_params(short, plan)


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({}, {"norm_epsilon": 1e-5}, r"norm_epsilon is 1e-06 there and 1e-05 in this run. Use its configuration\."),
        ({"max_positions": 20}, {}, r"has 20 positions, more than ModelConfig.max_positions"),
        ({"position": "none"}, {}, r"position is 'none' there and 'learned' in this run. Use its configuration\."),
    ],
)
def test_what_it_does_not_mend(theirs, ours, message):
    short = random_checkpoint(EncoderOnly, dataclasses.replace(SHORT, **theirs))
    plan = blueprint(None, EncoderOnly, dataclasses.replace(LONG, **ours))
    with pytest.raises(UserError, match=message):
        restore_params(short, plan, init_longer=True)


@pytest.mark.parametrize("position", ["relative_bias", "rope", "alibi"])
def test_other_positions_need_no_more_of_them(position):
    """What the layers see changes, no parameter does; without being told to, that is refused."""
    short = random_checkpoint(EncoderOnly, dataclasses.replace(SHORT, position=position))
    plan = blueprint(None, EncoderOnly, dataclasses.replace(LONG, position=position, max_positions=6, global_tokens=1))
    with pytest.raises(UserError, match="layer_pattern is .* go on with longer texts with --gin.Run.init_longer=True"):
        restore_params(short, plan)
    found, left, _ = restore_params(short, plan, init_longer=True)
    assert left == []
    for leaf in leaves(EncoderOnly, plan.config):
        value, stored = found[leaf.name], short.tensors[leaf.parts[0]].read()
        np.testing.assert_array_equal(value[0] if leaf.stacked else value, stored)


def test_it_needs_a_model_to_start_from():
    with pytest.raises(UserError, match="Run.init_longer is for a run that starts with a finished model"):
        Run("run", EncoderOnly, LONG, [], ByteVocabulary(100), "cache", {}, None, 1, 1, init_longer=True)
