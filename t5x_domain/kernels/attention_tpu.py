"""Attention for TPUs: what surrounds the Pallas kernels of `kernels.tpu`.

Lengths are padded to blocks and heads to the sizes that the kernels know, heads are put before positions, and the
gradient of the bias is brought back from the kernels' layout to the vector of diagonals.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from t5x_domain.kernels.mask import KeyIntervals
from t5x_domain.kernels.relative_bias import RelativeBias, diagonals, saturation
from t5x_domain.kernels.tpu.backward import backward
from t5x_domain.kernels.tpu.block_map import BlockMap, Far, block_map
from t5x_domain.kernels.tpu.blocks import LANES, Blocks, Chip, chip
from t5x_domain.kernels.tpu.forward import forward
from t5x_domain.kernels.tpu.logits import MASKED, bias_unit
from t5x_domain.kernels.tpu.settings import Settings
from t5x_domain.kernels.tpu.skewed_bias import HeadBias, SkewedLayout, skew, unskew

_HEAD_DIMS = (64, 128, 256)


class Maps(NamedTuple):
    """Block pairs of both passes; the backward pass has a map for each part of the queries."""

    forward: BlockMap
    backward: BlockMap


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes, known when the call is traced.

    Attributes:
      query_length: of the arrays as they come.
      key_length: likewise.
      forward: blocks of the forward pass.
      backward: blocks of the backward pass.
      parts: parts that the queries are cut into for the backward pass, as many as its memory asks for.
      far: borders of the bias; None without one.
      vmem: bytes of vector memory for a kernel.
    """

    query_length: int
    key_length: int
    forward: Blocks
    backward: Blocks
    parts: int
    far: Far | None
    vmem: int

    @property
    def part_length(self) -> int:
        """Queries of a part, padded."""
        return _round_up(math.ceil(self.query_length / self.parts), self.backward.queries)


def geometry(
    query_length: int, key_length: int, head_dim: int, far: Far | None, target: Chip | None = None
) -> Geometry:
    """Sizes for a chip, by default the one that is compiled for."""
    target = target or chip()
    whole_blocks = target.resident_queries(head_dim) // target.backward[head_dim].queries
    parts = math.ceil(query_length / (whole_blocks * target.backward[head_dim].queries))
    return Geometry(
        query_length,
        key_length,
        target.forward[head_dim].fit(query_length, key_length),
        target.backward[head_dim].fit(math.ceil(query_length / parts), key_length),
        parts,
        far,
        target.vmem,
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """Of one call, known when it is traced; see `Settings`."""

    scale: float
    softcap: float | None
    interpret: bool | pltpu.InterpretParams = False
    branches: tuple[tuple[bool, bool], ...] | None = None


def block_maps(geometry: Geometry, intervals: KeyIntervals | None, shift: jax.Array) -> Maps:
    """The pairs of blocks that all layers with the same mask visit.

    Args:
      intervals: [B or 1, Sq]; None if every query sees every key.
      shift: int32 scalar, a multiple of 128: position of the first key minus that of the first query.
    """

    def build(rows, blocks, length, part, by_key):
        sizes = length // blocks.queries, math.ceil(geometry.key_length / blocks.keys), blocks
        return block_map(rows, *sizes, far=geometry.far, shift=shift - part * length, by_key=by_key)

    rows = _padded_intervals(geometry, intervals, geometry.forward, 1)
    padded = _round_up(geometry.query_length, geometry.forward.queries)
    forward_map = build(_part(rows, 0), geometry.forward, padded, 0, False)
    rows = _padded_intervals(geometry, intervals, geometry.backward, geometry.parts)
    of_part = functools.partial(build, blocks=geometry.backward, length=geometry.part_length, by_key=True)
    parts = jnp.arange(geometry.parts, dtype=jnp.int32)
    return Maps(forward_map, jax.vmap(lambda rows, part: of_part(rows, part=part))(rows, parts))


class Alignment(NamedTuple):
    """A shift in whole registers, which the kernels can do, and the rest, which their table of biases takes in."""

    aligned: jax.Array
    rest: jax.typing.ArrayLike
    far: Far | None

    @classmethod
    def of(cls, shift: jax.typing.ArrayLike, bias: RelativeBias | None) -> "Alignment":
        """For a position of the first key minus that of the first query."""
        rest = shift % LANES
        far = None
        if bias is not None:
            before, after = saturation(bias)
            far = Far(before + (rest if isinstance(rest, int) else LANES - 1), after)
        return cls(jnp.asarray(shift - rest, jnp.int32), rest, far)


def plan_tpu(
    query_length: int,
    key_length: int,
    head_dim: int,
    *,
    relative_bias: RelativeBias | None,
    intervals: KeyIntervals | None,
    shift: jax.typing.ArrayLike,
    target: Chip | None = None,
) -> Maps:
    """What `attention_tpu` would build of the same arguments, to be built once for many layers."""
    aligned, _, far = Alignment.of(shift, relative_bias)
    return block_maps(geometry(query_length, key_length, _padded_dim(head_dim), far, target), intervals, aligned)


def attention_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    relative_bias: RelativeBias | None,
    intervals: KeyIntervals | None,
    shift: jax.typing.ArrayLike,
    options: Options,
    maps: Maps | None = None,
    target: Chip | None = None,
) -> jax.Array:
    """The part of `kernels.attention.attention` that computes; the other arguments are described there.

    Args:
      intervals: keys that each query sees, [B or 1, Sq]; None if each sees all.
      shift: position of the first key minus that of the first query.
      maps: of `plan_tpu`; None to build them.
      target: the chip to compile for, by default the present one.
    """
    head_dim = _padded_dim(q.shape[3])
    padding = (0, 0), (0, 0), (0, 0), (0, head_dim - q.shape[3])
    heads_first = lambda a: jnp.swapaxes(jnp.pad(a, padding), 1, 2)  # noqa: E731
    aligned, rest, far = Alignment.of(shift, relative_bias)
    diagonal = None if far is None else diagonals(relative_bias, far.before + 1, far.after + 1, -rest)
    sizes = geometry(q.shape[1], k.shape[1], head_dim, far, target)
    if maps is None:
        maps = block_maps(sizes, intervals, aligned)
    out = _attention(*map(heads_first, (q, k, v)), diagonal, intervals, maps, aligned, sizes, options)
    return jnp.swapaxes(out, 1, 2)[..., : q.shape[3]]


def _padded_dim(head_dim):
    return next(size for size in _HEAD_DIMS if size >= head_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _attention(q, k, v, diagonal, intervals, maps, shift, sizes, options):
    return _forward(q, k, v, diagonal, intervals, maps, shift, sizes, options)[0]


def _forward(q, k, v, diagonal, intervals, maps, shift, sizes, options):
    """Output [B, H, Sq, D] and log-sum-exp [B, H, 1, Sq]."""
    blocks = sizes.forward
    layout = None if diagonal is None else SkewedLayout(blocks.chunk, sizes.far)
    settings = Settings(blocks, options.scale, options.softcap, layout, sizes.vmem, options.interpret, options.branches)
    rows = _padded_intervals(sizes, intervals, blocks, 1)
    out, lse = forward(
        _pad_length(q, blocks.queries),
        _pad_length(k, blocks.keys),
        _pad_length(v, blocks.keys),
        _head_bias(diagonal, layout, options.softcap),
        _part(rows, 0),
        maps.forward,
        shift,
        settings,
    )
    return out[:, :, : sizes.query_length], lse[..., : sizes.query_length]


def _attention_fwd(q, k, v, diagonal, intervals, maps, shift, sizes, options):
    out, lse = _forward(q, k, v, diagonal, intervals, maps, shift, sizes, options)
    return out, (q, k, v, diagonal, intervals, maps, shift, out, lse)


def _attention_bwd(sizes, options, residuals, d_out):
    q, k, v, diagonal, intervals, maps, shift, out, lse = residuals
    blocks, length = sizes.backward, sizes.part_length
    # sum_s p_s dp_s = out . d_out, once a query (FlashAttention, appendix B.2).
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=3)[:, :, None]
    layout = bias = None
    if diagonal is not None:
        layout = SkewedLayout(blocks.queries, Far(sizes.far.after, sizes.far.before))
        bias = _head_bias(diagonal, layout, options.softcap, reverse=True)
    settings = Settings(blocks, options.scale, options.softcap, layout, sizes.vmem, options.interpret, options.branches)
    k_padded, v_padded = _pad_length(k, blocks.keys), _pad_length(v, blocks.keys)
    exact = k.dtype if sizes.parts == 1 and q.shape[1] == k.shape[1] else jnp.float32

    def part(xs):
        number, rows, pairs, q, d_out, lse, delta = xs
        here = shift - number * length
        return backward(q, k_padded, v_padded, bias, rows, pairs, here, d_out, lse, delta, settings, exact)

    split = lambda a, axis, **options: _split(a, axis, sizes.parts, length, **options)  # noqa: E731
    xs = (
        jnp.arange(sizes.parts, dtype=jnp.int32),
        _padded_intervals(sizes, intervals, blocks, sizes.parts),
        maps.backward,
        split(q, 2),
        split(d_out, 2),
        split(lse, 3, constant_values=-MASKED),  # no weight for padding
        split(delta, 3),
    )
    if sizes.parts == 1:
        dq, *sums = part(_part(xs, 0))
    else:

        def add(sums, xs):
            dq, *new = part(xs)
            return jax.tree.map(jnp.add, sums, new), dq

        like = jax.eval_shape(lambda xs: part(_part(xs, 0))[1:], xs)
        sums, dq = jax.lax.scan(add, [a and jnp.zeros(a.shape, a.dtype) for a in like], xs)
        dq = jnp.moveaxis(dq, 0, 2).reshape(*q.shape[:2], -1, q.shape[3])
    dk, dv = (_of_key_heads(a, k) for a in sums[:2])
    d_diagonal = None if diagonal is None else unskew(sums[2], layout)[:, ::-1]
    return dq[:, :, : sizes.query_length], dk, dv, d_diagonal, None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _head_bias(diagonal, layout, softcap, reverse=False):
    if diagonal is None:
        return None
    diagonal = diagonal.astype(jnp.float32) * bias_unit(softcap)
    far = jnp.stack([diagonal[:, 0], diagonal[:, -1]], axis=1)
    return HeadBias(skew(diagonal[:, ::-1] if reverse else diagonal, layout), far)


def _of_key_heads(sums, k):
    """Gradients of each query head -> of the key head they share, without padding."""
    batch, kv_heads, length, dim = k.shape
    sums = sums[:, :, :length].reshape(batch, kv_heads, -1, length, dim)
    return sums.sum(axis=2).astype(k.dtype)


def _padded_intervals(sizes, intervals, blocks, parts):
    """[parts, B or 1, padded length]; None if every query sees every key, of which none is padding."""
    if intervals is None:
        if sizes.key_length % blocks.keys == 0:
            return None
        start = jnp.zeros((1, sizes.query_length), jnp.int32)
        intervals = KeyIntervals(start, start + sizes.key_length)
    length = _round_up(math.ceil(sizes.query_length / parts), blocks.queries)
    # Padding sees what the last query sees, so that it makes no block partial. Nothing comes of it.
    return jax.tree.map(lambda a: _split(a, 1, parts, length, mode="edge"), intervals)


def _split(x, axis, parts, length, **options):
    """Pads an axis to `parts * length` as `jnp.pad` does and moves the parts to the front."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, parts * length - x.shape[axis])
    x = jnp.pad(x, widths, **options)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], parts, length, *x.shape[axis + 1 :]), axis, 0)


def _part(tree, index):
    return jax.tree.map(lambda a: a[index], tree)


def _pad_length(x, unit):
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % unit), (0, 0)))


def _round_up(size, unit):
    return math.ceil(size / unit) * unit
