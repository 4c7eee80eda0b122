"""Attention of queries and keys with coordinates against the dense float64 reference, in chunks of any size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, check, examples, make, segments
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.kernels.attention_kernel import Part, attend_parts
from t5x_domain.kernels.mask import BIDIRECTIONAL
from t5x_domain.kernels.side_attention import SideAttention, SidePlace


@dataclasses.dataclass
class Beyond(Case):
    """Coordinates are positions; keys up to `hidden` away are not seen."""

    hidden: int = -1

    def allowed(self):
        """[B, Sq, Sk] bool."""
        distance = np.arange(self.k.shape[1])[None] - np.arange(self.q.shape[1])[:, None]
        return super().allowed() & (abs(distance) > self.hidden)

    def attend(self, chunk_size):
        """`SideAttention` with the arguments of `attention`."""

        def call(q, k, v, *, mask, relative_bias, segment_ids, prefix, scale, softcap):
            position = lambda a: jnp.broadcast_to(jnp.arange(a.shape[1], dtype=jnp.int32), a.shape[:2])  # noqa: E731
            ids = segment_ids or [jnp.ones(a.shape[:2], jnp.int32) for a in (q, k)]
            place = SidePlace(position(q), ids[0], position(k), ids[1], jnp.int32(self.hidden))
            kernel = SideAttention(scale, softcap, chunk_size)
            return attend_parts((kernel,), q, (Part(k, v, relative_bias, place),))

        return call


@st.composite
def cases(draw):
    """Everything that can be combined."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, kv_heads, groups, dim = (draw(st.sampled_from(a)) for a in ((1, 2), (1, 2), (1, 3), (2, 5)))
    queries, keys = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    case = make(rng, batch, queries, keys, kv_heads * groups, kv_heads, dim, mask=BIDIRECTIONAL)
    case = Beyond(**vars(case), hidden=draw(st.integers(-1, 4)))
    case.scale, case.softcap = draw(st.sampled_from((1.0, 0.5))), draw(st.sampled_from((None, 3.0)))
    if draw(st.booleans()):
        case.query_ids, case.key_ids = segments(rng, batch, queries, 2), segments(rng, batch, keys, 2)
    if draw(st.booleans()):
        case.table, case.bidirectional = rng.standard_normal((8, kv_heads * groups)), draw(st.booleans())
    else:
        case.alibi = draw(st.booleans())
    return case


@settings(max_examples=examples(8), deadline=None)
@given(case=cases(), chunk_size=st.sampled_from((1, 4, 7, None)), dtype=st.sampled_from(("float32", "float64")))
def test_output_and_gradients_equal_the_dense_reference(case, chunk_size, dtype):
    with jax.enable_x64(dtype == "float64"):
        check(case, dtype, case.attend(chunk_size))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_t5_packed(dtype):
    rng = np.random.default_rng(0)
    ids = segments(rng, 2, 40, 3)
    options = {"query_ids": ids, "key_ids": ids, "table": rng.standard_normal((8, 4)), "mask": BIDIRECTIONAL}
    case = Beyond(**vars(make(rng, **options)), hidden=3)
    check(case, dtype, case.attend(16))


def test_queries_that_see_no_key_give_zeros_and_pass_no_gradient():
    case = Beyond(**vars(make(np.random.default_rng(1), queries=5, keys=4, mask=BIDIRECTIONAL)), hidden=2)
    out, pull = jax.vjp(
        lambda *inputs: case.call(*inputs, None, case.attend(2)), *(jnp.float32(a) for a in (case.q, case.k, case.v))
    )
    dq, dk, dv = pull(jnp.ones_like(out))
    alone = [1, 2]  # of queries 0 ... 4, which have no key 3 away among 0 ... 3
    assert (np.asarray(out)[:, alone] == 0).all() and (np.asarray(dq)[:, alone] == 0).all()
    assert (np.asarray(out)[:, [0, 3, 4]] != 0).all()
    assert all(np.isfinite(a).all() for a in (dk, dv))
