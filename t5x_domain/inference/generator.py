"""From ids that a model reads to what it writes: batches of few shapes, compiled once each."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5x_domain.errors import UserError
from t5x_domain.inference.cache import empty_cache, next_position, read_memory, read_prompt
from t5x_domain.inference.decoding import Decoding, Written, beam_search, decode_rows
from t5x_domain.inference.opened import Opened
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder, LanguageModel
from t5x_domain.models.names import path_name
from t5x_domain.models.rtd import DetectingEncoderDecoder
from t5x_domain.parallel.sharding import put, use_mesh


class Output(NamedTuple):
    """What was written for an input.

    Attributes:
      tokens: int32 [t], without EOS.
      text: the same decoded.
      score: log-probability in nats, divided by the number of tokens (EOS counted) to the power of `length_penalty`.
    """

    tokens: np.ndarray
    text: str
    score: float


class Generator:
    """Writes the continuation, or the answer, to inputs."""

    def __init__(self, model: Opened, decoding: Decoding, *, batch_size: int = 8) -> None:
        """Compiles nothing yet.

        Raises:
          UserError: the model has no decoder.
        """
        if model.blueprint.model_class not in (EncoderDecoder, DetectingEncoderDecoder, DecoderOnly):
            raise UserError(f"{model.origin}: {model.blueprint.model_class.__name__} has no decoder to write with.")
        if batch_size < 1:
            raise UserError(f"batch_size = {batch_size}: it must be at least 1.")
        self._model, self._decoding, self._batch_size = model, decoding, batch_size
        whole = NamedSharding(model.blueprint.mesh, PartitionSpec())  # every process reads all of it
        # Of parameters and a batch {"tokens" [B, S], "lengths" [B], "numbers" [B]} int32 on the mesh.
        self.write = jax.jit(self._decode, in_shardings=(model.blueprint.shardings, None), out_shardings=whole)

    def __call__(self, inputs: Sequence[np.ndarray], *, first: int = 0, params: Any = None) -> list[list[Output]]:
        """The outputs for each input, the best first.

        Args:
          inputs: ids as `Opened.inputs` makes them, int32 [n] each.
          first: number of the first input; it decides what is drawn for it.
          params: instead of the model's own, in its shapes; nothing is compiled again.

        Raises:
          UserError: the model has learned positions, and too few for what it is to read or write.
        """
        self._require_room(inputs)
        params = self._model.params if params is None else params
        outputs: list[list[Output]] = [[] for _ in inputs]
        # Inputs of like lengths share a batch.
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            written = self._run(params, [inputs[i] for i in chosen], [first + i for i in chosen])
            for i, tokens, scores in zip(chosen, *map(np.asarray, written), strict=False):
                found = [self._output(t, s) for t, s in zip(tokens, scores, strict=True)]
                outputs[i] = sorted(found, key=lambda output: -output.score)
        return outputs

    def _run(self, params: Any, inputs: Sequence[np.ndarray], numbers: Sequence[int]) -> Written:
        rows, lengths = padded(inputs, self._batch_size, at_most=self._room)
        numbers = np.resize(np.array(numbers, np.int32), self._batch_size)
        batch = {"tokens": rows, "lengths": lengths, "numbers": numbers}
        return self.write(params, put(self._model.blueprint.mesh, batch))

    @property
    def _room(self) -> int | None:
        """Tokens of an input at most, None for any number: a decoder alone writes into positions behind its prompt."""
        known = self._model.blueprint.config.longest
        is_joined = known is not None and self._model.blueprint.model_class is DecoderOnly
        return known - self._decoding.max_tokens if is_joined else known

    def _require_room(self, inputs: Sequence[np.ndarray]) -> None:
        known, to_write = self._model.blueprint.config.longest, self._decoding.max_tokens
        to_read = max((len(tokens) for tokens in inputs), default=0)
        if known is not None and (to_read > self._room or to_write > known):
            raise UserError(
                f"{self._model.origin}: has ModelConfig.max_positions = {known}, too few to read {to_read} tokens and "
                f"write Decoding.max_tokens = {to_write}; give shorter inputs or write less."
            )

    def _output(self, tokens: np.ndarray, score: np.ndarray) -> Output:
        vocabulary = self._model.vocabulary
        ends = np.flatnonzero(tokens == vocabulary.eos_id)
        tokens = tokens[: ends[0]] if len(ends) else tokens
        return Output(tokens, vocabulary.decode(tokens), float(score))

    def _decode(self, params: Any, batch: dict[str, jax.Array]) -> Written:
        model, decoding, vocabulary = self._model, self._decoding, self._model.vocabulary
        count = decoding.hypotheses
        with use_mesh(model.blueprint.mesh):
            network = model.blueprint.merge(_in_compute_dtype(params, model.blueprint.config.dtype))
            read = _read_inputs if isinstance(network, EncoderDecoder) else _read_prompts
            logits, cache, memory = read(
                network, batch["tokens"], batch["lengths"], count, decoding.max_tokens, model.reads_whole_inputs
            )

            def step(tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
                hidden, cache = next_position(network.decoder, network.embed(tokens, cache.position), cache, memory)
                return _logits(network, hidden), cache

            ids = {"eos_id": vocabulary.eos_id, "vocab_size": vocabulary.vocab_size}
            if decoding.num_beams > 1:
                return beam_search(step, logits, cache, decoding, **ids)
            seed = jax.random.key(decoding.seed)
            of_output = jax.vmap(jax.random.fold_in, (None, 0))
            of_input = jax.vmap(lambda number: of_output(jax.random.fold_in(seed, number), jnp.arange(count)))
            return decode_rows(step, logits, cache, decoding, **ids, streams=of_input(batch["numbers"]).reshape(-1))


def row_length(sequences: Sequence[np.ndarray], at_most: int | None = None) -> int:
    """Room for the longest: 16 times 1, 1.5, 2, 3, 4, 6, …, so that few shapes are compiled.

    At most `at_most`, if that is room enough: what the positions of a model suffice for.
    """
    longest = max((len(sequence) for sequence in sequences), default=1)
    power = 2 ** math.ceil(math.log2(max(longest / 16, 1)))
    length = int(16 * power * (0.75 if power > 1 and longest <= 12 * power else 1))
    return length if at_most is None else max(longest, min(length, at_most))


def padded(sequences: Sequence[np.ndarray], rows: int, *, at_most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Sequences in int32 [rows, row_length] with zeros behind them, and their lengths [rows]; rows left over have 1."""
    result, lengths = np.zeros((rows, row_length(sequences, at_most)), np.int32), np.ones(rows, np.int32)
    for row, sequence in enumerate(sequences):
        result[row, : len(sequence)] = sequence
        lengths[row] = len(sequence)
    return result, lengths


def _read_inputs(
    network: EncoderDecoder, tokens: jax.Array, lengths: jax.Array, count: int, room: int, whole: bool
) -> tuple[jax.Array, Any, Any]:
    """Logits [B * count, V] of the first token, the decoder's cache, and the encoder's memory."""
    del whole
    segment_ids = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
    memory = network.encoder(network.embed(tokens), segment_ids=segment_ids)
    memory = read_memory(network.decoder, memory, lengths)
    rows = tokens.shape[0] * count
    cache = empty_cache(network.decoder, rows, room, memory.layers[0].keys.dtype)
    begin = network.embed(jnp.zeros((rows, 1), jnp.int32))  # id 0 begins what is written
    hidden, cache = next_position(network.decoder, begin, cache, memory)
    return _logits(network, hidden), cache, memory


def _read_prompts(
    network: DecoderOnly, tokens: jax.Array, lengths: jax.Array, count: int, room: int, whole: bool
) -> tuple[jax.Array, Any, None]:
    """The same for prompts of a decoder alone, which begin with id 0 as in training."""
    tokens, lengths = jnp.pad(tokens, ((0, 0), (1, 0))), lengths + 1
    prefix = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32) if whole else None
    hidden, cache = read_prompt(network.decoder, network.embed(tokens), lengths, room, prefix=prefix)
    repeat = functools.partial(jnp.repeat, repeats=count, axis=0)
    cache = jax.tree.map(lambda a: repeat(a) if a.ndim else a, cache)
    return repeat(_logits(network, hidden)), cache, None


def _logits(network: LanguageModel, hidden: jax.Array) -> jax.Array:
    """[R, 1, embed_dim] -> [R, V]. As one matrix: with R batches of one row XLA's CPU product takes twice as long."""
    return network.logits(hidden[None, :, 0])[0]


def _in_compute_dtype(params: Any, dtype: str) -> Any:
    """Kernels in the dtype they are used in, so that no step of the loop converts them again."""
    if dtype == "float32":
        return params
    stays = ("scale", "table")  # norms and relative biases are used in float32
    convert = lambda path, p: p if path_name(path).endswith(stays) else p.astype(dtype)  # noqa: E731
    return jax.tree_util.tree_map_with_path(convert, params)
