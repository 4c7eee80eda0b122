"""The decoder with a cache of keys and values: the prompt at once, then a position at a time, shapes never changing.

Prompts of unequal lengths are moved to the right end of their room, so that every row of a batch writes its next
position into the same slot of the cache and sees the same relative distances there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_domain.kernels.decode import KeysValues
from t5x_domain.kernels.relative_bias import Bias, diagonals
from t5x_domain.models.attention import Attention
from t5x_domain.models.stack import Block, Stack
from t5x_domain.parallel.attention import decode_attention


class Cache(NamedTuple):
    """What decoded positions leave behind.

    Attributes:
      layers: keys and values of each layer, [B, Hk, S, D].
      start: [B, 1] int32, first slot of each row; those before are empty.
      used: [] int32, slots in use, the same in all rows.
    """

    layers: list[KeysValues]
    start: jax.Array
    used: jax.Array

    @property
    def position(self) -> jax.Array:
        """[B, 1] int32: the next position of each row."""
        return self.used - self.start


class Memory(NamedTuple):
    """An encoder's output as each layer of the decoder attends to it; `length` is [B, 1] int32, its tokens."""

    layers: list[KeysValues]
    length: jax.Array


def blocks(stack: Stack) -> list[Block]:
    """The layers of an unrolled stack."""
    if stack.layers is not None:
        raise ValueError("decoding needs a model with ModelConfig.scan_layers=False, as `open_model` makes it")
    return list(stack.rest.blocks)


def empty_cache(stack: Stack, rows: int, length: int, dtype: jnp.dtype) -> Cache:
    """For `length` positions of `rows` sequences that begin with the first decoded token."""
    config = stack.config
    empty = jnp.zeros((rows, config.kv_heads, length, config.head_dim), dtype)
    layers = [KeysValues(empty, empty) for _ in blocks(stack)]
    return Cache(layers, jnp.zeros((rows, 1), jnp.int32), jnp.int32(0))


def read_prompt(
    stack: Stack, x: jax.Array, lengths: jax.Array, room: int, *, prefix: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """Runs a decoder over prompts.

    Args:
      stack: a decoder without cross-attention.
      x: [B, S, embed_dim], embedded prompts with padding at the end.
      lengths: [B] int32, their tokens.
      room: slots for what will be decoded.
      prefix: [B, S], 1 on tokens seen by the whole prompt; None for a causal prompt.

    Returns:
      The normalised hidden state of each prompt's last token [B, 1, embed_dim], and the cache.
    """
    size = x.shape[1]
    ids = (jnp.arange(size) < lengths[:, None]).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(size), ids.shape)
    shift = (jnp.arange(size) - (size - lengths[:, None])) % size  # slot -> token

    def to_the_right(heads_last: jax.Array) -> jax.Array:
        moved = jnp.take_along_axis(heads_last, shift[:, :, None, None], axis=1)
        return jnp.pad(jnp.moveaxis(moved, 1, 2), ((0, 0), (0, 0), (0, room), (0, 0)))

    written = []
    plans = stack.plans(x, ids, prefix)
    for block in blocks(stack):
        layer, normed = block.self_attention.inner, block.self_attention.enter(x)
        written.append(KeysValues(*map(to_the_right, layer.keys_values(normed, positions))))
        bias = _bias_of(stack, block)
        x = block.self_attention.add(x, layer(normed, plan=plans[block.kind], positions=positions, relative_bias=bias))
        x = block.mlp(x, None)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return stack.close(last), Cache(written, (size - lengths)[:, None].astype(jnp.int32), jnp.int32(size))


def read_memory(stack: Stack, memory: jax.Array, lengths: jax.Array) -> Memory:
    """Keys and values of an encoder's output [B, S, embed_dim] for every layer; `lengths` [B] are its tokens."""
    layers = [
        KeysValues(*map(_heads_first, block.cross_attention.inner.keys_values(memory, None))) for block in blocks(stack)
    ]
    return Memory(layers, lengths[:, None])


def next_position(stack: Stack, x: jax.Array, cache: Cache, memory: Memory | None = None) -> tuple[jax.Array, Cache]:
    """Runs a decoder for one more position of every row.

    Args:
      stack: the decoder.
      x: [B, 1, embed_dim], the token embedded at `cache.position`.
      cache: the positions before it.
      memory: of an encoder, for B / n rows: the n hypotheses of an input follow one another.

    Returns:
      The normalised hidden state [B, 1, embed_dim] and the cache with this position.
    """
    positions = cache.position
    shared = None if stack.relative_bias is None else _bias_at(stack.relative_bias(), cache)
    written = []
    for number, block in enumerate(blocks(stack)):
        layer, normed = block.self_attention.inner, block.self_attention.enter(x)
        new = KeysValues(*map(_heads_first, layer.keys_values(normed, positions)))
        start = cache.start if layer.window is None else jnp.maximum(cache.start, cache.used - layer.window[0])
        attended = decode_attention(
            layer.queries(normed, positions),
            cache.layers[number],
            new,
            start=start,
            stop=cache.used,
            bias=shared if block.relative_bias is None else _bias_at(block.relative_bias(), cache),
            scale=layer.scale,
            softcap=layer.config.attention_softcap,
            backend=layer.config.attention_backend,
        )
        x = block.self_attention.add(x, layer.output(attended))
        if memory is not None:
            normed = block.cross_attention.enter(x)
            y = _attend_to_memory(block.cross_attention.inner, normed, memory.layers[number], memory.length)
            x = block.cross_attention.add(x, y)
        x = block.mlp(x, None)
        written.append(new)
    write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, cache.used, axis=2)  # noqa: E731
    return stack.close(x), Cache(jax.tree.map(write, cache.layers, written), cache.start, cache.used + 1)


def _attend_to_memory(layer: Attention, x: jax.Array, memory: KeysValues, length: jax.Array) -> jax.Array:
    """Cross-attention in which the hypotheses of an input are queries of the same row, so that it is read once."""
    inputs = memory.keys.shape[0]
    q = layer.queries(x, None)
    attended = decode_attention(
        q.reshape(inputs, -1, *q.shape[2:]),
        memory,
        None,
        start=jnp.zeros_like(length),
        stop=length,
        scale=layer.scale,
        softcap=layer.config.attention_softcap,
        backend=layer.config.attention_backend,
    )
    return layer.output(attended.reshape(q.shape))


def _bias_of(stack: Stack, block: Block) -> Bias | None:
    table = block.relative_bias or stack.relative_bias
    return None if table is None else table()


def _bias_at(bias: Bias, cache: Cache) -> jax.Array:
    """[H, S + 1]: of the cached slots for a query in the slot after them, and of the query's own."""
    length = cache.layers[0].keys.shape[2]
    along = diagonals(bias, length, length)
    past = jax.lax.dynamic_slice_in_dim(along, length - 1 - cache.used, length, axis=1)
    return jnp.concatenate([past, along[:, length - 1 : length]], axis=1)


def _heads_first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, 1, 2)
