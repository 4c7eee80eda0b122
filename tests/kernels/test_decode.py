"""Attention to a cache, both backends, against attention in float64; and over a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from t5x_domain.errors import UserError
from t5x_domain.kernels.decode import KeysValues, decode_attention
from t5x_domain.kernels.tpu.decode import splits_for
from t5x_domain.parallel.attention import decode_attention as decode_attention_over_mesh
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.parallel.sharding import use_mesh

BACKENDS = ("xla", "tpu_interpreted")
BATCH = 4


def arrays(seed, *, queries=1, heads=4, kv_heads=2, length=200, dim=8, bias=True, new=True, dtype="float32"):
    """Arguments of `decode_attention` by name; row 0 sees none of the cache, row 1 all of it."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    start, stop = np.sort(rng.integers(0, length + 1, (2, BATCH, 1)), axis=0).astype(np.int32)
    start[:2], stop[0], stop[1] = 0, 0, length
    return {
        "q": draw(BATCH, queries, heads, dim),
        "past": KeysValues(draw(BATCH, kv_heads, length, dim), draw(BATCH, kv_heads, length, dim)),
        "new": KeysValues(draw(BATCH, kv_heads, 1, dim), draw(BATCH, kv_heads, 1, dim)) if new else None,
        "start": jnp.asarray(start),
        "stop": jnp.asarray(stop),
        "bias": jnp.asarray(rng.standard_normal((heads, length + 1)), jnp.float32) if bias else None,
    }


def reference(q, past, new, start, stop, bias, scale, softcap):
    """The output in float64, and by how much one in the arrays' dtype may differ from it."""
    eps, unit = float(jnp.finfo(q.dtype).eps) / 2, 2.0**-24
    q, past, new, bias = jax.tree.map(lambda a: np.asarray(a, np.float64), (q, past, new, bias))
    length = past.keys.shape[2]
    keys, values = past if new is None else map(np.concatenate, zip(past, new, strict=True), (2, 2))
    keys, values = (np.repeat(a, q.shape[2] // a.shape[1], axis=1) for a in (keys, values))
    position = np.arange(keys.shape[2])
    seen = (position >= start) & (position < stop) | (position == length)
    bias = np.zeros((q.shape[2], 1)) if bias is None else bias[:, : len(position)]
    logits = np.einsum("bqhd,bhsd->bhqs", q, keys) * scale + bias[:, None]
    # A sum of D products, and few operations after it, err by D + 16 units in the last place of the sum of their sizes;
    # the soft cap shrinks errors.
    sizes = np.einsum("bqhd,bhsd->bhqs", abs(q), abs(keys)) * scale + abs(bias)[:, None]
    error = (q.shape[3] + 16) * unit * sizes.max()
    logits = logits if softcap is None else np.tanh(logits / softcap) * softcap
    weights = np.where(seen[:, None, None], np.exp(logits - logits.max(axis=-1, keepdims=True)), 0)
    total = weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bhqs,bhsd->bqhd", weights / np.where(total > 0, total, 1), values)
    # Errors of logits shift weight between values, at most twice; sums over S in numerator and denominator; rounding of
    # the weights and of the result.
    return out, abs(values).max() * (2 * error + 2 * len(position) * unit + 2 * eps)


@settings(max_examples=examples(4), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    queries=st.sampled_from([1, 3]),
    length=st.sampled_from([20, 200]),
    bias=st.booleans(),
    new=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_both_backends_are_attention(seed, heads, queries, length, bias, new, softcap, dtype):
    new = new and queries == 1
    options = {"heads": heads[0], "kv_heads": heads[1], "queries": queries, "length": length, "bias": bias}
    given = arrays(seed, **options, new=new, dtype=dtype)
    expected, bound = reference(**given, scale=0.5, softcap=softcap)
    for backend in BACKENDS:
        attend = functools.partial(decode_attention, scale=0.5, softcap=softcap, backend=backend)
        found = jax.jit(lambda given, attend=attend: attend(**given))(given)
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=bound, err_msg=backend)
        assert new or not np.asarray(found[0]).any()  # the row that sees nothing


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "heads"),
    [({}, "tensor"), ({"kv_heads": 1}, None), ({"queries": 3, "new": False, "bias": False}, "tensor")],
)
def test_over_a_mesh(backend, options, heads):
    """With a cache of as many positions in every row, and one key head that two devices cannot share."""
    given = arrays(0, **options)
    given["stop"] = jnp.int32(150) if given["new"] is not None else given["stop"]
    attend = functools.partial(decode_attention_over_mesh, scale=0.5, backend=backend)
    expected, bound = reference(**given, scale=0.5, softcap=None)
    mesh = MeshShape(data=2, fsdp=2, tensor=2).build()
    with use_mesh(mesh):
        found = jax.jit(lambda given: attend(**given))(given)
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound)
    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, heads))
    assert found.sharding.is_equivalent_to(place, found.ndim)


@pytest.mark.parametrize(("batch", "splits"), [(1, 2), (3, 2), (8, 1)])
def test_two_cores_share_what_rows_do_not_divide(batch, splits):
    device = jax.sharding.AbstractDevice(device_kind="TPU v4", num_cores=2, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        assert splits_for(batch) == splits
    assert splits_for(batch) == 1  # the device of this test has one


def test_what_a_backend_cannot_do():
    with pytest.raises(UserError, match='backend="tpu" needs a TPU, but the device is a cpu'):
        decode_attention(**arrays(0), backend="tpu")
    with pytest.raises(UserError, match="takes head_dim up to 256, not 300"):
        decode_attention(**arrays(0, dim=300), backend="tpu_interpreted")
