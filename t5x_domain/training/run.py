"""Everything that defines a run, as one gin-configured value, and the check that a directory belongs to it."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import gin
from etils import epath

from t5x_domain import files
from t5x_domain.conversion.description import DESCRIPTION, describe
from t5x_domain.conversion.huggingface import require_exportable
from t5x_domain.conversion.rtd import remaining_model
from t5x_domain.data.cache import TokenCache
from t5x_domain.data.curriculum import Phase
from t5x_domain.data.tasks import Mixture
from t5x_domain.errors import UserError
from t5x_domain.files import changed_keys, write_atomically
from t5x_domain.models.assemblies import DecoderOnly, LanguageModel
from t5x_domain.models.config import ModelConfig
from t5x_domain.objectives.auxiliary_detection import denoising_with_detection_loss
from t5x_domain.objectives.losses import language_model_loss
from t5x_domain.objectives.rtd import replaced_token_detection_loss
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.training.checkpoint import Retention
from t5x_domain.training.optimizer import Updates

_INIT = ("init_from", "init_embedding", "init_longer", "init_optimizer")
_LOSSES = (language_model_loss, replaced_token_detection_loss, denoising_with_detection_loss)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
      run_dir: where metrics and checkpoints go, a folder of this machine, gs:// or s3://; a run found there goes on.
      model: an assembly, e.g. `EncoderDecoder`.
      config: its shape.
      phases: what is learnt when: mixtures of corpora and objectives, see data/curriculum.py.
      vocabulary: the one the token cache was made with.
      cache_dir: where `prepare` put the token cache.
      lengths: tokens in a row, {"inputs": 512, "targets": 114}.
      updates: optimizer, schedule, clipping, freezing.
      total_steps: updates in all.
      batch_size: rows in an update, over all devices.
      accumulation_steps: parts a batch is computed in.
      mesh: devices along each axis.
      loss: the device half of the objective.
      packing: "concat_and_split" or "first_fit", see data/loader.py.
      seed: of parameters, data order and dropout.
      init_from: a model whose parameters this run starts with, if its own directory holds no checkpoint: a run, a
        converted folder, a Hugging Face folder, or a T5X checkpoint.
      init_embedding: how tokens that the model of `init_from` has not get their rows, "mean" or "random" (see
        `adaptation.transplant`); None if it has to have the same vocabulary.
      init_longer: the model is to read longer texts than that of `init_from`: its layers may see another part of a text
        (kinds of layers, window, global tokens), and learned positions are repeated until there are
        `ModelConfig.max_positions` (Longformer: Beltagy et al. 2020, section 5). Otherwise all has to be the same.
      init_optimizer: go on from the step and with the second moments of Adafactor of a T5X checkpoint.
      export_on_finish: a folder for the trained model as Hugging Face users load it; None for none.
      train_split, eval_split: splits of the cache.
      log_every, eval_every, checkpoint_every: steps between; the last step is evaluated and saved in any case.
      eval_batches: held-out batches of each component; None for all.
      eval_mixture: what held-out text is scored with; None for the mixture of the last phase.
      retention: which checkpoints stay.
      max_skipped_in_a_row: non-finite updates in a row that end the run.
      data_workers: processes that make batches; 0 for threads.
      profile_steps: the first and the last update of which a profiler's trace is written, counted from 1; None for
        none (SIGUSR1 asks for one at any time, see training/profiling.py).
      wandb_project: the project of Weights & Biases that is told what TensorBoard is told; None for none.
      lanes: rows of a batch that read a part of the corpus of their own, so that a host reads only its shards, see
        data/lanes.py: a multiple of the hosts, and a divisor of the batch; None lets every row come from anywhere.
    """

    run_dir: str
    model: type[LanguageModel]
    config: ModelConfig
    phases: Sequence[Phase]
    vocabulary: Any
    cache_dir: str
    lengths: Mapping[str, int]
    updates: Updates
    total_steps: int
    batch_size: int
    accumulation_steps: int = 1
    mesh: MeshShape = MeshShape()
    loss: Callable[..., Any] = language_model_loss
    packing: str = "concat_and_split"
    seed: int = 0
    init_from: str | None = None
    init_embedding: str | None = None
    init_longer: bool = False
    init_optimizer: bool = False
    export_on_finish: str | None = None
    train_split: str = "train"
    eval_split: str = "validation"
    log_every: int = 10
    eval_every: int = 1000
    eval_batches: int | None = 16
    eval_mixture: Mixture | None = None
    checkpoint_every: int = 1000
    retention: Retention = Retention()
    max_skipped_in_a_row: int = 10
    data_workers: int = 0
    profile_steps: tuple[int, int] | None = None
    wandb_project: str | None = None
    lanes: int | None = None

    def __post_init__(self) -> None:
        """Raises UserError for values that no run can have."""
        for key in ("total_steps", "batch_size", "accumulation_steps", "log_every", "eval_every", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise UserError(f"Run.{key} = {getattr(self, key)}: it must be at least 1.")
        if self.config.vocab_size < self.vocabulary.vocab_size:
            raise UserError(
                f"ModelConfig.vocab_size = {self.config.vocab_size} is smaller than the vocabulary's "
                f"{self.vocabulary.vocab_size} ids; "
                f"set --gin.ModelConfig.vocab_size={self.vocabulary.vocab_size} or more."
            )
        if self.init_embedding not in (None, "mean", "random"):
            raise UserError(f"Run.init_embedding = {self.init_embedding!r}: choose 'mean' or 'random', or None.")
        if self.init_longer and self.init_from is None:
            raise UserError("Run.init_longer is for a run that starts with a finished model; give it --init_from.")
        if self.profile_steps is not None and not _is_range(self.profile_steps, self.total_steps):
            raise UserError(
                f"Run.profile_steps = {self.profile_steps!r}: give the first and the last update to trace, "
                f"(first, last) with 1 <= first <= last <= {self.total_steps} (Run.total_steps)."
            )
        if self.export_on_finish is not None:  # what cannot be exported is to be said before it is trained
            require_exportable(*remaining_model(self.model, self.config), self.vocabulary, self.prefix_lm)

    @property
    def prefix_lm(self) -> list[str]:
        """Objectives by which a decoder-only model learns with inputs that see one another."""
        if self.model is not DecoderOnly:
            return []
        objectives = [component.objective for phase in self.phases for component in phase.components]
        return list(dict.fromkeys(o.name for o in objectives if o.lengths(64)[0] > 0))

    def identity(self, phase_starts: Sequence[int]) -> dict[str, Any]:
        """What must not change between two starts of the same run, as plain JSON; `phase_starts` are steps.

        Raises:
          UserError: a token cache is not fit for use.
        """
        described = {
            "model": self.model.__name__,
            **{f"ModelConfig.{key}": value for key, value in dataclasses.asdict(self.config).items()},
            "phases": [_described(phase, start) for phase, start in zip(self.phases, phase_starts, strict=True)],
            "vocabulary fingerprint": self.vocabulary.fingerprint,
            **{f"digest of the token cache of {name}": digest for name, digest in self._caches()},
            "Run.lengths": dict(self.lengths),
            "Run.packing": self.packing,
            "Run.batch_size": self.batch_size,
            "Run.lanes": self.lanes,
            "Run.seed": self.seed,
            **{f"Run.{key}": getattr(self, key) for key in _INIT},
            "Updates.optimizer": repr(self.updates.optimizer),
            "Updates.groups": self.updates.groups and {p: repr(g.optimizer) for p, g in self.updates.groups.items()},
            "Updates.freeze": list(self.updates.freeze),
            "Batches bindings": gin.get_bindings("Batches"),
            **{f"{loss.__name__} bindings": _bindings(loss) for loss in _LOSSES},
        }
        return json.loads(json.dumps(described, default=repr))

    def _caches(self) -> Iterator[tuple[str, str]]:
        """Every corpus that is learnt from, and the digest of what its token cache holds of it."""
        for name in dict.fromkeys(corpus.name for phase in self.phases for corpus in phase.mixture.corpora):
            yield name, TokenCache.open(self.cache_dir, name).split(self.train_split).digest

    def claim_directory(self, phase_starts: Sequence[int]) -> epath.Path:
        """Creates the run directory, or checks that it is this run's.

        Raises:
          UserError: it belongs to a run of another configuration or other documents, or cannot be written.
        """
        folder, identity = files.path(self.run_dir), self.identity(phase_starts)
        record = folder / "run.json"
        if record.exists() and _has_begun(folder):
            before = _defaults() | json.loads(record.read_text(encoding="utf-8"))
            free = {f"ModelConfig.{key}" for key in ModelConfig.PLACE}
            noted = before.keys() - free  # what was not known then, and has no default, cannot have been another
            changed = [key for key in changed_keys(before, _defaults() | identity) if key in noted]
            if changed:
                differences = "; ".join(f"{key} was {before.get(key)!r}, is {identity.get(key)!r}" for key in changed)
                raise UserError(
                    f"{folder} belongs to a run of another configuration: {differences}. "
                    "Set another --gin.RUN_DIR, or give it the configuration it was started with."
                )
        elif (folder / DESCRIPTION).exists() and not record.exists():
            raise UserError(
                f"Run.run_dir = {self.run_dir}: holds a converted model; set --gin.RUN_DIR to another folder."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(record, json.dumps(identity, indent=1).encode())
            if not (folder / DESCRIPTION).exists() or not _has_begun(folder):
                facts = {} if self.init_from is None else {"started_from": PurePath(self.init_from).name}
                if self.prefix_lm:
                    facts["prefix_lm"] = self.prefix_lm
                describe(folder, self.model, self.config, self.vocabulary, facts)
        except OSError as error:
            raise UserError(
                f"Run.run_dir = {self.run_dir}: {error.strerror}; set --gin.RUN_DIR to a folder you may write."
            ) from error
        return folder


def _defaults() -> dict[str, Any]:
    """What a run.json has meant that was written before one of these keys was: they come with a default that changes
    nothing."""
    fields = {f"{kind.__name__}.{f.name}": f.default for kind in (Run, ModelConfig) for f in dataclasses.fields(kind)}
    given = {key: default for key, default in fields.items() if default is not dataclasses.MISSING}
    bindings = {f"{loss.__name__} bindings": {} for loss in _LOSSES}
    return json.loads(json.dumps(given | bindings, default=repr))


def _bindings(loss: Callable[..., Any]) -> dict[str, Any]:
    """Of a schedule only that it is one: like the learning rate's, it may be changed while a run stands still."""
    return {key: "a schedule" if callable(value) else value for key, value in gin.get_bindings(loss).items()}


def _is_range(steps: Any, total: int) -> bool:
    """Whether these are the first and the last of some of the updates 1 … total."""
    pair = isinstance(steps, (tuple, list)) and len(steps) == 2 and all(isinstance(step, int) for step in steps)
    return pair and 1 <= steps[0] <= steps[1] <= total


def _has_begun(folder: epath.Path) -> bool:
    """Whether something was trained in a run directory; a start that was refused leaves one that was not."""
    logged, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    saved = checkpoints.is_dir() and any(child.name.isdigit() for child in checkpoints.iterdir())
    return saved or (logged.exists() and logged.stat().length > 0)


def _described(phase: Phase, start: int) -> dict[str, Any]:
    """What a phase learns from when; its learning rate may be changed while a run stands still."""
    components = [
        [c.corpus.name, c.corpus.version, repr(c.objective), c.rate, repr(c.mode), repr(c.metadata)]
        for c in phase.components
    ]
    return {"start": start, "components": components, "subset": dict(phase.subset)}
