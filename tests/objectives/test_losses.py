import types

import jax
import jax.numpy as jnp
import pytest
from jaxpr_shapes import intermediate_shapes
from tiny import mesh

from t5x_domain.objectives.losses import target_scores
from t5x_domain.parallel.sharding import use_mesh

ROWS, LENGTH, WIDTH, VOCAB = 8, 2048, 4, 16


@pytest.mark.parametrize(
    ("shape", "chunk"), [({}, 128), ({"data": 2, "fsdp": 4}, 1024), ({"data": 2, "tensor": 4}, 256)]
)
def test_chunks_are_of_a_devices_own_tokens(shape, chunk):
    """1,024 tokens of a device are 1024 parts / 8 rows of positions. Otherwise a large mesh would gather the kernel and
    sum its gradient for a handful of tokens at a time."""
    model = types.SimpleNamespace(
        output_kernel=jnp.zeros((VOCAB, WIDTH)), logit_scale=1.0, config=types.SimpleNamespace(final_logit_softcap=None)
    )
    rows = jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), jnp.float32)
    targets, weights = (jax.ShapeDtypeStruct((ROWS, LENGTH), dtype) for dtype in (jnp.int32, jnp.float32))
    with use_mesh(mesh(**shape)):
        shapes = intermediate_shapes(lambda *arrays: target_scores(model, *arrays)[0], rows, targets, weights)
    assert {found[1] for found in shapes if len(found) == 3 and found[2] == VOCAB} == {chunk}
