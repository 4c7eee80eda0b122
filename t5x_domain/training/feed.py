"""What a run reads: the token caches of its mixture, opened, checked, and turned into arrays on the mesh."""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from t5x_domain.data import packing
from t5x_domain.data.cache import CachedSplit, TokenCache
from t5x_domain.data.curriculum import Curriculum, shares_seen
from t5x_domain.data.lanes import Lanes
from t5x_domain.data.loader import Batches
from t5x_domain.data.prefetch import iterate
from t5x_domain.data.tasks import AS_TRAINED, Component, Corpus, Mixture
from t5x_domain.errors import UserError
from t5x_domain.evaluation.perplexity import held_out_scores
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder, EncoderOnly
from t5x_domain.models.rtd import DetectingEncoderDecoder, ReplacedTokenDetection
from t5x_domain.parallel.sharding import batch_shares, process_share, sharding
from t5x_domain.training.run import Run

# How examples become the features that an assembly takes.
LAYOUTS = {
    EncoderDecoder: packing.EncoderDecoder(),
    DecoderOnly: packing.DecoderOnly(),
    EncoderOnly: packing.EncoderOnly(),
    ReplacedTokenDetection: packing.EncoderOnly(),
}


def layout_of(run: Run) -> packing.Layout:
    """How examples become the features that the run's model takes.

    Raises:
      UserError: the model does not learn from text alone.
    """
    if run.model is DetectingEncoderDecoder:
        return packing.DetectingEncoderDecoder(run.vocabulary)
    if run.model not in LAYOUTS:
        known = ", ".join("@" + model.__name__ for model in (*LAYOUTS, DetectingEncoderDecoder))
        raise UserError(
            f"Run.model = {run.model.__name__} is not one that learns from text alone; set MODEL to one of {known}."
        )
    return LAYOUTS[run.model]


def require_divisible(batch_size: int, accumulation_steps: int, mesh: Mesh) -> None:
    """Raises UserError if the rows of an update do not divide over the mesh and the parts they are computed in."""
    shares = batch_shares(mesh) * accumulation_steps
    if batch_size % shares:
        raise UserError(
            f"Run.batch_size = {batch_size} does not divide into {batch_shares(mesh)} (MeshShape.slice x .data "
            f"x .fsdp) x {accumulation_steps} (Run.accumulation_steps) parts; make it a multiple of {shares}."
        )


class Feed:
    """Training and held-out batches of a run.

    Attributes:
      share, num_shares: which part of every batch this process reads, see `parallel.sharding.process_share`.
    """

    def __init__(self, run: Run, mesh: Mesh) -> None:
        """Opens the caches.

        Raises:
          UserError: a cache is missing or was made otherwise, the batch does not divide over the mesh, or the
            objective does not fit the lengths or the vocabulary.
        """
        require_divisible(run.batch_size, run.accumulation_steps, mesh)
        self._run, self._mesh, self._layout = run, mesh, layout_of(run)
        self.share, self.num_shares = process_share(mesh)
        self.eval_components = list((run.eval_mixture or run.phases[-1].mixture).components)
        self.components = _by_name([*(c for phase in run.phases for c in phase.components), *self.eval_components])
        self.loss = functools.partial(run.loss, num_components=len(self.components), **asked_by_loss(run))
        self.batches = Curriculum(run.phases, run.total_steps, self._train_batches)
        self._held_out: dict[str, tuple[Batches, float]] = {}
        for component in self.eval_components:  # so that what is wrong with them is said before anything is compiled
            self._held_out_of(component, component.conditioned(None))

    def train_batches(self, start: int) -> Iterator[tuple[int, dict[str, np.ndarray], dict[str, int]]]:
        """This process's rows of the batches of updates start + 1, start + 2, … `run.total_steps`, numbered so, and
        their raw tokens by component."""
        run = self._run
        batches = iterate(self.batches, start, num_workers=run.data_workers, stop_step=run.total_steps)
        for index, batch, raw_tokens in batches:
            yield index + 1, batch, raw_tokens

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Global arrays on the mesh from this process's rows, features [B, T] each."""
        result = {}
        for name, rows in batch.items():
            shape = (self._run.batch_size, *rows.shape[1:])
            place = sharding(self._mesh, shape, ("batch", "length"))
            result[name] = jax.make_array_from_process_local_data(place, rows, shape)
        return result

    def held_out(
        self, eval_step: Any, params: Any, *, metadata: str | Mapping[str, Any] | None = None, mode: Any = AS_TRAINED
    ) -> dict[str, dict[str, float]]:
        """Scores of each corpus's held-out split, see `evaluation.perplexity`.

        Args:
          eval_step: from `training.step.make_eval_step`.
          params: parameters.
          metadata: None for none; "own" for every document's own; {field: value} for these before every document.
          mode: a `Mode` instead of the components' own, or None for none.

        The same text is scored under all of them, unless what is asked for is longer than what training had.

        Raises:
          UserError: metadata for a component that was declared without, or fields that its templates do not need.
        """
        scores = {}
        for component in self.eval_components:
            batches, bytes_per_token = self._held_out_of(component, component.conditioned(metadata, mode))
            name = self._held_out_name(component)
            scores[name] = held_out_scores(eval_step, params, self._once(batches), bytes_per_token=bytes_per_token)
        return scores

    def of_documents(
        self,
        component: Component,
        documents: CachedSplit,
        *,
        metadata: str | Mapping[str, Any] | None = None,
        mode: Any = AS_TRAINED,
    ) -> Iterator[dict[str, jax.Array]]:
        """One pass over some held-out documents of a component's corpus, in rows as `held_out` makes them of all.

        Args:
          component: one of `eval_components`.
          documents: a split, or what has its methods.
          metadata, mode: as of `held_out`.
        """
        alone = Mixture(name=component.name, components=[component.conditioned(metadata, mode)])
        return self._once(self._batches_of([documents], alone, epochs=1, room_for=component))

    def _once(self, batches: Batches) -> Iterator[dict[str, jax.Array]]:
        steps = range(min(batches.num_steps, self._run.eval_batches or batches.num_steps))
        return (self.put(batches[step]) for step in steps)

    def held_out_documents(self, corpus: Corpus, shortest: int, longest: int, count: int) -> list[np.ndarray]:
        """The first `count` held-out documents of `shortest` to `longest` tokens, int32 [n] each."""
        split = self._split(corpus.name, corpus.version, self._run.eval_split)
        sizes = np.diff(split.offsets)
        chosen = np.flatnonzero((sizes >= shortest) & (sizes <= longest))[:count]
        return [split.documents(int(index), int(index) + 1)[0] for index in chosen]

    def position(self, step: int) -> dict[str, int]:
        """Where the data stands after `step` updates. With the run's seed it is all there is to know."""
        return {"step": step, "seed": self._run.seed}

    def shares(self, raw_tokens: Mapping[str, int]) -> dict[str, dict[str, float]]:
        """See `data.curriculum.shares_seen`."""
        return shares_seen(raw_tokens, self.components)

    def _split(self, corpus_name: str, version: int, split: str) -> CachedSplit:
        cache = TokenCache.open(
            self._run.cache_dir,
            corpus_name,
            vocabulary_fingerprint=self._run.vocabulary.fingerprint,
            version=version,
        )
        return cache.split(split)

    def _splits(self, mixture: Mixture, split: str) -> list[CachedSplit]:
        return [self._split(corpus.name, corpus.version, split) for corpus in mixture.corpora]

    @property
    def _this_host(self) -> dict[str, int]:
        return {"host": self.share, "num_hosts": self.num_shares}

    @property
    def _settings(self) -> dict[str, Any]:
        """What all `Batches` of the run have in common but their size."""
        return {
            "lengths": self._run.lengths,
            "layout": self._layout,
            "seed": self._run.seed,
            "packing": self._run.packing,
            "component_names": [component.name for component in self.components],
        }

    def _batches_of(self, splits: Sequence[CachedSplit], mixture: Mixture, **more: Any) -> Batches:
        size = {"batch_size": self._run.batch_size, **self._this_host}
        return Batches(splits, mixture, self._run.vocabulary, **size, **self._settings, **more)

    def _train_batches(self, mixture: Mixture, subset: Mapping[str, float]) -> Batches | Lanes:
        run = self._run
        splits = self._splits(mixture, run.train_split)
        if run.lanes is None:
            return self._batches_of(splits, mixture, subset=subset)
        # No method of this feed: worker processes get a copy, and the mesh's devices have none.
        open_lane = functools.partial(Batches, splits, mixture, run.vocabulary, subset=subset, **self._settings)
        return Lanes(open_lane, run.lanes, batch_size=run.batch_size, **self._this_host)

    def _held_out_name(self, component: Component) -> str:
        """The corpus's name; the component's where a corpus is scored with several objectives."""
        alone = sum(c.corpus.name == component.corpus.name for c in self.eval_components) == 1
        return component.corpus.name if alone else component.name

    def _held_out_of(self, trained: Component, asked: Component) -> tuple[Batches, float]:
        """One pass over a held-out split, and the split's UTF-8 bytes per token.

        The rows are those of the component as it was trained, so that the same text is scored whatever is asked.
        """
        key = repr(asked)
        if key not in self._held_out:
            alone = Mixture(name=asked.name, components=[asked])
            split = self._split(asked.corpus.name, asked.corpus.version, self._run.eval_split)
            batches = self._batches_of([split], alone, epochs=1, room_for=trained)
            self._held_out[key] = batches, split.num_bytes / split.num_tokens
        return self._held_out[key]


def asked_by_loss(run: Run) -> dict[str, Any]:
    """What the run's loss wants to know of the vocabulary. Raises UserError if model and loss do not go together."""
    masks = "mask_id" in inspect.signature(run.loss).parameters
    if masks != (run.model is DetectingEncoderDecoder):
        raise UserError(
            f"Run.model = {run.model.__name__} does not learn with Run.loss = {run.loss.__name__}; "
            "@DetectingEncoderDecoder and @denoising_with_detection_loss go together, see gin/runs/ul2_rtd.gin."
        )
    return {"mask_id": run.vocabulary.mask_id} if masks else {}


def _by_name(components: Sequence[Component]) -> list[Component]:
    """Each component once. Raises UserError if two that are learnt differently have one name."""
    found: dict[str, Component] = {}
    for component in components:
        if found.setdefault(component.name, component).objective != component.objective:
            raise UserError(
                f"two phases, or a phase and Run.eval_mixture, have different objectives named '{component.name}'; "
                "give one of them another name."
            )
    return list(found.values())
