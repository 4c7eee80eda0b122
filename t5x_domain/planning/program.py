"""The real program of a run, of shapes instead of arrays: its train step, or what writes answers with its model."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gin
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from t5x_domain import cli
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.inference.decoding import Decoding
from t5x_domain.inference.generator import Generator
from t5x_domain.inference.opened import Opened
from t5x_domain.models.assemblies import LanguageModel
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.flops import forward_flops, train_step_flops
from t5x_domain.models.names import path_name
from t5x_domain.objectives.losses import language_model_loss
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.parallel.sharding import sharding
from t5x_domain.training.feed import asked_by_loss, layout_of, require_divisible
from t5x_domain.training.optimizer import Updates
from t5x_domain.training.state import Blueprint
from t5x_domain.training.step import make_train_step

_BYTE_IDS = ByteVocabulary(0).vocab_size


@gin.configurable
@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """What of a `training.run.Run` decides its program; it needs no data. The attributes are those of `Run`."""

    model: type[LanguageModel]
    config: ModelConfig
    lengths: Mapping[str, int]
    batch_size: int
    updates: Updates | None = None
    accumulation_steps: int = 1
    mesh: MeshShape = MeshShape()
    loss: Callable[..., Any] = language_model_loss

    @property
    def vocabulary(self) -> ByteVocabulary:
        """In the place of one that is yet to be trained: as many ids as the model has room for."""
        return ByteVocabulary(max(self.config.vocab_size - _BYTE_IDS, 1))


def load(files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str] = ()) -> PlannedRun:
    """The run that gin files and bindings describe. Raises UserError as `cli.load_gin` and `cli.build` do."""
    cli.load_gin(files, bindings, search_paths)
    given = gin.get_bindings("Run", resolve_references=False)
    for field in dataclasses.fields(PlannedRun):
        if field.name in given:
            gin.bind_parameter(f"PlannedRun.{field.name}", given[field.name])
    return cli.build(PlannedRun)


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and what it is called with, as shapes on a mesh.

    Attributes:
      function: jitted.
      arguments: shapes with shardings.
      mesh: their mesh.
      parameters, optimizer, batch: the arguments by kind, trees of shapes with shardings.
      num_parameters: of the model.
      flops: model FLOPs by formula, see `models.flops`.
      tokens: positions that the model reads and predicts, or writes, in a call.
      steps: positions written one after the other; None for a train step.
      read_by_step: bytes of the decoder's kernels on a device, which each of these reads.
    """

    function: Any
    arguments: tuple[Any, ...]
    mesh: Mesh
    parameters: Any
    optimizer: Any
    batch: Any
    num_parameters: int
    flops: float
    tokens: int
    steps: int | None = None
    read_by_step: float = 0.0


def train_step(run: PlannedRun, mesh: Mesh) -> Program:
    """The trainer's own update, its number of corpora taken as one.

    Raises:
      UserError: the run has no optimizer, or its batch, model and loss do not fit together or onto the mesh.
    """
    if run.updates is None:
        raise UserError("Run.updates is not set; give a --gin_file of gin/runs, such as gin/runs/pretrain.gin.")
    require_divisible(run.batch_size, run.accumulation_steps, mesh)
    blueprint = Blueprint(run.model, run.config, mesh)
    transform = run.updates.build(blueprint.axes)
    loss = functools.partial(run.loss, num_components=1, **asked_by_loss(run))
    step = make_train_step(blueprint, loss, transform, seed=0, accumulation_steps=run.accumulation_steps)
    state, batch = blueprint.abstract_state(transform), _features(run, mesh)
    length = sum(layout_of(run).capacity(run.lengths))
    return Program(
        step, (state, batch), mesh, state.params, state.opt_state, batch, blueprint.num_parameters,
        train_step_flops(run.model, run.config, run.batch_size, run.lengths), run.batch_size * length,
    )  # fmt: skip


def decode_step(run: PlannedRun, decoding: Decoding, mesh: Mesh) -> Program:
    """What writes an answer to each row of a batch: reads inputs of the run's length, then a position at a time.

    Raises:
      UserError: the model has no decoder, or the batch does not divide over the mesh.
    """
    require_divisible(run.batch_size, 1, mesh)
    config = dataclasses.replace(run.config, scan_layers=False, remat="none", dropout_rate=0.0)  # as `open_model` does
    blueprint = Blueprint(run.model, config, mesh)
    opened = Opened("MODEL", blueprint, None, run.vocabulary, {})
    generator = Generator(opened, decoding, batch_size=run.batch_size)
    rows, inputs = (run.batch_size,), (run.batch_size, run.lengths["inputs"])
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding(mesh, shape, ("batch", "length")[: len(shape)]))
        for name, shape in (("tokens", inputs), ("lengths", rows), ("numbers", rows))
    }
    read, written = ({"inputs": run.lengths["inputs"], "targets": n} for n in (0, decoding.max_tokens))
    # Of what is read, only the last position is asked what follows.
    reading = forward_flops(run.model, config, read, scored=1)
    writing = forward_flops(run.model, config, written) - forward_flops(run.model, config, read)
    outputs = run.batch_size * decoding.hypotheses
    return Program(
        generator.write, (blueprint.abstract_params, batch), mesh, blueprint.abstract_params, (), batch,
        blueprint.num_parameters, run.batch_size * reading + outputs * writing,
        outputs * decoding.max_tokens, decoding.max_tokens, _read_by_step(blueprint),
    )  # fmt: skip


def _read_by_step(blueprint: Blueprint) -> float:
    """Bytes of all kernels but the encoder's and the look-up table, in the dtype of computation."""
    found = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(blueprint.abstract_params)[0]:
        name = path_name(path)
        is_output = name.startswith("embedding/output") or blueprint.config.tie_embeddings
        if name.startswith("decoder/") or (name.startswith("embedding/") and is_output):
            found += math.prod(leaf.sharding.shard_shape(leaf.shape))
    return found * jnp.dtype(blueprint.config.dtype).itemsize


def _features(run: PlannedRun, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch as the run's layout makes it, of empty rows."""

    def feature(row: Any) -> jax.ShapeDtypeStruct:
        shape = (run.batch_size, *row.shape[1:])
        return jax.ShapeDtypeStruct(shape, row.dtype, sharding=sharding(mesh, shape, ("batch", "length")))

    return {name: feature(row) for name, row in layout_of(run).batch([()], run.lengths).items()}
