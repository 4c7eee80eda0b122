"""A run as a list of phases: which mixture is learnt when, and what each phase changes.

Metadata with a cooldown (MeCo), up-sampling of the domain at the end, replay of general text, re-warming, several
epochs of a small subset (the stability gap) and UL2R are all lists of phases; `gin/recipes/` has one file for each.
"""

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gin

from t5x_domain.data.tasks import Component, Mixture
from t5x_domain.errors import UserError

if TYPE_CHECKING:  # `prepare` reads phases, too, and has no need of Grain and JAX
    from t5x_domain.data.loader import Batches, Seen
    from t5x_domain.data.packing import Batch

_LENGTH_KEYS = ("share", "steps", "epochs")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of a run. Parameters and optimizer go on from phase to phase.

    So does the data: with 'first_fit' a corpus goes on where the phase before left it, so nothing is seen twice before
    its epoch is over; with 'concat_and_split' that holds for each denoiser of a corpus, and a subset has a place of its
    own. A phase is as long as `share`, `steps` or `epochs` says; the one that sets none of them takes what is left.

    Attributes:
      mixture: what is learnt.
      share: of the run's steps, in (0, 1].
      steps: number of steps.
      epochs: passes over the subset's first corpus, or without subset over the mixture's first corpus.
      subset: {corpus: documents or share of them}: a fixed part of a corpus, again in every epoch. Corpora that are not
        named go on through all their documents, so each epoch of the subset meets a new sample of them.
      metadata_rate: share of documents with metadata, instead of the mixture's; 0 is the cooldown of MeCo.
      schedule: learning rate by step of the phase; None for the run's own, which goes on.
      name: in logs; None for its number.
    """

    mixture: Mixture
    share: float | None = None
    steps: int | None = None
    epochs: float | None = None
    subset: Mapping[str, float] = dataclasses.field(default_factory=dict)
    metadata_rate: float | None = None
    schedule: Callable[[Any], Any] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        """Raises UserError for settings that contradict one another."""
        given = [key for key in _LENGTH_KEYS if getattr(self, key) is not None]
        if len(given) > 1:
            raise UserError(f"Phase.{given[0]} and Phase.{given[1]} are both set; a phase has one length.")
        for key in given:
            if not getattr(self, key) > 0:
                raise UserError(f"Phase.{key} = {getattr(self, key)}: it must be above 0.")
        if self.steps is not None and not isinstance(self.steps, int):
            raise UserError(f"Phase.steps = {self.steps}: it must be an integer.")
        if self.metadata_rate is not None and not 0 <= self.metadata_rate <= 1:
            raise UserError(f"Phase.metadata_rate = {self.metadata_rate}: it must lie between 0 and 1.")
        corpora = [corpus.name for corpus in self.mixture.corpora]
        if unknown := [corpus for corpus in self.subset if corpus not in corpora]:
            raise UserError(
                f"Phase.subset names the corpus '{unknown[0]}', but the mixture has only {', '.join(corpora)}."
            )
        if self.metadata_rate is not None and not any(c.metadata for c in self.mixture.components):
            raise UserError(
                f"Phase.metadata_rate = {self.metadata_rate}, but no component of mixture '{self.mixture.name}' has "
                "metadata; set mixture_of_denoisers.metadata = @Metadata()."
            )

    @property
    def components(self) -> list[Component]:
        """The mixture's components, with the phase's rate of metadata."""
        if self.metadata_rate is None:
            return list(self.mixture.components)
        return [
            component
            if component.metadata is None
            else dataclasses.replace(
                component, metadata=dataclasses.replace(component.metadata, rate=self.metadata_rate)
            )
            for component in self.mixture.components
        ]


class Curriculum:
    """The batches of all phases, by step of the run; like one phase's, a pure function of (seed, step).

    Attributes:
      names: of the phases.
      starts: the step before each phase's first update.
      total_steps: of the run.
    """

    def __init__(
        self, phases: Sequence[Phase], total_steps: int, open_batches: Callable[[Mixture, Mapping], "Batches"]
    ) -> None:
        """`open_batches` makes the endless batches of a mixture and a subset.

        Raises:
          UserError: the phases do not fill the run, or one of them cannot be laid out.
        """
        if not phases:
            raise UserError("Run.phases is empty; give at least one phase.")
        self.total_steps = total_steps
        self.names = [phase.name or f"phase {number}" for number, phase in enumerate(phases, 1)]
        if repeated := [name for name in self.names if self.names.count(name) > 1]:
            raise UserError(f"two phases are named '{repeated[0]}'; give each a Phase.name of its own.")
        self._batches = [
            open_batches(dataclasses.replace(phase.mixture, components=phase.components), phase.subset)
            for phase in phases
        ]
        self.starts = self._lay_out(phases)
        used: dict[tuple[int, ...], int] = {}
        for batches, (start, stop) in zip(self._batches, self.spans, strict=True):
            batches.begin_at(used)
            used |= batches.consumed(stop - start)

    def _lay_out(self, phases: Sequence[Phase]) -> list[int]:
        """Steps before each phase."""
        total = self.total_steps
        lengths = [self._length(phase, batches) for phase, batches in zip(phases, self._batches, strict=True)]
        # Shares are rounded by their running sum, so that shares that sum to 1 lose no step.
        share = 0.0
        for number, phase in enumerate(phases):
            if phase.share is not None:
                lengths[number] = round((share + phase.share) * total) - round(share * total)
                share += phase.share
        if lengths.count(None) > 1:
            raise UserError(
                f"{lengths.count(None)} phases have no length; set Phase.share, .steps or .epochs of all but one."
            )
        rest = total - sum(length for length in lengths if length is not None)
        lengths = [rest if length is None else length for length in lengths]
        if sum(lengths) != total or min(lengths) < 1:
            listed = ", ".join(f"{name} {length:,}" for name, length in zip(self.names, lengths, strict=True))
            remedy = (
                "Make shares sum to 1, or leave the length of one phase open."
                if sum(lengths) != total
                else "Each needs a step at least: raise TRAIN_STEPS, or shorten the other phases."
            )
            raise UserError(
                f"the phases do not fill the run of {total:,} steps (TRAIN_STEPS), they have {listed}. {remedy}"
            )
        return [sum(lengths[:number]) for number in range(len(lengths))]

    @staticmethod
    def _length(phase: Phase, batches: "Batches") -> int | None:
        if phase.epochs is None:
            return phase.steps
        return batches.steps_of_epochs(phase.epochs, next(iter(phase.subset), phase.mixture.corpora[0].name))

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(start, stop) of each phase, in steps."""
        return list(zip(self.starts, [*self.starts[1:], self.total_steps], strict=True))

    def phase_of(self, step: int) -> int:
        """Index of the phase that the update after `step` updates belongs to."""
        return bisect.bisect_right(self.starts, step) - 1

    @property
    def num_steps(self) -> int:
        return self.total_steps

    def __getitem__(self, step: int) -> "Batch":
        """The batch of the update after `step` updates."""
        phase = self.phase_of(step)
        return self._batches[phase][step - self.starts[phase]]

    def seen(self, step: int) -> list["Seen"]:
        """Which tokens this host's rows of a step hold."""
        phase = self.phase_of(step)
        return self._batches[phase].seen(step - self.starts[phase])

    def raw_tokens(self, step: int) -> dict[str, int]:
        """Raw tokens of each component, by name, in this host's rows of the update after `step` updates."""
        phase = self.phase_of(step)
        return self._batches[phase].raw_tokens(step - self.starts[phase])

    def describe(self) -> list[str]:
        """A line on each phase: its name, updates, and subsets."""
        result = []
        for name, (start, stop), batches in zip(self.names, self.spans, self._batches, strict=True):
            parts = [
                f"{corpus}: {documents:,} documents, {tokens:,} tokens" for corpus, documents, tokens in batches.subsets
            ]
            result.append(f"{name}: updates {start + 1:,} to {stop:,}" + (f" ({'; '.join(parts)})" if parts else ""))
        return result


def learning_rate(phases: Sequence[Phase], starts: Sequence[int], base: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The learning rate by step of the run: each phase's own by the steps since it began (`starts`), else `base`."""
    if all(phase.schedule is None for phase in phases):
        return base
    import jax.numpy as jnp

    def rate(step: Any) -> Any:
        value = base(step)
        for phase, start in zip(phases, starts, strict=True):
            own = base(step) if phase.schedule is None else phase.schedule(jnp.maximum(step - start, 0))
            value = jnp.where(step >= start, own, value)
        return value

    return rate


def shares_seen(raw_tokens: Mapping[str, int], components: Sequence[Component]) -> dict[str, dict[str, float]]:
    """{'corpora': {name: share}, 'denoisers': {name: share}} of raw tokens by component."""
    total = max(sum(raw_tokens.values()), 1)
    groups = {"corpora": lambda c: c.corpus.name, "denoisers": lambda c: c.objective.name}
    return {group: dict(_sums(raw_tokens, components, of, total)) for group, of in groups.items()}


def _sums(
    raw_tokens: Mapping[str, int], components: Sequence[Component], of: Callable[[Component], str], total: int
) -> Iterator[tuple[str, float]]:
    for name in dict.fromkeys(map(of, components)):
        yield name, sum(raw_tokens.get(c.name, 0) for c in components if of(c) == name) / total
