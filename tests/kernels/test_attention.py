"""Attention and its gradients against a dense float64 reference that carries its own error bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, check, examples, kernel_call, leading, make, segments
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxpr_shapes import intermediate_shapes

from t5x_domain.errors import UserError
from t5x_domain.kernels.attention import attention
from t5x_domain.kernels.attention_xla import XlaAttention
from t5x_domain.kernels.mask import BIDIRECTIONAL, CAUSAL, Mask, SegmentIds
from t5x_domain.kernels.relative_bias import Alibi, RelativeBias


def chunked(queries, keys=None):
    """Attention that takes so many queries and keys at once."""
    return kernel_call(lambda q, k, bias, **options: XlaAttention(chunk_size=queries, block_size=keys, **options))


@st.composite
def cases(draw):
    """Everything that can be combined; sizes are few so that most draws differ in what matters."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, kv_heads, groups, dim = (draw(st.sampled_from(a)) for a in ((1, 2), (1, 2), (1, 3), (2, 5)))
    queries, cross = draw(st.integers(1, 19)), draw(st.booleans())
    keys = draw(st.integers(1, 19)) if cross else queries
    heads, normal = kv_heads * groups, rng.standard_normal
    case = Case(
        q=normal((batch, queries, heads, dim)),
        k=normal((batch, keys, kv_heads, dim)),
        v=normal((batch, keys, kv_heads, dim)),
        d_out=normal((batch, queries, heads, dim)),
        mask=BIDIRECTIONAL,
        scale=draw(st.sampled_from((1.0, 0.5))),
        softcap=draw(st.sampled_from((None, 3.0))),
    )
    if draw(st.booleans()):
        count = draw(st.integers(1, 4))
        case.query_ids = segments(rng, batch, queries, count)
        case.key_ids = segments(rng, batch, keys, count) if cross else case.query_ids
    if not cross:
        window = draw(st.none() | st.tuples(st.integers(0, 6), st.integers(0, 6)))
        case.mask = Mask(draw(st.booleans()), window, draw(st.integers(0, 3)))
        if case.mask.causal and draw(st.booleans()):
            ids = np.ones((batch, queries), np.int32) if case.query_ids is None else case.query_ids
            case.prefix = leading(rng, ids)
        if draw(st.booleans()):
            case.table, case.bidirectional = normal((8, heads)), draw(st.booleans())
    return case


@settings(max_examples=examples(25), deadline=None)
@given(
    case=cases(),
    chunk_size=st.sampled_from((1, 4, 7, 64)),
    block_size=st.sampled_from((1, 3, 8, 64)),
    dtype=st.sampled_from(("float32", "float64")),
)
def test_output_and_gradients_equal_the_dense_reference(case, chunk_size, block_size, dtype):
    with jax.enable_x64(dtype == "float64"):
        check(case, dtype, chunked(chunk_size, block_size))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("causal", [True, False])
def test_t5_packed(dtype, causal):
    rng = np.random.default_rng(0)
    ids = segments(rng, 2, 40, 3)
    table = rng.standard_normal((8, 4))
    options = {"query_ids": ids, "key_ids": ids, "table": table, "bidirectional": not causal}
    check(make(rng, mask=Mask(causal=causal), **options), dtype, chunked(16))


def test_alibi():
    check(make(np.random.default_rng(7), mask=CAUSAL, alibi=True), attend=chunked(16))


def test_default_chunk_is_not_visible_in_the_result():
    check(make(np.random.default_rng(1), queries=150, keys=150, mask=CAUSAL))


def test_rows_without_keys_give_zeros_and_pass_no_gradient():
    rng = np.random.default_rng(2)
    ids = np.array([[1, 1, 2, 0, 0], [0, 0, 0, 0, 0]], np.int32)
    other = np.array([[1, 3, 3, 0], [1, 1, 0, 0]], np.int32)  # segment 2 has no keys, segment 3 no queries
    case = make(rng, queries=5, keys=4, mask=BIDIRECTIONAL, query_ids=ids, key_ids=other)
    out, pull = jax.vjp(
        lambda q, k, v: case.call(q, k, v, None, chunked(2)), *(jnp.float32(a) for a in (case.q, case.k, case.v))
    )
    dq, dk, dv = pull(jnp.ones_like(out))
    without_keys = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
    assert (np.asarray(out)[without_keys] == 0).all() and (np.asarray(out)[~without_keys] != 0).all()
    assert (np.asarray(dq)[without_keys] == 0).all()
    unseen = np.array([[0, 1, 1, 1], [1, 1, 1, 1]], bool)
    assert (np.asarray(dk)[unseen] == 0).all() and (np.asarray(dv)[unseen] == 0).all()


def test_large_logits_do_not_overflow():
    case = make(np.random.default_rng(3), mask=CAUSAL)
    out = case.call(*(jnp.float32(100 * a) for a in (case.q, case.k, case.v)), None, chunked(16))
    assert np.isfinite(out).all()


def test_keys_far_from_a_window_are_not_touched():
    """A NaN in a key or value that a tile holds would reach its outputs and gradients, because 0 times NaN is NaN."""
    rng = np.random.default_rng(6)
    case = make(rng, queries=64, keys=64, mask=Mask(window=(4, 4)))
    inputs = [jnp.float32(a) for a in (case.q, case.k, case.v)]
    table, d_out = (jnp.float32(a) for a in (rng.standard_normal((8, 4)), case.d_out))
    far = jnp.arange(64)[:, None, None] >= 48

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda *inputs: case.call(*inputs, table, chunked(8, 16)), q, k, v)
        return [a[:, :32] for a in (out, *pull(d_out))]

    clean, poisoned = run(*inputs), run(inputs[0], *(jnp.where(far, jnp.nan, a) for a in inputs[1:]))
    for expected, actual in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_rows_that_are_mapped_over():
    """Each then needs tiles of its own."""
    rng = np.random.default_rng(8)
    ids = segments(rng, 2, 40, 2)
    case = make(rng, mask=Mask(window=(5, 2), global_tokens=1), query_ids=ids, key_ids=ids)

    def row_by_row(*arrays, segment_ids, **options):
        def one(arrays, ids):
            arrays, ids = jax.tree.map(lambda a: a[None], (arrays, ids))
            return chunked(7, 8)(*arrays, segment_ids=ids, **options)[0]

        return jax.vmap(one)(arrays, segment_ids)

    check(case, attend=row_by_row)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_no_array_of_queries_times_keys(with_gradient):
    queries, keys = 96, 80

    def run(chunk_size):
        case = make(np.random.default_rng(4), queries=queries, keys=keys, mask=BIDIRECTIONAL)
        inputs = [jnp.float32(a) for a in (case.q, case.k, case.v, np.zeros((8, 4)))]
        total = lambda *inputs: case.call(*inputs, chunked(chunk_size)).sum()  # noqa: E731
        shapes = intermediate_shapes(jax.grad(total, (0, 1, 2, 3)) if with_gradient else total, *inputs)
        return [shape for shape in shapes if np.prod(shape) >= queries * keys * 4]

    assert run(queries), "the detector sees nothing"
    assert not run(8)


def test_memory_of_the_compiled_gradient():
    """8192 x 8192 logits of 2 heads are 512 MiB; 128 chunks of 64 queries need 4 MiB each, of which a few are alive."""
    length, heads, dim = 8192, 2, 8
    x = jax.ShapeDtypeStruct((1, length, heads, dim), jnp.float32)
    total = lambda q, k, v: attention(q, k, v, mask=CAUSAL).sum()  # noqa: E731
    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 32 * 2**20


def test_what_a_backend_cannot_do_is_refused():
    x = jnp.zeros((1, 4, 2, 2))
    with pytest.raises(UserError, match="hopper"):
        attention(x, x, x, mask=CAUSAL, backend="hopper")
    with pytest.raises(UserError, match="float16"):
        attention(*[x.astype(jnp.float16)] * 3, mask=CAUSAL, backend="tpu")
    with pytest.raises(UserError, match="head_dim up to 256, not 257"):
        attention(*[jnp.zeros((1, 4, 2, 257))] * 3, mask=CAUSAL, backend="tpu")
    with pytest.raises(UserError, match="needs a TPU, but the device is a cpu"):
        attention(x, x, x, mask=CAUSAL, backend="tpu")


def test_what_does_not_fit_together_is_refused():
    x = jnp.zeros((2, 4, 3, 2))
    wrong = [
        ("do not fit together", {"k": x[:, :, :2], "v": x[:, :, :2]}),  # 3 query heads, 2 key heads
        ("do not fit together", {"v": x[:, :3]}),
        ("do not fit together", {"k": x[:1], "v": x[:1]}),
        ("do not fit together", {"k": x[..., :1], "v": x[..., :1]}),
        ("bfloat16 and float32; they must agree", {"k": x.astype(jnp.bfloat16)}),
        ("not for 3 heads", {"relative_bias": RelativeBias(jnp.zeros((8, 2)), True)}),
        ("not for 3 heads", {"relative_bias": Alibi.of(2)}),
        (r"segment_ids.key \(2, 3\) must be \(2, 4\)", {"segment_ids": SegmentIds(x[..., 0, 0], x[:, :3, 0, 0])}),
        (r"prefix \(1, 4\) must be \(2, 4\)", {"prefix": x[:1, :, 0, 0]}),
    ]
    for words, change in wrong:
        with pytest.raises(ValueError, match=words):
            attention(**{"q": x, "k": x, "v": x, "mask": CAUSAL} | change)


def test_auto_says_once_what_it_takes_and_why(caplog):
    x = jnp.zeros((1, 4, 2, 6), jnp.float16)  # no other test asks for these
    with caplog.at_level("INFO", "t5x_domain"):
        for _ in range(2):
            attention(x, x, x, mask=CAUSAL)
    assert [record.getMessage() for record in caplog.records] == ["attention: backend xla, because the device is a cpu"]
