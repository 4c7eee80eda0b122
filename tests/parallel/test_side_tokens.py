"""Global tokens beside a window, over a mesh and with each backend, against the dense float64 reference.

The reference's mask is written down pair by pair from the definition; of transient tokens the keys follow the row's.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.kernels.attention_kernel import Part
from t5x_domain.kernels.global_blocks import every_nth, transient
from t5x_domain.kernels.mask import Mask, SegmentIds
from t5x_domain.kernels.relative_bias import Alibi, RelativeBias, relative_position_bucket
from t5x_domain.parallel.attention import attention, attention_plan
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.parallel.sharding import use_mesh
from tests.jaxpr_shapes import intermediate_shapes
from tests.kernels.attention_cases import Case, check, examples, make, segments

NO_MESH = {}
MESHES = (
    {"data": 2, "sequence": 2, "tensor": 2},
    {"data": 1, "sequence": 8},
    {"data": 1, "sequence": 2, "tensor": 4},  # more devices than key heads
)


@dataclasses.dataclass
class Sparse(Case):
    """Blocks of `size` tokens: every last one is global, or with `transient` keys of their own follow the row's."""

    size: int = 4
    transient: bool = False

    def ids(self):
        """[B, S] segment ids."""
        return np.ones(self.q.shape[:2], np.int32) if self.query_ids is None else self.query_ids

    def allowed(self):
        """[B, S, S (+ S // size)] bool."""
        ids, length = self.ids(), self.q.shape[1]
        place, keys = self._places(), self.k.shape[1]
        result = np.zeros((len(ids), length, keys), bool)
        for b, i, j in np.ndindex(len(ids), length, length):
            near = abs(i - j) <= self.mask.window[0] or min(place[b, i], place[b, j]) < self.mask.global_tokens
            nth = not self.transient and any((place[b, t] + 1) % self.size == 0 for t in (i, j))
            result[b, i, j] = ids[b, i] == ids[b, j] != 0 and (near or nth)
        for b, slot, segment, _ in self._blocks():
            result[b, :, length + slot] = ids[b] == segment
        return result

    def buckets(self):
        """[B, S, S (+ S // size)] rows of the table, whose second half is for blocks."""
        bucket = lambda a: relative_position_bucket(a, bidirectional=True, num_buckets=8, max_distance=20)  # noqa: E731
        length, blocks = self.q.shape[1], self._blocks()
        token = np.arange(length)
        result = np.zeros((*self.q.shape[:2], self.k.shape[1]), int)
        result[:, :, :length] = bucket(token[None] - token[:, None])
        for b, slot, segment, _ in blocks:
            for other_b, query_slot, other, tokens in blocks:
                if (b, segment) == (other_b, other):
                    result[b, tokens, length + slot] = 8 + bucket(slot - query_slot)
        return result

    def _places(self):
        """[B, S], tokens of the same segment before each token."""
        return np.array([[(row[:i] == row[i]).sum() for i in range(len(row))] for row in self.ids()])

    def _blocks(self):
        """(row, slot, segment, tokens) of the transient tokens."""
        result = []
        for b, row in enumerate(self.ids()) if self.transient else ():
            slot = 0
            for segment in range(1, row.max() + 1):
                tokens = np.flatnonzero(row == segment)
                count = len(tokens) // self.size
                for number in range(count):
                    end = (number + 1) * self.size if number < count - 1 else len(tokens)
                    result.append((b, slot, segment, tokens[number * self.size : end]))
                    slot += 1
        return result

    def over(self, shape, backend="xla"):
        """The attention of local layers with the arguments of `attention`, on a mesh of this shape."""
        mesh = MeshShape(**shape).build() if shape else None

        def call(q, k, v, *, mask, relative_bias, segment_ids, prefix, scale, softcap):
            length, bias, side = q.shape[1], relative_bias, None
            ids = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids.query
            if isinstance(bias, RelativeBias):
                bias = dataclasses.replace(bias, table=bias.table[:8])
            with use_mesh(mesh):
                own = k[:, :length]
                plan = attention_plan(q, own, mask=mask, segment_ids=segment_ids, relative_bias=bias, backend=backend)
                tokens = every_nth(self.size, ids, window=mask.window[0], leading=mask.global_tokens)
                if self.transient:
                    tokens = transient(self.size, ids)
                    block_bias = None if bias is None else dataclasses.replace(bias, table=relative_bias.table[8:])
                    side = Part(k[:, length:], v[:, length:], block_bias, tokens.place)
                return attention(
                    q, own, v[:, :length], plan._replace(side=tokens), relative_bias=bias, side=side,
                    scale=scale, softcap=softcap, backend=backend,
                )  # fmt: skip

        return call


def sparse(rng, *, size, transient, batch=2, length=24, heads=4, kv_heads=2, dim=4, **options):
    """Random arrays for a row of `length` tokens."""
    keys = length + length // size * transient
    case = make(rng, batch, length, keys, heads, kv_heads, dim, **options)
    return Sparse(**vars(case), size=size, transient=transient)


@st.composite
def cases(draw, lengths=(24,)):
    """Both kinds, at lengths that all meshes divide."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    window = draw(st.integers(0, 6))
    mask = Mask(window=(window, window), global_tokens=draw(st.sampled_from((0, 0, 3))))
    options = {"mask": mask, "softcap": draw(st.sampled_from((None, 3.0))), "scale": 0.5}
    length, size = draw(st.sampled_from(lengths)), draw(st.sampled_from((1, 3, 5, 24)))
    case = sparse(rng, size=min(size, length), transient=draw(st.booleans()), length=length, **options)
    if draw(st.booleans()):
        case.query_ids = case.key_ids = segments(rng, 2, length, draw(st.integers(1, 4)))
    if draw(st.booleans()):
        case.table = rng.standard_normal((16 if case.transient else 8, 4))
    else:
        case.alibi = not case.transient and draw(st.booleans())
    return case


@settings(max_examples=examples(5), deadline=None)
@given(case=cases(lengths=(24, 17)))
def test_output_and_gradients_equal_the_dense_reference(case):
    with jax.enable_x64(True):
        check(case, "float64", case.over(NO_MESH))


@settings(max_examples=examples(2), deadline=None)
@given(case=cases(), shape=st.sampled_from(MESHES))
def test_over_a_mesh(case, shape):
    with jax.enable_x64(True):
        check(case, "float64", case.over(shape))


@pytest.mark.parametrize("transient", [False, True])
@pytest.mark.parametrize("dtype, backend", [("bfloat16", "xla"), ("float32", "tpu_interpreted")])
def test_rounding(dtype, backend, transient):
    """Packed, with a bias, and windows that are no part of a block of 128."""
    rng = np.random.default_rng(0)
    ids = segments(rng, 1, 150, 3)
    options = {"query_ids": ids, "key_ids": ids, "mask": Mask(window=(7, 7))}
    table = rng.standard_normal((16 if transient else 8, 2))
    case = sparse(rng, size=20, transient=transient, batch=1, length=150, heads=2, kv_heads=1, table=table, **options)
    check(case, dtype, case.over(NO_MESH, backend))


@pytest.mark.parametrize("transient", [False, True])
def test_no_array_of_queries_times_keys(transient):
    length = 4096
    case = sparse(
        np.random.default_rng(0), size=64, transient=transient, batch=1, length=length, heads=1, kv_heads=1,
        mask=Mask(window=(64, 64)), table=np.zeros((16 if transient else 8, 1)),
    )  # fmt: skip
    inputs = [jnp.float32(a) for a in (case.q, case.k, case.v, case.table)]
    total = lambda *inputs: case.call(*inputs, case.over(NO_MESH)).sum()  # noqa: E731
    shapes = intermediate_shapes(jax.grad(total, (0, 1, 2, 3)), *inputs)
    assert max(np.prod(shape) for shape in shapes) < length**2 / 8


def test_what_does_not_go_together_is_refused():
    x = jnp.zeros((1, 8, 2, 4))
    ids = jnp.ones((1, 8), jnp.int32)
    mask, side = Mask(window=(2, 2)), Part(x[:, :2], x[:, :2], None, transient(4, ids).place)
    plan = attention_plan(x, x, mask=mask, segment_ids=SegmentIds(ids, ids))
    with pytest.raises(ValueError, match="needs their keys and values"):
        attention(x, x, x, plan._replace(side=transient(4, ids)))
    with pytest.raises(ValueError, match="and no other"):
        attention(x, x, x, plan, side=side)
    with pytest.raises(ValueError, match="'gather', not 'ring'"):
        attention(x, x, x, plan._replace(side=every_nth(4, ids, window=2)), sequence="ring")
    with pytest.raises(ValueError, match="not for 2 heads"):
        wrong = side._replace(bias=Alibi.of(3))
        attention(x, x, x, plan._replace(side=transient(4, ids)), side=wrong)
