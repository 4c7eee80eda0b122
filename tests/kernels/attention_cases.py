"""Calls of attention with a dense float64 reference that carries its own error bound."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from t5x_domain.kernels.attention import attention, visible_keys
from t5x_domain.kernels.attention_kernel import Place, attend
from t5x_domain.kernels.mask import Mask, SegmentIds
from t5x_domain.kernels.relative_bias import Alibi, RelativeBias, relative_position_bucket

# Unit roundoffs of the inputs' dtype and of the one that sums are kept in.
UNITS = {"bfloat16": (2**-9, 2**-24), "float32": (2**-24, 2**-24), "float64": (2**-53, 2**-53)}


def examples(quick: int) -> int:
    """Examples of a property: `make test-kernels` takes EXAMPLES times as many."""
    return quick * int(os.environ.get("EXAMPLES", 1))


@dataclasses.dataclass
class Case:
    """Arrays in float64 and the options of one call."""

    q: np.ndarray  # [B, Sq, H, D]
    k: np.ndarray  # [B, Sk, Hk, D]
    v: np.ndarray
    d_out: np.ndarray
    mask: Mask
    table: np.ndarray | None = None  # [buckets, H]
    bidirectional: bool = True
    alibi: bool = False
    query_ids: np.ndarray | None = None
    key_ids: np.ndarray | None = None
    prefix: np.ndarray | None = None
    scale: float = 1.0
    softcap: float | None = None

    def allowed(self) -> np.ndarray:
        """[B, Sq, Sk] bool, the mask pair by pair."""
        (batch, queries), keys = self.q.shape[:2], self.k.shape[1]
        i, j = np.arange(queries)[:, None], np.arange(keys)[None]
        result = np.ones((batch, queries, keys), bool)
        if self.query_ids is not None:
            result &= (self.query_ids[:, :, None] == self.key_ids[:, None]) & (self.query_ids[:, :, None] != 0)
        if self.mask.causal:
            in_prefix = np.zeros((batch, 1, keys), bool) if self.prefix is None else self.prefix[:, None] > 0
            result &= (j <= i) | in_prefix
        if self.mask.window is not None:
            near = (j - i >= -self.mask.window[0]) & (j - i <= self.mask.window[1])
            result &= near | self._global(self.query_ids, queries, 2) | self._global(self.key_ids, keys, 1)
        return result

    def _global(self, ids, length, axis) -> np.ndarray:
        """Tokens among the first of their segment, ready to broadcast to [B, Sq, Sk]."""
        ids = np.ones((1, length), np.int32) if ids is None else ids
        place = np.array([[(row[:i] == row[i]).sum() for i in range(length)] for row in ids])
        return np.expand_dims(place < self.mask.global_tokens, axis)

    def buckets(self) -> np.ndarray:
        """[Sq, Sk], or [B, Sq, Sk], rows of the table."""
        distance = np.arange(self.k.shape[1])[None] - np.arange(self.q.shape[1])[:, None]
        return relative_position_bucket(distance, bidirectional=self.bidirectional, num_buckets=8, max_distance=20)

    def reference(self, dtype: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Output and gradients, each with a bound of what rounding may change.

        Every result is a sum of products of exact inputs and of probabilities. A sum of n terms has an error of at most
        n u times the sum of the terms' magnitudes, and exp turns an absolute error of a logit into a relative one of a
        probability. So: relative error of any term of a query <= its epsilon, bound = the same sum over epsilon times
        magnitudes.
        """
        groups = self.q.shape[2] // self.k.shape[2]
        k, v = (np.repeat(a, groups, axis=2) for a in (self.k, self.v))
        queries, keys, dim = self.q.shape[1], k.shape[1], k.shape[3]
        product = lambda spec, a, b: (np.einsum(spec, a, b), np.einsum(spec, abs(a), abs(b)))  # noqa: E731
        raw, raw_size = (self.scale * a for a in product("bihd,bjhd->bhij", self.q, k))
        bucket = self.buckets()
        if self.table is not None:
            bias = np.moveaxis(self.table[bucket], -1, -3)
            raw, raw_size = raw + bias, raw_size + abs(bias)
        if self.alibi:
            slopes = np.asarray(Alibi.of(self.q.shape[2]).slopes, np.float64)[:, None, None]
            bias = -slopes * abs(np.arange(keys)[None] - np.arange(queries)[:, None])
            raw, raw_size = raw + bias, raw_size + abs(bias)
        logits, slope = raw, 1.0
        if self.softcap is not None:
            logits = self.softcap * np.tanh(raw / self.softcap)
            slope = 1 - np.tanh(raw / self.softcap) ** 2
        allowed = self.allowed()[:, None]
        p = np.where(allowed, np.exp(logits), 0)
        p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)

        # A logit's own sum has dim terms and the bias two, scale, cap, mask and log-sum-exp (keys) round a few times
        # more; the cap's derivative 1 - tanh² cancels, which costs its relative error nothing below |raw| ~ softcap.
        # A query's probabilities are as wrong as the worst of its logits.
        top = (raw_size * allowed).max(-1, keepdims=True) + np.log(keys) + 1
        steps = dim + keys + 8
        unit, sum_unit = UNITS[dtype]
        terms = 2 * queries * groups * self.q.shape[0] + keys + dim
        # Probabilities, their gradient, the output and `delta` pass through the inputs' dtype.
        epsilon = 4 * sum_unit * steps * top + sum_unit * terms + 4 * unit
        if dtype == "float64":
            epsilon *= 2  # the reference rounds as much

        out, out_size = product("bhij,bjhd->bihd", p, v)
        dp, dp_size = product("bihd,bjhd->bhij", self.d_out, v)
        delta, delta_size = (
            np.einsum("bihd,bihd->bhi", a, b)[..., None] for a, b in ((out, self.d_out), (out_size, abs(self.d_out)))
        )
        ds, ds_error = p * (dp - delta) * slope, epsilon * p * (dp_size + delta_size)
        error = lambda spec, a, b: np.einsum(spec, a, abs(b))  # noqa: E731
        out_error = error("bhij,bjhd->bihd", epsilon * p, v)
        dv, dv_error = np.einsum("bhij,bihd->bjhd", p, self.d_out), error("bhij,bihd->bjhd", epsilon * p, self.d_out)
        dq, dq_error = np.einsum("bhij,bjhd->bihd", ds, k), error("bhij,bjhd->bihd", ds_error, k)
        dk, dk_error = np.einsum("bhij,bihd->bjhd", ds, self.q), error("bhij,bihd->bjhd", ds_error, self.q)
        num_buckets = bucket.max() + 1 if self.table is None else len(self.table)
        one_hot = np.broadcast_to(np.eye(num_buckets)[bucket], (*ds.shape[:1], *ds.shape[2:], num_buckets))
        d_table, d_table_error = (np.einsum("bijn,bhij->nh", one_hot, a) for a in (ds, ds_error))
        grouped = lambda a: a.reshape(*a.shape[:2], -1, groups, dim).sum(3)  # noqa: E731
        scaled = self.scale
        return {
            "out": (out, out_error),
            "q": (scaled * dq, scaled * dq_error),
            "k": (scaled * grouped(dk), scaled * grouped(dk_error)),
            "v": (grouped(dv), grouped(dv_error)),
            "table": (d_table, d_table_error),
        }

    def call(self, q, k, v, table, attend=attention):
        """Our kernel, or one with its arguments."""
        ids = None
        if self.query_ids is not None:
            ids = SegmentIds(jnp.asarray(self.query_ids), jnp.asarray(self.key_ids))
        bias = None if table is None else RelativeBias(table, self.bidirectional, 20)
        return attend(
            q,
            k,
            v,
            mask=self.mask,
            relative_bias=Alibi.of(q.shape[2]) if self.alibi else bias,
            segment_ids=ids,
            prefix=None if self.prefix is None else jnp.asarray(self.prefix),
            scale=self.scale,
            softcap=self.softcap,
        )


def kernel_call(make_kernel):
    """`attention`, but of the kernel that `make_kernel(q, k, bias, **options)` gives."""

    def call(q, k, v, *, mask, relative_bias, segment_ids, prefix, **options):
        intervals = visible_keys(mask, q, k, segment_ids=segment_ids, prefix=prefix)
        kernel = make_kernel(q, k, relative_bias, **options)
        place = Place(intervals, kernel.maps(intervals, jnp.int32(0)), jnp.int32(0))
        return attend(kernel, q, k, v, relative_bias, place)

    return call


def check(case: Case, dtype: str = "float32", attend=attention) -> None:
    """Compares output and all gradients, element by element."""
    # The reference starts from the rounded inputs, so that only the kernel's own rounding is left.
    cast = lambda a: jnp.asarray(a, dtype)  # noqa: E731
    exact = {name: np.asarray(cast(getattr(case, name)), np.float64) for name in ("q", "k", "v", "d_out")}
    table = None if case.table is None else jnp.asarray(case.table, jnp.promote_types(dtype, jnp.float32))
    if table is not None:
        exact["table"] = np.asarray(table, np.float64)
    expected = dataclasses.replace(case, **exact).reference(dtype)
    inputs = (cast(case.q), cast(case.k), cast(case.v), table)

    @jax.jit
    def run(inputs, d_out):
        out, pull = jax.vjp(lambda *inputs: case.call(*inputs, attend), *inputs)
        return out, *pull(d_out)

    for (name, (value, bound)), actual in zip(expected.items(), run(inputs, cast(case.d_out)), strict=True):
        if actual is None:
            assert name == "table" and table is None
            continue
        error = np.abs(np.asarray(actual, np.float64) - value)
        assert (error <= bound).all(), (
            f"{name}: {error.max():.3g}, {(error / np.maximum(bound, 1e-300)).max():.3g} bounds"
        )


def segments(rng: np.random.Generator, batch: int, length: int, count: int) -> np.ndarray:
    """`count` packed segments of random lengths, some perhaps empty, and padding at the end."""
    borders = np.sort(rng.integers(0, length + 1, (batch, count)), axis=1)
    ids = 1 + (np.arange(length)[None, :, None] >= borders[:, None]).sum(-1)
    return np.where(ids <= count, ids, 0).astype(np.int32)


def leading(rng: np.random.Generator, ids: np.ndarray) -> np.ndarray:
    """A prefix of random length of every segment."""
    prefix = np.zeros_like(ids)
    for row, mark in zip(ids, prefix, strict=True):
        for segment in set(row[row > 0]):
            positions = np.flatnonzero(row == segment)
            mark[positions[: rng.integers(0, len(positions) + 1)]] = 1
    return prefix


def make(rng, batch=2, queries=40, keys=40, heads=4, kv_heads=2, dim=8, **options) -> Case:
    """A case of ordinary size."""
    normal = rng.standard_normal
    return Case(
        q=normal((batch, queries, heads, dim)),
        k=normal((batch, keys, kv_heads, dim)),
        v=normal((batch, keys, kv_heads, dim)),
        d_out=normal((batch, queries, heads, dim)),
        **options,
    )
