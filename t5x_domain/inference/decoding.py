"""How the next token is chosen: greedy, sampling, beam search.

Each works on `step(tokens [R, 1], cache) -> (logits [R, V], cache)` with shapes that never change, inside one loop that
ends as soon as every row has.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp

from t5x_domain.errors import UserError

Step = Callable[[jax.Array, Any], tuple[jax.Array, Any]]
_NEVER = -1e9  # of a hypothesis that does not count; finite, so that it can be compared and divided


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Decoding:
    """What is written, and how it is chosen.

    Attributes:
      max_tokens: tokens to write at most, EOS among them.
      num_beams: hypotheses of a beam search; 1 for none.
      length_penalty: a hypothesis scores its log-probability divided by its tokens (EOS counted) to this power.
      num_outputs: the best so many of a beam search, or so many samples.
      temperature: 0 takes the likeliest token; above, logits are divided by it and tokens drawn.
      top_k: draw from the k likeliest tokens only (Fan et al. 2018, section 5.4).
      top_p: draw from the likeliest tokens that together have this probability (Holtzman et al. 2020, section 3.1).
      min_p: draw from tokens with at least this share of the likeliest one's probability (Nguyen et al. 2025).
      seed: of what is drawn; each input and output has its own stream, whatever else is in its batch.
    """

    max_tokens: int = 64
    num_beams: int = 1
    length_penalty: float = 1.0
    num_outputs: int = 1
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for values that contradict each other."""
        for key in ("max_tokens", "num_beams", "num_outputs"):
            if getattr(self, key) < 1:
                raise UserError(f"Decoding.{key} = {getattr(self, key)}: it must be at least 1.")
        if self.temperature < 0:
            raise UserError(f"Decoding.temperature = {self.temperature}: it must be 0 (the likeliest token) or above.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"Decoding.top_k = {self.top_k}: it must be at least 1, or None.")
        for key in ("top_p", "min_p"):
            if getattr(self, key) is not None and not 0 < getattr(self, key) <= 1:
                raise UserError(f"Decoding.{key} = {getattr(self, key)}: it must be above 0 and at most 1, or None.")
        if self.temperature == 0:
            if unused := [key for key in ("top_k", "top_p", "min_p") if getattr(self, key) is not None]:
                raise UserError(f"Decoding.{unused[0]} has no effect without Decoding.temperature above 0; set both.")
            if self.num_outputs > self.num_beams:
                raise UserError(
                    f"Decoding.num_outputs = {self.num_outputs} needs as many Decoding.num_beams, or a "
                    "Decoding.temperature above 0 to draw several."
                )
        elif self.num_beams > 1:
            raise UserError("Decoding.num_beams is for temperature = 0; draw several with Decoding.num_outputs.")

    @property
    def hypotheses(self) -> int:
        """Rows that an input takes while it is decoded."""
        return max(self.num_beams, self.num_outputs)


class Written(NamedTuple):
    """tokens [B, n, T] int32, 0 after EOS, and scores [B, n] float32, nats; see `Decoding.length_penalty`."""

    tokens: jax.Array
    scores: jax.Array


class _Row(NamedTuple):
    length: jax.Array  # [] int32, tokens written, by rows that are not done
    tokens: jax.Array  # [R, T]
    log_probability: jax.Array  # [R]
    done: jax.Array  # [R] bool
    num_tokens: jax.Array  # [R]


def decode_rows(
    step: Step, logits: jax.Array, cache: Any, decoding: Decoding, *, eos_id: int, vocab_size: int, streams: jax.Array
) -> Written:
    """Greedy decoding or sampling, each row for itself.

    Args:
      step: runs the model for one position.
      logits: [R, V] float32 of the first token; R = inputs times `num_outputs`.
      cache: what `step` carries.
      decoding: how.
      eos_id: ends a row.
      vocab_size: ids from here on are rows of the embedding without a token.
      streams: [R] keys, one a row.
    """
    rows = logits.shape[0]

    def choose(state: _Row, logits: jax.Array) -> _Row:
        logits = _only_tokens(jax.nn.log_softmax(logits), vocab_size)
        if decoding.temperature == 0:
            chosen = jax.lax.top_k(logits, 1)[1][:, 0]  # argmax, which XLA makes five times slower on a CPU
        else:
            keys = jax.vmap(jax.random.fold_in, (0, None))(streams, state.length)
            chosen = jax.vmap(jax.random.categorical)(keys, truncated(logits, decoding))
        gained = jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0]
        token = jnp.where(state.done, 0, chosen).astype(jnp.int32)
        return _Row(
            state.length + 1,
            state.tokens.at[:, state.length].set(token),
            state.log_probability + jnp.where(state.done, 0.0, gained),
            state.done | (chosen == eos_id),
            state.num_tokens + ~state.done,
        )

    def more(carry: tuple[_Row, Any]) -> jax.Array:
        return (carry[0].length < decoding.max_tokens) & ~carry[0].done.all()

    def write(carry: tuple[_Row, Any]) -> tuple[_Row, Any]:
        state, cache = carry
        logits, cache = step(jax.lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=1), cache)
        return choose(state, logits), cache

    start = _Row(
        jnp.int32(0),
        jnp.zeros((rows, decoding.max_tokens), jnp.int32),
        jnp.zeros(rows, logits.dtype),
        jnp.zeros(rows, bool),
        jnp.zeros(rows, jnp.int32),
    )
    state = jax.lax.while_loop(more, write, (choose(start, logits), cache))[0]
    scores = state.log_probability / state.num_tokens.astype(logits.dtype) ** decoding.length_penalty
    shape = (-1, decoding.num_outputs)
    return Written(state.tokens.reshape(*shape, decoding.max_tokens), scores.reshape(shape))


def truncated(logits: jax.Array, decoding: Decoding) -> jax.Array:
    """Logits [R, V] after temperature, then top-k, top-p and min-p; what cannot be drawn is -inf."""
    logits = logits / decoding.temperature
    if decoding.top_k is not None:
        least = jax.lax.top_k(logits, min(decoding.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if decoding.top_p is not None:
        descending = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1) - jax.nn.softmax(descending, axis=-1)
        kept = (before < decoding.top_p).sum(axis=-1, keepdims=True)  # at least one
        logits = jnp.where(logits < jnp.take_along_axis(descending, kept - 1, axis=-1), -jnp.inf, logits)
    if decoding.min_p is not None:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(decoding.min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


class _Beams(NamedTuple):
    length: jax.Array  # [] int32, tokens written
    tokens: jax.Array  # [B, K, T] of running hypotheses
    scores: jax.Array  # [B, K] their log-probabilities, falling
    ended: jax.Array  # [B, K, T] hypotheses that ended in EOS, or at max_tokens
    ended_scores: jax.Array  # [B, K] falling; _NEVER where there is none
    open: jax.Array  # [B] bool, a running hypothesis may still beat the worst that ended


def beam_search(
    step: Step, logits: jax.Array, cache: Any, decoding: Decoding, *, eos_id: int, vocab_size: int
) -> Written:
    """Beam search (Sutskever et al. 2014) that ends and scores as `transformers` does with `early_stopping=False`.

    Of the 2K likeliest continuations the best K that do not end go on; those that end count if they are among the
    first K. An input is finished when K have ended and the best running hypothesis, at its present length, scores no
    more than the worst of them.

    Args:
      step: runs the model for one position of B * K rows.
      logits: [B * K, V] float32 of the first token, the same for the K rows of an input.
      cache: what `step` carries; its arrays with B * K rows are reordered with the hypotheses.
      decoding: how.
      eos_id: ends a hypothesis.
      vocab_size: ids from here on are rows of the embedding without a token.
    """
    beams, room = decoding.num_beams, decoding.max_tokens
    inputs = logits.shape[0] // beams
    if 2 * beams > vocab_size:
        raise UserError(f"Decoding.num_beams = {beams}: at most half of the vocabulary's {vocab_size} ids.")

    def choose(state: _Beams, logits: jax.Array) -> tuple[_Beams, jax.Array]:
        """The state one token further, and [B, K] which hypothesis each of the new ones goes on from."""
        gained = _only_tokens(jax.nn.log_softmax(logits), vocab_size).reshape(inputs, beams, -1)
        total = (gained + state.scores[:, :, None]).reshape(inputs, -1)
        scores, index = jax.lax.top_k(total, 2 * beams)
        parent, token = index // logits.shape[-1], (index % logits.shape[-1]).astype(jnp.int32)
        tokens = _of(state.tokens, parent).at[:, :, state.length].set(token)
        length = state.length + 1
        ends = (token == eos_id) | (length == room)

        running, chosen = jax.lax.top_k(jnp.where(ends, scores + _NEVER, scores), beams)
        counted = ends & (jnp.arange(2 * beams) < beams) & state.open[:, None]
        weight = length.astype(scores.dtype) ** decoding.length_penalty
        candidates = jnp.concatenate([state.ended_scores, jnp.where(counted, scores / weight, _NEVER)], axis=1)
        ended_scores, kept = jax.lax.top_k(candidates, beams)
        ended = _of(jnp.concatenate([state.ended, tokens], axis=1), kept)
        worst = ended_scores[:, -1]
        still_open = state.open & ((worst <= _NEVER / 2) | (running[:, 0] / weight > worst))
        new = _Beams(length, _of(tokens, chosen), running, ended, ended_scores, still_open)
        return new, _of(parent, chosen)

    def more(carry: tuple[_Beams, Any]) -> jax.Array:
        return (carry[0].length < room) & carry[0].open.any()

    def write(carry: tuple[_Beams, Any]) -> tuple[_Beams, Any]:
        state, cache = carry
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=2)
        logits, cache = step(last.reshape(-1, 1), cache)
        state, parent = choose(state, logits)
        return state, _reordered(cache, (parent + beams * jnp.arange(inputs)[:, None]).reshape(-1))

    first = jnp.where(jnp.arange(beams) == 0, 0.0, _NEVER).astype(logits.dtype)  # the K rows are still the same
    start = _Beams(
        jnp.int32(0),
        jnp.zeros((inputs, beams, room), jnp.int32),
        jnp.broadcast_to(first, (inputs, beams)),
        jnp.zeros((inputs, beams, room), jnp.int32),
        jnp.full((inputs, beams), _NEVER, logits.dtype),
        jnp.ones(inputs, bool),
    )
    state = jax.lax.while_loop(more, write, (choose(start, logits)[0], cache))[0]
    best = slice(0, decoding.num_outputs)
    return Written(state.ended[:, best], state.ended_scores[:, best])


def _of(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, index[b, k]] for x [B, N, ...] and index [B, K]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def _reordered(cache: Any, rows: jax.Array) -> Any:
    return jax.tree.map(lambda a: a[rows] if a.ndim else a, cache)


def _only_tokens(logits: jax.Array, vocab_size: int) -> jax.Array:
    return (
        logits
        if vocab_size >= logits.shape[-1]
        else jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
    )
