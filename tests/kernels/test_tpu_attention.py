"""The TPU's kernels, interpreted, against the dense float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, check, examples, kernel_call, leading, make, segments
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxpr_shapes import intermediate_shapes

from t5x_domain.errors import UserError
from t5x_domain.kernels.attention_tpu import TpuAttention
from t5x_domain.kernels.mask import BIDIRECTIONAL, CAUSAL, KeyIntervals, Mask
from t5x_domain.kernels.relative_bias import RelativeBias
from t5x_domain.kernels.tpu.blocks import Blocks, Chip, chip

_SMALL = Blocks(queries=128, keys=256, chunk=128)


def small_chip(resident: int = 2**20) -> Chip:
    """A chip with small blocks that keeps the gradient of so many queries."""

    class SmallChip(Chip):
        def resident_queries(self, head_dim):
            return resident

    return SmallChip(2**25, *[{64: _SMALL, 128: _SMALL, 256: _SMALL}] * 2)


def attend(interpret=True, target=None):
    """`kernels.attention.attention` on an interpreted TPU."""
    options = {"interpret": interpret, "target": target or small_chip()}
    return kernel_call(
        lambda q, k, bias, **more: TpuAttention.of(q.shape[1], k.shape[1], q.shape[3], bias, **options, **more)
    )


@st.composite
def cases(draw):
    """All that can be combined, at lengths of one to three blocks."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cross = draw(st.booleans())
    queries = draw(st.integers(1, 300))
    keys = draw(st.integers(1, 300)) if cross else queries
    groups, kv_heads = draw(st.sampled_from(((1, 2), (3, 1))))
    case = make(
        rng,
        queries=queries,
        keys=keys,
        heads=groups * kv_heads,
        kv_heads=kv_heads,
        dim=draw(st.sampled_from((3, 64))),
        mask=BIDIRECTIONAL,
        scale=draw(st.sampled_from((1.0, 0.25))),
        softcap=draw(st.sampled_from((None, 3.0))),
    )
    if draw(st.booleans()):
        count = draw(st.integers(1, 4))
        case.query_ids = segments(rng, 2, queries, count)
        case.key_ids = segments(rng, 2, keys, count) if cross else case.query_ids
    if not cross:
        window = draw(st.none() | st.tuples(st.integers(0, 80), st.integers(0, 80)))
        case.mask = Mask(draw(st.booleans()), window, draw(st.sampled_from((0, 3))))
        if case.mask.causal and draw(st.booleans()):
            case.prefix = leading(rng, np.ones((2, queries), np.int32) if case.query_ids is None else case.query_ids)
        if draw(st.booleans()):
            case.table, case.bidirectional = rng.standard_normal((8, groups * kv_heads)), draw(st.booleans())
        else:
            case.alibi = draw(st.booleans())
    return case


@settings(max_examples=examples(6), deadline=None)
@given(case=cases(), dtype=st.sampled_from(("float32", "bfloat16")))
def test_output_and_gradients_equal_the_dense_reference(case, dtype):
    check(case, dtype, attend())


def t5(queries=400, **options) -> Case:
    """Self-attention with a bias that is near and far on both sides."""
    rng = np.random.default_rng(0)
    heads = options.pop("heads", 2)
    table = rng.standard_normal((8, heads))
    return make(rng, batch=1, queries=queries, keys=queries, heads=heads, kv_heads=1, table=table, **options)


@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16(causal):
    check(t5(mask=Mask(causal=causal), bidirectional=not causal, dim=64, scale=0.125), "bfloat16", attend())


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("mask", [CAUSAL, BIDIRECTIONAL])
def test_alibi(mask, softcap):
    """600 positions: blocks on both sides lie beyond the table, where the bias goes on."""
    check(make(np.random.default_rng(0), 1, 600, 600, mask=mask, alibi=True, softcap=softcap), attend=attend())


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_queries_in_parts(softcap):
    """The gradient of 400 queries of which 128 find room: 4 parts, the last of them mostly padding."""
    check(t5(mask=BIDIRECTIONAL, softcap=softcap), attend=attend(target=small_chip(128)))


def test_rows_without_keys_give_zeros_and_pass_no_gradient():
    rng = np.random.default_rng(2)
    ids = np.repeat(np.array([[1, 2, 0]], np.int32), (150, 100, 50), axis=1)
    other = np.repeat(np.array([[1, 3, 0]], np.int32), (150, 100, 50), axis=1)
    case = make(rng, batch=1, queries=300, keys=300, mask=BIDIRECTIONAL, query_ids=ids, key_ids=other)
    inputs = [jnp.float32(a) for a in (case.q, case.k, case.v)]
    out, pull = jax.vjp(lambda *inputs: case.call(*inputs, None, attend()), *inputs)
    for result in (out, *pull(jnp.ones_like(out))):
        assert (np.asarray(result[0, 150:]) == 0).all() and (np.asarray(result[0, :150]) != 0).all()


@settings(max_examples=examples(1), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
@example(case=t5(260, mask=Mask(window=(150, 60), global_tokens=2)))
def test_nothing_is_read_before_it_is_written_and_cores_do_not_race(capfd, case):
    """Uninitialised memory is NaN in this interpreter, and heads run on two cores."""
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan")
    check(case, attend=attend(interpret=params))
    assert "RACE" not in "".join(capfd.readouterr())


def test_the_check_for_races_can_fail(capfd):
    """Two cores write the same block."""
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    out_spec = pl.BlockSpec((8, 128), lambda i: (0, 0))

    def kernel(out):
        out[...] = jnp.full(out.shape, pl.program_id(0), jnp.float32)

    pl.pallas_call(
        kernel,
        grid=(2,),
        out_specs=out_spec,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=params,
    )().block_until_ready()
    assert "RACE" in "".join(capfd.readouterr())


def test_bits_do_not_depend_on_how_many_cores_share_the_heads():
    case = t5(200, mask=CAUSAL, bidirectional=False)
    inputs = [jnp.float32(a) for a in (case.q, case.k, case.v, case.table)]

    def run(cores):
        call = attend(interpret=pltpu.InterpretParams(num_cores_or_threads=cores))
        return jax.grad(lambda *inputs: jnp.square(case.call(*inputs, call)).sum(), (0, 1, 2, 3))(*inputs)

    for one, two in zip(run(1), run(2), strict=True):
        np.testing.assert_array_equal(one, two)


def test_gradients_under_vmap():
    case = make(np.random.default_rng(5), 2, 300, 300, 2, 1, mask=CAUSAL)
    q, k, v, d_out = (jnp.float32(a)[:, None] for a in (case.q, case.k, case.v, case.d_out))

    def gradients(q, k, v, d_out):
        return jax.vjp(lambda *inputs: case.call(*inputs, None, attend()), q, k, v)[1](d_out)

    for mapped, whole in zip(
        jax.vmap(gradients)(q, k, v, d_out), gradients(q[:, 0], k[:, 0], v[:, 0], d_out[:, 0]), strict=True
    ):
        np.testing.assert_array_equal(mapped[:, 0], whole)


def test_a_bias_too_wide_for_the_chip_is_refused():
    bias = RelativeBias(jnp.zeros((64, 2)), True, 65536)
    with pytest.raises(UserError, match="relative_bias_max_distance"):
        TpuAttention.of(512, 512, 64, bias, target=chip("TPU v4"))


@pytest.mark.parametrize("window", [1, 7, 100, 129, 511])
def test_windows_that_are_no_part_of_a_block(window):
    """Blocks of 128 by 256; the window of 511 has blocks between its borders, that of 1 none that it fills."""
    case = make(np.random.default_rng(window), 1, 600, 600, 1, 1, mask=Mask(window=(window, window)))
    check(case, attend=attend())


@pytest.mark.parametrize("rows, mend", [(1, "axis 'sequence', or backend='xla'"), (130, "fewer rows a device")])
def test_windows_over_too_many_blocks_are_refused(rows, mend):
    """A window hides most pairs, but the map has room for all: 782 * 391 or 130 * 64 * 32 of 512 by 1024."""
    length = 400_000 if rows == 1 else 32_768
    intervals = KeyIntervals(*[jax.ShapeDtypeStruct((rows, length), jnp.int32)] * 2)
    kernel = TpuAttention.of(length, length, 64, None, target=chip("TPU v4"))
    with pytest.raises(UserError, match=f"masked ones included, do not fit into .* scalar memory; take .*{mend}"):
        jax.eval_shape(kernel.maps, intervals, jnp.int32(0))


def test_no_array_of_queries_times_keys():
    length = 1024  # a block is 128 x 256, a skewed table 128 x 896
    case = make(np.random.default_rng(4), batch=1, queries=length, keys=length, heads=1, kv_heads=1, mask=CAUSAL)
    inputs = [jnp.float32(a) for a in (case.q, case.k, case.v, np.zeros((8, 1)))]
    shapes = intermediate_shapes(jax.grad(lambda *a: case.call(*a, attend()).sum(), (0, 1, 2, 3)), *inputs)
    assert max(np.prod(shape) for shape in shapes) < length * length // 2


def test_lengths_are_cut_into_equal_blocks():
    """1100 positions in blocks of at most 512: three of 384, not 512 + 512 + 76."""
    assert Blocks(512, 1024, 512).fit(1100, 300) == Blocks(384, 384, 128)
