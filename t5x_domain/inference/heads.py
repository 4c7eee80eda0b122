"""Fine-tuned heads read back: classes, tags and answers for texts."""

import dataclasses
import functools
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5x_domain import files
from t5x_domain.data.labelled import Labelled
from t5x_domain.errors import UserError
from t5x_domain.inference.opened import Opened, open_model
from t5x_domain.models.heads import head
from t5x_domain.models.names import path_name
from t5x_domain.objectives.labels import OBJECTIVES, LabelObjective
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.parallel.sharding import put, use_mesh
from t5x_domain.training.state import Blueprint

HEAD_FILE = "head.npz"
_FACTS = ("kind", "length", "labels")


@dataclasses.dataclass(frozen=True)
class Headed:
    """A model with a head, as fine-tuning leaves it.

    Attributes:
      model: its class is one of `models.heads`.
      kind: of the task, see `models.heads.head`.
      labels: what the scores of a classification or tagging stand for; else empty.
      length: tokens of a row; what is longer was cut.
    """

    model: Opened
    kind: str
    labels: Sequence[str]
    length: int


def has_head(path: str) -> bool:
    """Whether a model folder holds a fine-tuned head."""
    return (files.path(path) / HEAD_FILE).exists()


def open_head(path: str, *, flag: str = "--model", mesh: MeshShape = MeshShape()) -> Headed:
    """Opens the folder `seed_<seed>/model` of a fine-tuning with FineTuning.head = "task".

    Raises:
      UserError: it is no model, it has no head, or the head is damaged or another model's.
    """
    file = files.path(path) / HEAD_FILE
    if not file.exists():
        raise UserError(f"{flag}={path}: has no {HEAD_FILE}; give seed_<seed>/model of a fine-tuning with a head.")
    try:
        with file.open("rb") as stream, np.load(stream) as stored:
            arrays = dict(stored)
        kind, length, labels = (arrays.pop(name).tolist() for name in _FACTS)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: damaged or not a head ({error}); fine-tune again.") from error
    if kind not in OBJECTIVES:
        raise UserError(f"{file}: a head of kind {kind!r} is not known; fine-tune again.")
    model = open_model(path, flag=flag, mesh=mesh)
    try:
        return Headed(with_head(model, head(kind, num_labels=len(labels) or None), arrays), kind, labels, length)
    except ValueError as error:
        raise UserError(f"{file}: does not fit its model ({error}); fine-tune again.") from error


def with_head(model: Opened, model_class: Callable[..., Any], values: Mapping[str, np.ndarray]) -> Opened:
    """The encoder of `model` under a head.

    Args:
      model: has an encoder.
      model_class: as `models.heads.head` gives it.
      values: the head's parameters, float32.

    Raises:
      ValueError: the head has other parameters than these, or of other shapes.
    """
    blueprint = Blueprint(model_class, model.blueprint.config, model.blueprint.mesh)
    backbone = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model.params)[0]}
    known = backbone | {f"head/{name}": value for name, value in values.items()}

    def take(path: Any, wanted: jax.ShapeDtypeStruct) -> Any:
        found = known.get(path_name(path))
        if found is None or found.shape != wanted.shape:
            shape = "missing" if found is None else found.shape
            raise ValueError(f"{path_name(path)} is {shape}, not {wanted.shape}")
        return found

    params = jax.tree_util.tree_map_with_path(take, blueprint.shapes)
    return dataclasses.replace(model, blueprint=blueprint, params=jax.device_put(params, blueprint.shardings))


def reader(blueprint: Blueprint) -> Callable[[Any, np.ndarray, np.ndarray], np.ndarray]:
    """What a model with a head gives for (params, tokens [B, S], segment ids [B, S]); compiled once for each shape."""
    whole = NamedSharding(blueprint.mesh, PartitionSpec())  # every process reads all of it

    def run(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        with use_mesh(blueprint.mesh):
            return blueprint.merge(params)(batch["tokens"], batch["segment_ids"])

    compiled = jax.jit(run, in_shardings=(blueprint.shardings, None), out_shardings=whole)

    def read(params: Any, tokens: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
        return np.asarray(compiled(params, put(blueprint.mesh, {"tokens": tokens, "segment_ids": segment_ids})))

    return read


def answer(
    objective: LabelObjective,
    read: Callable[[np.ndarray, np.ndarray], np.ndarray],
    examples: Sequence[Labelled],
    *,
    batch_size: int,
) -> list[Any]:
    """What a head says to examples, in the form of its task's targets.

    Args:
      objective: of the head's kind.
      read: what the model with the head gives for tokens and segment ids, see `reader`.
      examples: their targets are not looked at, but for the number of tags and for pairs.
      batch_size: examples at once.
    """
    outputs: list[list[np.ndarray]] = []
    for start in range(0, len(examples), batch_size):
        chosen = examples[start : start + batch_size]
        filled = [*chosen, *[chosen[0]] * (batch_size - len(chosen))]  # one shape is compiled
        features = objective.encode(filled).features
        sides = [name.removesuffix("_input_tokens") for name in features if name.endswith("_input_tokens")]
        found = [read(features[f"{side}_input_tokens"], features[f"{side}_segment_ids"]) for side in sides]
        outputs.append([side[: len(chosen)] for side in found])
    sides = [np.concatenate(parts) for parts in zip(*outputs, strict=True)]
    return objective.decode(sides[0] if len(sides) == 1 else np.stack(sides), examples)


class Predictor:
    """Answers texts with a head, in the form of its task's targets."""

    def __init__(self, headed: Headed, *, batch_size: int = 8) -> None:
        """Compiles nothing yet.

        Raises:
          UserError: the head makes embeddings, see `inference.embedding`.
        """
        if headed.kind == "pairs":
            raise UserError(f"{headed.model.origin}: its head makes embeddings and predicts nothing; use --embed.")
        if batch_size < 1:
            raise UserError(f"batch_size = {batch_size}: it must be at least 1.")
        options = {"labels": headed.labels} if headed.labels else {}
        self._objective = OBJECTIVES[headed.kind](headed.model.vocabulary, headed.length, **options)
        self._is_tagging = headed.kind == "tagging"
        self._batch_size = batch_size
        self._read = functools.partial(reader(headed.model.blueprint), headed.model.params)

    def __call__(self, texts: Sequence[str]) -> list[Any]:
        """A prediction for each text: a label; a tag for each of its words; or an answer quoted from it, "" for none.

        Args:
          texts: inputs as in fine-tuning, its template filled in. They are cut to a row of `Headed.length` tokens.
        """
        if not texts:
            return []
        examples = [self._example(text) for text in texts]
        return answer(self._objective, self._read, examples, batch_size=self._batch_size)

    def _example(self, text: str) -> Labelled:
        """An example without a target; of tagging it has an unknown tag for each word."""
        return Labelled("", text, [""] * len(text.split()) if self._is_tagging else None, {})
