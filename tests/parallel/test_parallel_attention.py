"""Attention over a mesh is attention: output and all gradients against the dense float64 reference."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from t5x_domain.kernels.mask import BIDIRECTIONAL, CAUSAL, Mask
from t5x_domain.parallel.attention import attention, attention_plan
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.parallel.sharding import use_mesh
from tests.kernels.attention_cases import check, examples, leading, make, segments

MESHES = (
    {"data": 2, "sequence": 4},
    {"data": 1, "sequence": 8},
    {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2},
    {"data": 1, "sequence": 2, "tensor": 4},  # more devices than key heads
    {"data": 1, "tensor": 8},  # more devices than query heads: all compute all of them
)


def over(shape, sequence, backend="xla"):
    """`kernels.attention.attention` on a mesh."""
    mesh = MeshShape(**shape).build()

    def call(q, k, v, *, mask, relative_bias, segment_ids, prefix, scale, softcap):
        how = {"backend": backend, "sequence": sequence}
        with use_mesh(mesh):
            rule = {"mask": mask, "segment_ids": segment_ids, "prefix": prefix, "relative_bias": relative_bias}
            plan = attention_plan(q, k, **rule, **how)
            return attention(q, k, v, plan, relative_bias=relative_bias, scale=scale, softcap=softcap, **how)

    return call


@st.composite
def cases(draw):
    """What the mask and the bias must know of positions, at lengths that all meshes divide or that some do not."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    queries, cross = draw(st.sampled_from((16, 24, 17))), draw(st.booleans())
    keys = draw(st.sampled_from((16, 40, 9))) if cross else queries
    case = make(rng, 2, queries, keys, dim=4, mask=BIDIRECTIONAL, softcap=draw(st.sampled_from((None, 3.0))))
    if draw(st.booleans()):
        case.query_ids = segments(rng, 2, queries, 3)
        case.key_ids = segments(rng, 2, keys, 3) if cross else case.query_ids
    if not cross:
        window = draw(st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)))
        case.mask = Mask(draw(st.booleans()), window, draw(st.integers(0, 3)))
        if case.mask.causal and draw(st.booleans()):
            case.prefix = leading(rng, np.ones((2, queries), np.int32) if case.query_ids is None else case.query_ids)
        if draw(st.booleans()):
            case.table, case.bidirectional = rng.standard_normal((8, 4)), draw(st.booleans())
        else:
            case.alibi = draw(st.booleans())
    return case


@settings(max_examples=examples(12), deadline=None)
@given(case=cases(), shape=st.sampled_from(MESHES), sequence=st.sampled_from(("gather", "ring")))
def test_output_and_gradients_equal_the_dense_reference(case, shape, sequence):
    with jax.enable_x64(True):
        check(case, "float64", over(shape, sequence))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sequence", ["gather", "ring"])
def test_kernel_of_the_tpu(sequence, dtype):
    """Packed, with a bias, in four parts of 128 positions: blocks before, across and after the diagonal."""
    rng = np.random.default_rng(0)
    ids = segments(rng, 2, 512, 2)
    more = {"query_ids": ids, "key_ids": ids, "table": rng.standard_normal((8, 2)), "bidirectional": False}
    case = make(rng, 2, 512, 512, 2, 1, mask=CAUSAL, scale=0.5, **more)
    check(case, dtype, over({"data": 2, "sequence": 4}, sequence, "tpu_interpreted"))


def test_parts_that_the_tpu_cannot_align_are_not_split():
    case = make(np.random.default_rng(1), 1, 200, 200, 2, 1, mask=Mask(window=(50, 20)))
    check(case, attend=over({"data": 4, "sequence": 2}, "ring", "tpu_interpreted"))


def collectives(sequence):
    """What moves between devices in the compiled forward and backward pass."""
    mesh = MeshShape(data=1, sequence=8).build()
    place = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    x = jax.ShapeDtypeStruct((1, 64, 2, 8), jnp.float32, sharding=place)
    call = over({"data": 1, "sequence": 8}, sequence)
    rest = dict.fromkeys(("relative_bias", "segment_ids", "prefix", "softcap"))

    @jax.jit
    def both_passes(q, k, v, d_out):
        out, pull = jax.vjp(lambda q, k, v: call(q, k, v, mask=CAUSAL, scale=1.0, **rest), q, k, v)
        return jax.lax.with_sharding_constraint((out, *pull(d_out)), (place,) * 4)

    text = both_passes.lower(x, x, x, x).compile().as_text()
    return set(re.findall(r"\b(all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)\(", text))


def test_a_ring_gathers_no_keys():
    ring, gather = collectives("ring"), collectives("gather")
    assert "collective-permute" in ring and "all-gather" not in ring
    assert "collective-permute" not in gather and {"all-gather", "reduce-scatter"} <= gather


def test_a_plan_for_other_queries_is_refused():
    x = jnp.zeros((2, 16, 2, 4))
    with pytest.raises(ValueError, match=r"a plan for rows \(1, 8\) is not for queries \(2, 16, 2, 4\)"):
        attention(x, x, x, attention_plan(x[:, :8], x[:, :8], mask=CAUSAL))
