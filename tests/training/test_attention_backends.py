"""The assemblies train with the TPU's kernel, bound by gin, as they do with XLA's attention."""

import dataclasses

import gin
import numpy as np
import pytest
from tiny import CONFIG, LOSS, VOCAB, batch, blueprint, mesh

from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder, EncoderOnly
from t5x_domain.models.config import ModelConfig
from t5x_domain.training.optimizer import Adafactor, Updates
from t5x_domain.training.schedule import constant
from t5x_domain.training.step import make_train_step


def losses(model, backend, **more):
    """Of four steps over a mesh, each on its own batch."""
    gin.clear_config()
    bindings = dataclasses.asdict(CONFIG) | {"attention_backend": backend} | more
    gin.parse_config([f"ModelConfig.{name} = {value!r}" for name, value in bindings.items()])
    plan = blueprint(mesh(data=2, fsdp=2, tensor=2), model, ModelConfig())
    transform = Updates(Adafactor(), constant(0.01)).build(plan.axes)
    step, found = make_train_step(plan, LOSS, transform, seed=0), []
    state = plan.init_state(plan.init(0), transform)
    for seed in range(4):
        state, metrics = step(state, batch(16, 24, 24, seed))
        found.append(float(metrics["loss"]))
    return np.array(found)


# A loss is a mean of log-softmaxes, sums over the vocabulary in float32: off by at most VOCAB u each. What four updates
# make of the gradients' rounding is far below that, as they move a loss of 6.7 by about 0.1.
BOUND = VOCAB * 2.0**-24


@pytest.mark.parametrize("model", [EncoderDecoder, DecoderOnly, EncoderOnly])
def test_losses_agree_step_for_step(model):
    expected = losses(model, "xla")
    np.testing.assert_allclose(losses(model, "tpu_interpreted"), expected, rtol=BOUND)
    assert abs(losses(model, "xla", position="none") / expected - 1).max() > 2 * BOUND, "the bias is not seen"
