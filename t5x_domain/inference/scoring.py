"""How likely given texts are under a model: their log-probabilities, and the choice among answers by them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5x_domain.data import packing
from t5x_domain.errors import UserError
from t5x_domain.inference.generator import padded, row_length
from t5x_domain.inference.opened import Opened
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder
from t5x_domain.objectives.losses import target_scores, token_scores
from t5x_domain.parallel.sharding import put, use_mesh
from t5x_domain.training.feed import LAYOUTS


class Scorer:
    """Scores targets given inputs; compiles once for each of few shapes."""

    def __init__(self, model: Opened, *, batch_size: int = 8) -> None:
        """Compiles nothing yet.

        Raises:
          UserError: the model has no decoder.
        """
        if model.blueprint.model_class not in (EncoderDecoder, DecoderOnly):
            raise UserError(
                f"{model.origin}: {model.blueprint.model_class.__name__} has no decoder to score text with."
            )
        self._model, self._batch_size = model, batch_size
        self._layout = LAYOUTS[model.blueprint.model_class]
        whole = NamedSharding(model.blueprint.mesh, PartitionSpec())
        shardings = model.blueprint.shardings
        self._nll = jax.jit(self._batch_nll, in_shardings=(shardings, None), out_shardings=whole)
        self._choices_nll = jax.jit(self._batch_choices_nll, in_shardings=(shardings, None, None), out_shardings=whole)

    def __call__(
        self, inputs: Sequence[np.ndarray], targets: Sequence[np.ndarray], *, params: Any = None
    ) -> np.ndarray:
        """(log-probability in nats, tokens) of each target given its input, [n, 2] float64.

        Args:
          inputs: ids as `Opened.inputs` makes them, int32 [n] each.
          targets: ids as `Opened.targets` makes them, int32 [t] each.
          params: instead of the model's own, in its shapes; nothing is compiled again.

        Raises:
          UserError: a target is empty.
        """
        if any(not len(target) for target in targets):
            raise UserError("a target to score has no token; close it by EOS.")
        params = self._model.params if params is None else params
        scores = np.zeros((len(inputs), 2))
        order = sorted(range(len(inputs)), key=lambda i: (len(inputs[i]), len(targets[i])))
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            batch = self._batch([inputs[i] for i in chosen], [targets[i] for i in chosen])
            nll = np.asarray(self._nll(params, batch))
            scores[chosen, 0] = -nll[: len(chosen)]
            scores[chosen, 1] = [len(targets[i]) for i in chosen]
        return scores

    def choose(
        self, inputs: Sequence[np.ndarray], choices: Sequence[str], *, normalize: bool = True, params: Any = None
    ) -> np.ndarray:
        """Scores of every choice as the answer to every input (rank classification: Brown et al. 2020, section 2.4).

        Args:
          inputs: ids as `Opened.inputs` makes them.
          choices: answers.
          normalize: log-probability by token instead of in all, so that long answers are not at a disadvantage.
          params: as of a call.

        Returns:
          [len(inputs), len(choices)] float64, nats.
        """
        answers = [self._model.targets(choice) for choice in choices]
        if self._model.blueprint.model_class is EncoderDecoder:
            scores = self._score_choices(inputs, answers, self._model.params if params is None else params)
        else:
            scores = self([i for i in inputs for _ in answers], answers * len(inputs), params=params)[:, 0]
            scores = scores.reshape(len(inputs), len(choices))
        return scores / [len(answer) for answer in answers] if normalize else scores

    def _score_choices(self, inputs: Sequence[np.ndarray], answers: Sequence[np.ndarray], params: Any) -> np.ndarray:
        """Log-probabilities [len(inputs), len(answers)]; each input is encoded once."""
        longest = self._model.blueprint.config.longest
        scores = np.zeros((len(inputs), len(answers)))
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            tokens, lengths = padded([inputs[i] for i in chosen], self._batch_size, at_most=longest)
            asked = put(self._model.blueprint.mesh, {"tokens": tokens, "lengths": lengths})
            nll = self._choices_nll(params, asked, padded(answers, len(answers), at_most=longest))
            scores[chosen] = -np.asarray(nll)[: len(chosen)]
        return scores

    def _batch(self, inputs: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> dict[str, jax.Array]:
        longest = self._model.blueprint.config.longest
        is_joined = longest is not None and self._model.blueprint.model_class is DecoderOnly  # in one row
        room = row_length(targets, longest - max(map(len, inputs)) if is_joined else longest)
        lengths = {"inputs": row_length(inputs, longest - room if is_joined else longest), "targets": room}
        if self._model.reads_whole_inputs:
            rows = [[packing.Example(i, t, 0)] for i, t in zip(inputs, targets, strict=True)]
        else:  # a causal model reads them as what stands before
            nothing = np.zeros(0, np.int32)
            rows = [[packing.Example(nothing, t, 0, i)] for i, t in zip(inputs, targets, strict=True)]
        rows += [[]] * (self._batch_size - len(rows))
        return put(self._model.blueprint.mesh, self._layout.batch(rows, lengths))

    def _batch_nll(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        """Negative log-probability of the targets of each row, [B] float32."""
        blueprint = self._model.blueprint
        with use_mesh(blueprint.mesh):
            scores = token_scores(blueprint.merge(params), batch)[1]
        return (scores.nll * batch["decoder_loss_weights"]).sum(axis=-1)

    def _batch_choices_nll(
        self, params: Any, batch: dict[str, jax.Array], answers: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        """Negative log-probability [B, C] of answers (tokens [C, T] and lengths [C]) to each row, float32.

        Answers are taken one by one: their cross-attention to a long memory is all the memory that this takes.
        """
        blueprint, tokens = self._model.blueprint, batch["tokens"]
        with use_mesh(blueprint.mesh):
            network = blueprint.merge(params)
            segment_ids = (jnp.arange(tokens.shape[1]) < batch["lengths"][:, None]).astype(jnp.int32)
            memory = network.encoder(network.embed(tokens), segment_ids=segment_ids)

            def nll(answer: tuple[jax.Array, jax.Array]) -> jax.Array:
                target = jnp.broadcast_to(answer[0], (len(tokens), len(answer[0])))
                weights = jnp.broadcast_to(jnp.arange(target.shape[1]) < answer[1], target.shape).astype(jnp.float32)
                hidden = network.decoder(
                    network.embed(jnp.pad(target, ((0, 0), (1, 0)))[:, :-1]),  # id 0 begins what is written
                    segment_ids=jnp.ones_like(target),
                    memory=memory,
                    memory_segment_ids=segment_ids,
                )
                return (target_scores(network, hidden, target, weights)[1].nll * weights).sum(axis=-1)

            return jax.lax.map(nll, answers).T
