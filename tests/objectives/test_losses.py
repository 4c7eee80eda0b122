import types

import jax
import jax.numpy as jnp
import pytest
from jaxpr_shapes import intermediate_shapes
from tiny import mesh

from t5x_domain.objectives.losses import target_scores
from t5x_domain.parallel.sharding import use_mesh

ROWS, LENGTH, WIDTH, VOCAB = 8, 2048, 6, 16


@pytest.mark.parametrize(
    ("shape", "logits"),
    [({}, (8, 128, 16)), ({"data": 2, "fsdp": 4}, (1, 1024, 16)), ({"data": 2, "tensor": 4}, (4, 256, 4))],
    ids=["one device", "rows", "vocabulary"],
)
def test_chunks_are_of_1024_tokens_of_a_device(shape, logits):
    model = types.SimpleNamespace(
        output_kernel=jnp.zeros((VOCAB, WIDTH)), logit_scale=1.0, config=types.SimpleNamespace(final_logit_softcap=None)
    )
    rows = jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), jnp.float32)
    targets, weights = (jax.ShapeDtypeStruct((ROWS, LENGTH), dtype) for dtype in (jnp.int32, jnp.float32))
    with use_mesh(mesh(**shape)):
        shapes = intermediate_shapes(lambda *arrays: target_scores(model, *arrays)[0], rows, targets, weights)
    rows, _, vocab = logits
    assert {found for found in shapes if len(found) == 3 and found[::2] == (rows, vocab)} - {(1, 1, vocab)} == {logits}
