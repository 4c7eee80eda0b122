"""T5's bucketed relative-position bias, formed from its table without ever storing a (query, key) array of buckets.

ALiBi's is another of its kind. They depend on `key position - query position` alone, so a bias is one vector of
diagonals per head; a block of the bias matrix is that vector read at shifting offsets (a Toeplitz block).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from t5x_domain.kernels.precision import accumulator


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """A learned bias added to attention logits (Raffel et al. 2020, section 2.1).

    Attributes:
      table: [num_buckets, num_heads] float32, one row a bucket.
      bidirectional: half of the buckets are for keys after the query; otherwise such keys share bucket 0.
      max_distance: distances from here on share the last bucket.
    """

    table: jax.Array
    bidirectional: bool = dataclasses.field(metadata={"static": True})
    max_distance: int = dataclasses.field(default=128, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Alibi:
    """A bias of `-slope * |key - query|` that learns nothing (Press et al. 2022, "Train Short, Test Long", section 3).

    Attributes:
      slopes: [num_heads] float32. Their gradient is 0.
    """

    slopes: jax.Array

    @classmethod
    def of(cls, num_heads: int) -> "Alibi":
        """The published slopes: 2^(-8/n), 2^(-16/n), … for n heads if n is a power of two.

        For other n those of the next lower power of two, then every other one of the next higher (the authors' code,
        `get_slopes`).
        """
        power = 2 ** int(math.log2(num_heads))
        slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
        between = 2.0 ** (-4 * np.arange(1, 2 * power, 2) / power)
        return cls(jnp.asarray(np.concatenate([slopes, between])[:num_heads], jnp.float32))


Bias = RelativeBias | Alibi


def relative_position_bucket(
    relative_position: np.ndarray, *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> np.ndarray:
    """T5's bucket of `key position - query position`, computed on the host.

    Half of a direction's buckets hold one distance each, the other half grow logarithmically up to `max_distance`.

    Args:
      relative_position: integers of any shape.

    Returns:
      int32 of the same shape, in [0, num_buckets).
    """
    distance = -np.asarray(relative_position, np.int64)
    bucket = np.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket += (distance < 0) * num_buckets
        distance = np.abs(distance)
    else:
        distance = np.maximum(distance, 0)
    exact = num_buckets // 2
    # float32 as in the published implementations: bucket borders then fall where their checkpoints expect them.
    growth = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(np.log(max_distance / exact))
    large = np.minimum(exact + (growth.astype(np.float32) * (num_buckets - exact)).astype(np.int64), num_buckets - 1)
    return (bucket + np.where(distance < exact, distance, large)).astype(np.int32)


def saturation(bias: RelativeBias) -> tuple[int, int]:
    """(before, after), both >= 0: one bucket holds `key - query <= -before`, one `key - query >= after`."""
    limit = max(bias.max_distance, bias.table.shape[0]) + 1
    buckets = _buckets(bias, limit, limit)
    before = limit - np.argmax(buckets != buckets[0]) + 1
    after = limit - np.argmax(buckets[::-1] != buckets[-1]) + 1
    return max(int(before), 0), max(int(after), 0)


def _buckets(bias: RelativeBias, before: int, after: int) -> np.ndarray:
    """Of the distances -before ... after."""
    return relative_position_bucket(
        np.arange(-before, after + 1),
        bidirectional=bias.bidirectional,
        num_buckets=bias.table.shape[0],
        max_distance=bias.max_distance,
    )


def diagonals(bias: Bias, query_length: int, key_length: int, query_offset: jax.typing.ArrayLike = 0) -> jax.Array:
    """Bias of every diagonal: entry `j` belongs to `key - query = j - (query_length - 1) - query_offset`.

    Returns:
      [num_heads, query_length + key_length - 1] float32.
    """
    relative_position = jnp.arange(query_length + key_length - 1) - (query_length - 1) - query_offset
    return bias_at(bias, relative_position)


def bias_at(bias: Bias, relative_position: jax.Array) -> jax.Array:
    """Bias of few distances `key position - query position`, int32 [...]: [num_heads, ...] float32."""
    if isinstance(bias, Alibi):
        slopes = jax.lax.stop_gradient(bias.slopes).reshape(-1, *[1] * relative_position.ndim)
        return -slopes * jnp.abs(relative_position).astype(slopes.dtype)
    # Looked up, because logarithms on a device need not round as the host's do.
    before, after = saturation(bias)
    buckets = jnp.asarray(_buckets(bias, before, after))[jnp.clip(relative_position, -before, after) + before]
    table = bias.table.astype(accumulator(bias.table.dtype))
    # A product with one-hot rows, not a gather: its gradient is a product too, hence deterministic on every device.
    one_hot = jax.nn.one_hot(buckets, bias.table.shape[0], dtype=table.dtype)
    return jnp.einsum("...n,nh->h...", one_hot, table, precision=jax.lax.Precision.HIGHEST)


def toeplitz(diagonal: jax.Array, rows: int) -> jax.Array:
    """[H, rows + columns - 1] diagonals -> [H, rows, columns] with `out[h, r, c] = diagonal[h, c - r + rows - 1]`.

    Repeating the vector with one more element than the row is long moves every next row one step to the right, so
    only copies are needed: no gather, and the transpose (`toeplitz_transpose`) needs no scatter.
    """
    heads, length = diagonal.shape
    padded = jnp.pad(diagonal, ((0, 0), (0, 1)))
    skewed = jnp.tile(padded, (1, rows))[:, : rows * length].reshape(heads, rows, length)
    return skewed[:, :, rows - 1 :]


def toeplitz_transpose(block: jax.Array) -> jax.Array:
    """Sums of the diagonals of [H, rows, columns]: the gradient of `toeplitz`, [H, rows + columns - 1]."""
    heads, rows, columns = block.shape
    length = rows + columns - 1
    skewed = jnp.pad(block, ((0, 0), (0, 0), (rows - 1, 0))).reshape(heads, rows * length)
    return jnp.pad(skewed, ((0, 0), (0, rows))).reshape(heads, rows, length + 1).sum(axis=1)[:, :length]
