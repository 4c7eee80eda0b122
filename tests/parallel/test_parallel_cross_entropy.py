"""Cross-entropy over a mesh is cross-entropy: loss, scores and gradients of one device, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_domain.kernels import cross_entropy as kernels
from t5x_domain.parallel.cross_entropy import cross_entropy
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.parallel.sharding import sharding, use_mesh
from t5x_domain.planning.collectives import collectives
from t5x_domain.planning.hlo import Module

BATCH, LENGTH, VOCAB, WIDTH = 8, 12, 24, 16
OPTIONS = {"z_loss": 1e-2, "label_smoothing": 0.1, "logit_scale": 0.5, "softcap": 3.0}
# Both compute the same sums in another order, of at most 96 terms (all positions); a gradient depends on a chain of at
# most 16 of them. A row that is counted twice, or a part of the vocabulary left out, is off by 1/96 or more.
EXACT = 16 * 96 * 2.0**-53


def arrays(batch=BATCH, length=LENGTH, vocab=VOCAB, seed=0):
    """hidden, kernel, targets, weights with some zeros."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.1, 2, (batch, length)) * (rng.random((batch, length)) < 0.8)
    return (
        rng.standard_normal((batch, length, WIDTH)),
        rng.standard_normal((vocab, WIDTH)),
        rng.integers(0, vocab, (batch, length)).astype(np.int32),
        weights,
    )


def results(function, arrays, **options):
    """Loss, scores and both gradients of twice the loss; and of the loss alone, without."""

    def loss(hidden, kernel, targets, weights):
        value, scores = function(hidden, kernel, targets, weights, **OPTIONS, **options)
        return 2 * value, scores

    with_gradient = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*arrays)
    return jax.tree.map(np.asarray, (with_gradient, jax.jit(loss)(*arrays)))


FSDP, EVERY = {"data": 1, "fsdp": 2, "tensor": 4}, {"data": 2, "sequence": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ({"slice": 2, "data": 2, "fsdp": 2}, {}),
        ({"data": 1, "fsdp": 8}, {}),
        ({"data": 1, "fsdp": 2, "sequence": 4}, {}),
        (FSDP, {}),
        (EVERY, {}),
        (FSDP, {"batch": 3}),  # each device has all rows; their gradients are not to be added up
        (EVERY, {"length": 7}),
        (EVERY, {"vocab": 23}),
        (EVERY, {"batch": 3, "length": 7}),
    ],
    ids=str,
)
def test_it_is_that_of_one_device(shape, changes):
    with jax.enable_x64(True):
        given = arrays(**changes)
        wanted = results(functools.partial(kernels.cross_entropy, chunk_tokens=1000), given)
        with use_mesh(MeshShape(**shape).build()):
            got = results(functools.partial(cross_entropy, chunk_tokens=8), given)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert np.abs(a.astype(float) - b).max() <= EXACT * np.abs(b).max()


def test_the_kernel_is_gathered_once_and_its_gradient_summed_once():
    """However many chunks there are: four here. Each sends its maxima and sums over the vocabulary, and no more."""
    mesh = MeshShape(data=2, fsdp=2, tensor=2).build()
    shapes = (BATCH, LENGTH, WIDTH), (VOCAB, WIDTH), (BATCH, LENGTH), (BATCH, LENGTH)
    names = ("batch", "length", None), ("vocab", "embed"), ("batch", "length"), ("batch", "length")
    dtypes = jnp.bfloat16, jnp.float32, jnp.int32, jnp.float32
    places = [sharding(mesh, *pair) for pair in zip(shapes, names, strict=True)]

    def gradient(*arrays):
        with use_mesh(mesh):
            return jax.grad(lambda *arrays: cross_entropy(*arrays, chunk_tokens=6)[0], 1)(*arrays)

    given = map(jax.ShapeDtypeStruct, shapes, dtypes)
    compiled = jax.jit(gradient, in_shardings=places, out_shardings=places[1]).lower(*given).compile().as_text()
    assert "f32[2,3,12]" in compiled, "a chunk is of 2 rows and 3 positions, against half of the vocabulary"
    found = {c.kind: (c.count, c.bytes) for c in collectives(Module.of(compiled), 8)}
    part = 4 * VOCAB // 2 * WIDTH  # bytes in float32, as which CPUs send bfloat16, too
    assert found["all-gather"] == found["reduce-scatter"] == (1, part / 2)  # over fsdp
    assert found["all-reduce"] == (4 * 2 + 1, 4 * 2 * (4 * 2 * 3) + part / 2)  # over tensor; of half a part over data
