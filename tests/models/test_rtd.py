import dataclasses

import jax
import numpy as np
import pytest
from tiny import CONFIG, blueprint, masked_batch, mesh

from t5x_domain.errors import UserError
from t5x_domain.models.names import path_name
from t5x_domain.models.rtd import ReplacedTokenDetection, generator_config
from t5x_domain.objectives.rtd import replaced_token_detection_loss
from t5x_domain.training.checkpoint import Checkpoints
from t5x_domain.training.optimizer import AdamW, ParameterGroup, Updates
from t5x_domain.training.schedule import constant
from t5x_domain.training.step import make_train_step

ENCODER = dataclasses.replace(CONFIG, num_decoder_layers=0, tie_embeddings=True, scale_logits=True)


def shapes(**options):
    plan = blueprint(model=ReplacedTokenDetection, config=dataclasses.replace(ENCODER, **options))
    return {path_name(p): leaf.shape for p, leaf in jax.tree_util.tree_flatten_with_path(plan.shapes)[0]}


@pytest.mark.parametrize(
    ("size", "share", "wanted"),
    [
        ((256, 1024, 4), 0.25, (64, 256, 1)),
        ((768, 3072, 12), 0.3333, (256, 1024, 4)),
        ((1024, 4096, 16), 0.25, (256, 1024, 4)),
    ],
)
def test_generators_of_electra(size, share, wanted):
    """Clark et al. 2020: hidden size h times the share, feed-forward 4 h, max(1, h // 64) heads of 64."""
    names = ("embed_dim", "mlp_dim", "num_heads")
    config = dataclasses.replace(ENCODER, **dict(zip(names, size, strict=True)), head_dim=64, rtd_generator_width=share)
    made = generator_config(config)
    assert tuple(getattr(made, name) for name in names) == wanted
    assert (made.embedding_dim, made.num_encoder_layers) == (size[0], config.num_encoder_layers)


def test_which_tables_there_are():
    table, delta, own = "generator/embedding/embedding", "embedding_delta", "embedding/embedding"
    wanted = {"none": {table, own}, "tied": {table}, "gdes": {table, delta}}
    for sharing, names in wanted.items():
        found = shapes(rtd_embedding_sharing=sharing, rtd_generator_width=0.5, embedding_dim=32)
        assert {name: found[name] for name in {table, delta, own} & set(found)} == dict.fromkeys(names, (512, 32))
        assert found["embedding/projection/kernel"] == (32, 64)  # none is needed where both are 32 wide
        assert "generator/embedding/projection/kernel" not in found


def test_a_shallow_generator():
    found = shapes(rtd_generator_layers=1)
    kernel = "layers/blocks/0/mlp/inner/wo/kernel"
    assert (found[f"encoder/{kernel}"], found[f"generator/encoder/{kernel}"]) == ((2, 128, 64), (1, 128, 64))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rtd_generator_layers": 3}, r"rtd_generator_layers = 3: .* larger .* at most 2"),
        ({"rtd_generator_width": 1.5}, r"rtd_generator_width = 1\.5: .* larger"),
        ({"rtd_generator_width": 0.0}, r"rtd_generator_width = 0\.0: .* more than 0"),
        ({"num_encoder_layers": 0, "num_decoder_layers": 2}, r"num_encoder_layers = 0: .* at least one"),
        ({"rtd_embedding_sharing": "some"}, r"rtd_embedding_sharing = 'some': choose one of none, tied, gdes"),
    ],
)
def test_refusals(options, named):
    with pytest.raises(UserError, match=named):
        shapes(**options)


@pytest.mark.parametrize("sharing", ["tied", "gdes"])
def test_sharing_survives_checkpoint_and_resume_to_the_bit(tmp_path, sharing):
    """Two steps, a checkpoint and a third are three steps, with all parameters in shares on 8 devices."""
    config = dataclasses.replace(ENCODER, rtd_embedding_sharing=sharing, rtd_generator_width=0.5, dropout_rate=0.1)
    plan = blueprint(mesh(data=1, fsdp=8), ReplacedTokenDetection, config)
    groups = {"^generator/": ParameterGroup(AdamW(), constant(1e-3))}
    transform = Updates(AdamW(), constant(2e-3), groups=groups).build(plan.axes)
    loss = lambda *args: replaced_token_detection_loss(*args, num_components=2)  # noqa: E731
    step = make_train_step(plan, loss, transform, seed=0)
    state = plan.init_state(plan.init(0), transform)
    for seed in range(2):
        state, _ = step(state, masked_batch(seed=seed))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, 2, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(plan.abstract_state(transform), 2)
    checkpoints.close()
    tables = [jax.device_get(plan.merge(s.params).table) for s in (state, restored)]
    shared = jax.device_get(restored.params["generator"]["embedding"]["embedding"])
    np.testing.assert_array_equal(*tables)
    # The discriminator's table is the generator's, and with the difference that it has learnt it is no longer.
    assert np.array_equal(tables[1], shared) == (sharing == "tied")
    if sharing == "gdes":
        np.testing.assert_array_equal(tables[1], shared + jax.device_get(restored.params["embedding_delta"]))
    ends = [jax.device_get(step(s, masked_batch(seed=2))[0]) for s in (state, restored)]
    jax.tree.map(np.testing.assert_array_equal, *ends)
