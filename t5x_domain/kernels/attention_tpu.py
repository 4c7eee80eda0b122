"""Attention for TPUs: what surrounds the Pallas kernels of `kernels.tpu`.

Lengths are padded to blocks and heads to the sizes that the kernels know, heads are put before positions, and the
gradient of the bias is brought back from the kernels' layout to its table.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from t5x_domain.errors import UserError
from t5x_domain.kernels.attention_kernel import EMPTY, Place
from t5x_domain.kernels.mask import KeyIntervals
from t5x_domain.kernels.relative_bias import Alibi, Bias, diagonals, saturation
from t5x_domain.kernels.tpu.backward import backward
from t5x_domain.kernels.tpu.block_map import EVERYWHERE, BlockMap, Far, block_map
from t5x_domain.kernels.tpu.blocks import LANES, SMEM, Blocks, Chip, chip
from t5x_domain.kernels.tpu.forward import forward
from t5x_domain.kernels.tpu.logits import LOG2E, MASKED, bias_unit
from t5x_domain.kernels.tpu.settings import Settings
from t5x_domain.kernels.tpu.skewed_bias import HeadBias, SkewedLayout, skew, skew_linear, unskew

_HEAD_DIMS = (64, 128, 256)


class Maps(NamedTuple):
    """Block pairs of both passes; the backward pass has a map for each part of the queries."""

    forward: BlockMap
    backward: BlockMap


@dataclasses.dataclass(frozen=True)
class TpuAttention:
    """Attention for TPUs, see `AttentionKernel`; make it with `TpuAttention.of`.

    Attributes:
      query_length: of the arrays as they come.
      key_length: likewise.
      forward_blocks: of the forward pass.
      backward_blocks: of the backward pass.
      parts: parts that the queries are cut into for the backward pass, as many as its memory asks for.
      far: borders of a bias that is constant beyond them, `EVERYWHERE` if there are none; None without a bias.
      vmem: bytes of vector memory for a kernel.
      scale: factor of the logits.
      softcap: of the logits; None for none.
      exact: results stay in the dtype of sums, as others will be added to them.
      interpret: run by the interpreter: False, True or `pltpu.InterpretParams`.
      branches: see `Settings`.
    """

    query_length: int
    key_length: int
    forward_blocks: Blocks
    backward_blocks: Blocks
    parts: int
    far: Far | None
    vmem: int
    scale: float = 1.0
    softcap: float | None = None
    exact: bool = False
    interpret: bool | pltpu.InterpretParams = False
    branches: tuple[tuple[bool, bool], ...] | None = None

    @classmethod
    def of(
        cls,
        query_length: int,
        key_length: int,
        head_dim: int,
        bias: Bias | None,
        *,
        target: Chip | None = None,
        **options: Any,
    ) -> "TpuAttention":
        """For a chip, by default the one that is compiled for; `options` are further attributes.

        Raises:
          UserError: the bias changes over more distances than the chip's memory holds.
        """
        target, head_dim = target or chip(), _padded_dim(head_dim)
        largest = target.backward[head_dim].queries
        parts = math.ceil(query_length / (target.resident_queries(head_dim) // largest * largest))
        far = None if bias is None else EVERYWHERE if isinstance(bias, Alibi) else Far(*saturation(bias))
        kernel = cls(
            query_length,
            key_length,
            target.forward[head_dim].fit(query_length, key_length),
            target.backward[head_dim].fit(math.ceil(query_length / parts), key_length),
            parts,
            far,
            target.vmem,
            **options,
        )
        layout = kernel._settings(kernel.backward_blocks, kernel.backward_blocks.queries).layout
        # Two buffers each of the table and of its gradient.
        if layout is not None and 4 * 4 * LANES * layout.width > target.vmem // 2:
            raise UserError(
                f"attention: a bias that changes {max(far)} positions away makes a table of {layout.width} lanes, over "
                "half of the chip's vector memory; lower relative_bias_max_distance or take backend='xla'."
            )
        return kernel

    @property
    def part_length(self) -> int:
        """Queries of a part, padded."""
        return _round_up(math.ceil(self.query_length / self.parts), self.backward_blocks.queries)

    def maps(self, intervals: KeyIntervals | None, shift: jax.Array) -> Maps:
        """The pairs of blocks that both passes visit; `shift` must be a multiple of 128 if there is a bias.

        Raises:
          UserError: they are too many for the chip's scalar memory.
        """

        def build(rows, blocks, length, part, by_key):
            sizes = length // blocks.queries, math.ceil(self.key_length / blocks.keys), blocks
            return block_map(rows, *sizes, far=self.far, shift=shift - part * length, by_key=by_key)

        rows = self._rows(intervals, self.forward_blocks, 1)
        padded = _round_up(self.query_length, self.forward_blocks.queries)
        forward_map = build(_part(rows, 0), self.forward_blocks, padded, 0, False)
        rows = self._rows(intervals, self.backward_blocks, self.parts)
        of_part = functools.partial(build, blocks=self.backward_blocks, length=self.part_length, by_key=True)
        parts = jnp.arange(self.parts, dtype=jnp.int32)
        maps = Maps(forward_map, jax.vmap(lambda rows, part: of_part(rows, part=part))(rows, parts))
        largest = max(maps.forward.entries.size, maps.backward.entries.shape[1])
        if 4 * largest > SMEM:
            batch = 1 if intervals is None else len(intervals.start)
            several = "fewer rows a device, or accumulate gradients"
            single = "shorter rows, more devices on the mesh's axis 'sequence', or backend='xla'"
            raise UserError(
                f"attention: {largest} pairs of blocks ({batch} rows of {self.query_length} queries and "
                f"{self.key_length} keys on a device), masked ones included, do not fit into the {SMEM // 1024} KiB of "
                f"scalar memory; take {several if batch > 1 else single}."
            )
        return maps

    def forward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None, place: Place
    ) -> tuple[jax.Array, jax.Array]:
        """See `AttentionKernel.forward`."""
        dim, blocks = q.shape[3], self.forward_blocks
        q, k, v = map(_heads_first, (q, k, v))
        settings = self._settings(blocks, blocks.chunk)
        out, lse = forward(
            _pad_length(q, blocks.queries),
            _pad_length(k, blocks.keys),
            _pad_length(v, blocks.keys),
            self._head_bias(self._diagonal(bias), bias, settings.layout),
            _part(self._rows(place.intervals, blocks, 1), 0),
            place.maps.forward,
            place.shift,
            settings,
            jnp.float32 if self.exact else q.dtype,
        )
        lse = lse[:, :, 0, : self.query_length]
        lse = jnp.where(lse > -MASKED / 2, EMPTY, lse / LOG2E)
        return jnp.swapaxes(out[:, :, : self.query_length], 1, 2)[..., :dim], lse

    def backward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        bias: Bias | None,
        place: Place,
        out: jax.Array,
        lse: jax.Array,
        d_out: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, Bias | None]:
        """See `AttentionKernel.backward`."""
        blocks, length = self.backward_blocks, self.part_length
        # sum_s p_s dp_s = out . d_out, once a query (FlashAttention, appendix B.2).
        delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=3)
        delta = jnp.swapaxes(delta, 1, 2)[:, :, None]
        lse = jnp.where(lse < EMPTY / 2, -MASKED, lse * LOG2E)[:, :, None]  # no weight without keys
        q_heads, k_heads, v_heads, d_out = map(_heads_first, (q, k, v, d_out.astype(q.dtype)))
        k_padded, v_padded = _pad_length(k_heads, blocks.keys), _pad_length(v_heads, blocks.keys)
        diagonal, to_bias = jax.vjp(self._diagonal, bias)
        settings = self._settings(blocks, blocks.queries, reverse=True)
        head_bias = self._head_bias(diagonal, bias, settings.layout, reverse=True)
        alone = self.parts == 1 and q.shape[2] == k.shape[2] and not self.exact
        dtypes = jnp.float32 if self.exact else q.dtype, k.dtype if alone else jnp.float32

        def part(xs):
            number, rows, pairs, q, d_out, lse, delta = xs
            here = place.shift - number * length
            return backward(q, k_padded, v_padded, head_bias, rows, pairs, here, d_out, lse, delta, settings, *dtypes)

        split = lambda a, axis, **options: _split(a, axis, self.parts, length, **options)  # noqa: E731
        xs = (
            jnp.arange(self.parts, dtype=jnp.int32),
            self._rows(place.intervals, blocks, self.parts),
            place.maps.backward,
            split(q_heads, 2),
            split(d_out, 2),
            split(lse, 3, constant_values=-MASKED),  # nor for padding
            split(delta, 3),
        )
        if self.parts == 1:
            dq, *sums = part(_part(xs, 0))
        else:

            def add(sums, xs):
                dq, *new = part(xs)
                return jax.tree.map(jnp.add, sums, new), dq

            like = jax.eval_shape(lambda xs: list(part(_part(xs, 0))[1:]), xs)
            sums, dq = jax.lax.scan(add, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like), xs)
            dq = jnp.moveaxis(dq, 0, 2).reshape(*dq.shape[1:3], -1, dq.shape[4])
        dq = jnp.swapaxes(dq[:, :, : self.query_length], 1, 2)[..., : q.shape[3]]
        dk, dv = (self._of_key_heads(a, k) for a in sums[:2])
        d_diagonal = None if diagonal is None else unskew(sums[2], settings.layout)[:, ::-1].astype(diagonal.dtype)
        return dq, dk, dv, to_bias(d_diagonal)[0]

    def _settings(self, blocks, lanes, reverse=False):
        layout = None
        if self.far == EVERYWHERE:
            layout = SkewedLayout(lanes, Far(0, 0), linear=True)
        elif self.far is not None:
            layout = SkewedLayout(lanes, Far(*self.far[::-1]) if reverse else self.far)
        return Settings(blocks, self.scale, self.softcap, layout, self.vmem, self.interpret, self.branches)

    def _diagonal(self, bias):
        """[H, before + 1 + after], where it is not constant yet; None without a table."""
        if bias is None or self.far == EVERYWHERE:
            return None
        return diagonals(bias, self.far.before + 1, self.far.after + 1)

    def _head_bias(self, diagonal, bias, layout, reverse=False):
        if layout is None:
            return None
        if layout.linear:
            slopes = bias.slopes.astype(jnp.float32) * bias_unit(self.softcap)
            return HeadBias(skew_linear(slopes, layout), slopes)
        diagonal = diagonal.astype(jnp.float32) * bias_unit(self.softcap)
        far = jnp.stack([diagonal[:, 0], diagonal[:, -1]], axis=1)
        return HeadBias(skew(diagonal[:, ::-1] if reverse else diagonal, layout), far)

    def _of_key_heads(self, sums, k):
        """Gradients of each query head -> of the key head they share, without padding."""
        batch, length, kv_heads, dim = k.shape
        sums = sums[:, :, :length, :dim].reshape(batch, kv_heads, -1, length, dim)
        return jnp.swapaxes(sums.sum(axis=2).astype(jnp.float32 if self.exact else k.dtype), 1, 2)

    def _rows(self, intervals, blocks, parts):
        """[parts, B or 1, padded length]; None if every query sees every key, of which none is padding."""
        if intervals is None:
            if self.key_length % blocks.keys == 0:
                return None
            start = jnp.zeros((1, self.query_length), jnp.int32)
            intervals = KeyIntervals(start, start + self.key_length)
        length = _round_up(math.ceil(self.query_length / parts), blocks.queries)
        # Padding sees what the last query sees, so that it makes no block partial. Nothing comes of it.
        return jax.tree.map(lambda a: _split(a, 1, parts, length, mode="edge"), intervals)


def _padded_dim(head_dim):
    return next(size for size in _HEAD_DIMS if size >= head_dim)


def _heads_first(x):
    """[B, S, H, D] -> [B, H, S, D], D padded."""
    padding = (0, 0), (0, 0), (0, 0), (0, _padded_dim(x.shape[3]) - x.shape[3])
    return jnp.swapaxes(jnp.pad(x, padding), 1, 2)


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
