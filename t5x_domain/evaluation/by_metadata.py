"""Held-out scores of the documents that share a value of a metadata field, e.g. one source or one year."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from t5x_domain.data.cache import CachedSplit
from t5x_domain.data.offsets import Offsets
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.evaluation.perplexity import held_out_scores

# The names of what has no value of its own; in brackets, so that no value is called so.
OTHER, ABSENT = "(other)", "(none)"

# Metadata are read for this many documents at a time, and bytes are counted in so many at most.
_DOCUMENTS_AT_ONCE = 4096


class SomeDocuments:
    """Some documents of a cached split, in its order, with what `Batches` asks of a split."""

    def __init__(self, split: CachedSplit, chosen: np.ndarray):
        """`chosen`: ascending indices of the documents, int64 [n]."""
        self._split, self._chosen = split, chosen
        self.corpus, self.split, self.metadata_fields = split.corpus, split.split, split.metadata_fields
        self.num_documents = len(chosen)

    @functools.cached_property
    def offsets(self) -> Offsets:
        """int64 [num_documents + 1]: tokens before each document."""
        return Offsets.from_lengths(np.diff(self._split.offsets)[self._chosen])

    def documents(self, start: int, stop: int) -> list[np.ndarray]:
        """Tokens of documents [start, stop), each int32 [n]."""
        return [self._split.documents(int(index), int(index) + 1)[0] for index in self._chosen[start:stop]]

    def metadata(self, start: int, stop: int) -> list[dict]:
        """Metadata of documents [start, stop)."""
        return [self._split.metadata(int(index), int(index) + 1)[0] for index in self._chosen[start:stop]]

    def derived(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What `make` makes; it is not kept, since `name` would be that of the whole split."""
        del name
        return make()

    def bytes_per_token(self, vocabulary: Vocabulary | ByteVocabulary) -> float:
        """UTF-8 bytes of the decoded text by its tokens, in the first 4,096 documents."""
        documents = self.documents(0, min(self.num_documents, _DOCUMENTS_AT_ONCE))
        num_bytes = sum(len(vocabulary.decode(document).encode("utf-8")) for document in documents)
        return num_bytes / max(1, sum(map(len, documents)))


def documents_by_value(split: CachedSplit, field: str, *, min_documents: int = 10) -> dict[str, SomeDocuments]:
    """The documents of each value of a field, the most frequent value first.

    Args:
      split: the documents.
      field: name of the metadata field.
      min_documents: a value of fewer documents is pooled with others like it as `OTHER`, which comes last. Documents
        without the field have the value `ABSENT`.

    Raises:
      UserError: no document of the split has the field.
    """
    if field not in split.metadata_fields:
        known = ", ".join(sorted(split.metadata_fields)) or "none"
        raise UserError(f"--by={field}: no document of {split.corpus}/{split.split} has this field; it has {known}.")
    indices: dict[str, list[int]] = {}
    for start in range(0, split.num_documents, _DOCUMENTS_AT_ONCE):
        stop = min(start + _DOCUMENTS_AT_ONCE, split.num_documents)
        for index, fields in enumerate(split.metadata(start, stop), start):
            indices.setdefault(_name(fields.get(field)), []).append(index)
    ordered = sorted(indices.items(), key=lambda item: (-len(item[1]), item[0]))
    groups = {value: found for value, found in ordered if len(found) >= min_documents}
    if rare := [index for value, found in ordered if value not in groups for index in found]:
        groups[OTHER] = sorted(rare)
    return {value: SomeDocuments(split, np.array(found, np.int64)) for value, found in groups.items()}


def scores_by_value(
    groups: Mapping[str, SomeDocuments],
    eval_step: Callable[..., dict[str, Any]],
    params: Any,
    batches: Callable[[SomeDocuments], Iterable[Mapping[str, Any]]],
    vocabulary: Vocabulary | ByteVocabulary,
) -> dict[str, dict[str, float]]:
    """`perplexity.held_out_scores` of each value, with the number of its `documents`.

    Args:
      groups: from `documents_by_value`.
      eval_step, params: as `held_out_scores`.
      batches: makes the features of some documents, on the mesh.
      vocabulary: decodes them, to count their bytes.

    Raises:
      UserError: the documents of a value have no target to score.
    """
    return {
        value: {
            **held_out_scores(
                eval_step, params, batches(documents), bytes_per_token=documents.bytes_per_token(vocabulary)
            ),
            "documents": documents.num_documents,
        }
        for value, documents in groups.items()
    }


def _name(value: Any) -> str:
    if value is None or value == "":
        return ABSENT
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
