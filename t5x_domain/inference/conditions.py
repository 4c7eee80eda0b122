"""What stands before an input: metadata and a mode token, where training put them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.objectives.prefix import Metadata, Mode, prefix_ids


class Conditions:
    """A mode and a metadata template for every input."""

    def __init__(
        self, vocabulary: Vocabulary | ByteVocabulary, *, mode: str | None = None, template: str | None = None
    ) -> None:
        r"""Either may be None.

        Args:
          vocabulary: the model's.
          mode: mode token, e.g. '[S2S]'; its own id is taken if the vocabulary has one, else it is written as text.
          template: metadata as in training, e.g. "Source: {source}\n\n".
        """
        self._vocabulary = vocabulary
        self._mode = None if mode is None else _mode(mode, vocabulary)
        self._metadata = None if template is None else Metadata(templates=(template,))

    def prefix(self, fields: Mapping[str, Any]) -> np.ndarray:
        """Ids before the input of a record with these fields, int32 [n].

        Raises:
          UserError: the record lacks a field of the template.
        """
        if self._metadata is not None and not self._metadata.text(fields):
            needed = ", ".join(sorted(set().union(*self._metadata.field_sets)))
            raise UserError(f"--metadata needs the fields {needed}, which a record does not have: {str(fields)[:200]}")
        return prefix_ids(self._vocabulary, metadata=self._metadata, fields=fields, mode=self._mode)


def _mode(token: str, vocabulary: Vocabulary | ByteVocabulary) -> Mode:
    try:
        vocabulary.special_id(token)
    except UserError:
        return Mode(token, as_text=True)
    return Mode(token, as_text=False)
