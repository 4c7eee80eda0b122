"""What every format is read into and written from: a model's shape, its vocabulary, and parameters not yet read."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_domain.adaptation.transplant import Transplant
from t5x_domain.conversion.layout import EMBEDDINGS, part_shapes
from t5x_domain.conversion.tensors import Tensor
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import LanguageModel
from t5x_domain.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class SecondMoments:
    """Adafactor's state (Shazeer & Stern 2018), with which a run can go on.

    Attributes:
      step: updates done so far.
      slots: by the name of a parameter, {"v_row", "v_col"} or {"v"} in the form that `optax.scale_by_factored_rms`
        keeps for a parameter of our shape.
    """

    step: int
    slots: Mapping[str, Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model in some file format.

    Attributes:
      origin: where it was read from, for messages.
      model: the assembly.
      config: its shape.
      tensors: parameters by the names of `conversion.layout`.
      vocabulary: None if the files do not say it.
      second_moments: state of the optimizer, where there is one that can be used.
      facts: what is known of its training, for the model card.
    """

    origin: str
    model: type[LanguageModel]
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    vocabulary: Vocabulary | ByteVocabulary | None = None
    second_moments: SecondMoments | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def checked(self) -> "Checkpoint":
        """Itself, if there is one tensor of the right shape for every parameter, no other, and a row for every token.

        Raises:
          UserError: a list of what is missing, left over or of another shape.
        """
        wanted = part_shapes(self.model, self.config)
        missing = [name for name in wanted if name not in self.tensors]
        extra = [name for name in self.tensors if name not in wanted]
        other = [
            f"{name} {tensor.shape}, not {wanted[name]}"
            for name, tensor in self.tensors.items()
            if name in wanted and tensor.shape != wanted[name]
        ]
        problems = {"missing": missing, "left over": extra, "of another shape": other}
        if any(problems.values()):
            said = "; ".join(f"{what}: {_listed(names)}" for what, names in problems.items() if names)
            raise UserError(f"{self.origin}: its tensors are not those of its {self.model.__name__}. {said}.")
        if self.vocabulary is not None and self.vocabulary.vocab_size > self.config.vocab_size:
            raise UserError(
                f"{self.origin}: the vocabulary has {self.vocabulary.vocab_size} ids but the embedding only "
                f"{self.config.vocab_size} rows; one of them belongs to another model."
            )
        return self

    def with_vocabulary(
        self, vocabulary: Vocabulary | ByteVocabulary, num_rows: int, *, init: str = "mean", seed: int = 0
    ) -> "Checkpoint":
        """The model for another vocabulary, its embeddings transplanted by the meaning of the ids.

        The optimizer's state stays only if every id and the number of rows do. Nothing is read yet; the first read of a
        transplanted table, or of a part, makes the whole and keeps it.

        Args:
          vocabulary: the new one.
          num_rows: rows of its embedding, at least one for each id.
          init: of new rows, see `Transplant.apply`.
          seed: of "random".

        Raises:
          UserError: the vocabulary of this checkpoint is not known, `num_rows` is too small, an unknown `init`.
        """
        if self.vocabulary is None:
            raise UserError(
                f"{self.origin}: its vocabulary is not known, so its embedding cannot be fitted to another; "
                "give the SentencePiece model that it was trained with."
            )
        same_rows = num_rows == self.config.vocab_size
        if same_rows and vocabulary.fingerprint == self.vocabulary.fingerprint:
            return self
        plan = Transplant.plan(self.vocabulary, vocabulary)
        plan.check(num_rows, init)

        def transplanted(table: Tensor, number: int) -> Tensor:
            whole = functools.cache(lambda: plan.apply(table.read(), num_rows, init, [seed, number]))
            return Tensor((num_rows, table.shape[1]), table.dtype, lambda index: whole()[index])

        tables = [name for name in EMBEDDINGS if name in self.tensors]
        moments = self.second_moments if plan.unchanged and same_rows else None
        note = f"Embedding fitted to a vocabulary of {len(plan.rows):,} ids: {plan.copied:,} rows copied, "
        note += f"{plan.averaged:,} {'averaged' if init == 'mean' else 'drawn at random'}"
        note += "." if moments is self.second_moments else "; the optimizer's state was left behind."
        return dataclasses.replace(
            self,
            config=dataclasses.replace(self.config, vocab_size=num_rows),
            tensors={
                **self.tensors,
                **{name: transplanted(self.tensors[name], number) for number, name in enumerate(tables)},
            },
            vocabulary=vocabulary,
            second_moments=moments,
            facts={**self.facts, "notes": [*self.facts.get("notes", []), note]},
        )


def _listed(names: Sequence[str]) -> str:
    """All names; those that differ in the number of a layer alone are one, `encoder/{0-5,7}/norm/scale`."""
    layers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        head, number, tail = re.fullmatch(r"(\D*)(\d*)(.*)", name, re.DOTALL).groups()
        layers.setdefault((head, tail), []).extend([int(number)] if number else [])
    return ", ".join(f"{head}{_ranges(numbers)}{tail}" for (head, tail), numbers in layers.items())


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    said = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{{{said}}}" if len(numbers) > 1 else said
