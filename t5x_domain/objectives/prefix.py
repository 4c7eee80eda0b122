"""What stands before an example and is never corrupted nor predicted: the document's metadata, then a mode token.

Metadata conditioning: Gao et al. 2025, "Metadata Conditioning Accelerates Language Model Pre-training" (MeCo,
arXiv:2501.01956), section 2. Mode tokens: Tay et al. 2022, "UL2" (arXiv:2205.05131), section 3.1.2.
"""

import dataclasses
import hashlib
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import numpy as np

from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError

NO_TOKENS = np.empty(0, np.int32)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Mode:
    """A mode token, which tells the model which kind of denoising follows.

    Attributes:
      token: e.g. '[NLU]', '[NLG]', '[S2S]' of the released UL2 checkpoints, '[R]', '[X]', '[S]' of the paper.
      as_text: True writes it in ordinary pieces, as the released checkpoints do; False takes an id of its own, which
        `prepare` gives it when it trains the vocabulary.
    """

    token: str
    as_text: bool = True

    def ids(self, vocabulary: Vocabulary | ByteVocabulary) -> np.ndarray:
        """Token ids, int32 [n].

        Raises:
          UserError: the vocabulary has no id of its own for the token, or cannot write it.
        """
        if not self.as_text:
            return np.array([vocabulary.special_id(self.token)], np.int32)
        ids = vocabulary.encode(self.token)
        if not len(ids) or vocabulary.unk_id in ids:
            raise UserError(
                f"the vocabulary cannot write the mode token '{self.token}'; choose another text, or give it an id of "
                "its own with Mode.as_text=False in a vocabulary that `prepare` trains."
            )
        return ids


def _domain(url: str) -> str:
    """'https://en.wikipedia.org/wiki/Law' -> 'en.wikipedia.org', as MeCo cuts it."""
    return re.sub("https?://", "", url).split("/", 1)[0]


def _suffix(url: str) -> str:
    """'https://en.wikipedia.org/wiki/Law' -> 'org'."""
    return _domain(url).rsplit(".", 1)[-1]


def _hash(text: str) -> str:
    """Eight hexadecimal digits in the place of a name: the grouping stays, the meaning goes (MeCo, section 5.1)."""
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


FILTERS = {"domain": _domain, "suffix": _suffix, "hash": _hash}


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Metadata:
    """A document's metadata as text before it.

    A template names fields in braces, each with filters if need be: "URL: {url:domain}\\n\\n", "Date: {date}\\n\\n",
    "Site: {url:domain,hash}\\n\\n". Filters are `domain` (of a URL), `suffix` (of its domain) and `hash`.

    Attributes:
      templates: the first whose fields a document has is used; a last one without fields is for documents that have
        none of them. A document that no template suits goes without metadata. A single one may stand alone.
      rate: share of documents that carry it, in [0, 1]; drawn anew for every document in every epoch.
      max_tokens: longer metadata are cut.
      fields: these instead of every document's own, for conditional inference; None for the document's own.
    """

    templates: str | Sequence[str] = ("URL: {url:domain}\n\n",)
    rate: float = 1.0
    max_tokens: int = 64
    fields: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        alone = isinstance(self.templates, str)
        object.__setattr__(self, "templates", (self.templates,) if alone else tuple(self.templates))
        if not any(self.templates):
            raise UserError("Metadata.templates is empty; give at least one template.")
        if not 0 <= self.rate <= 1:
            raise UserError(f"Metadata.rate={self.rate} must lie between 0 and 1.")
        if not 1 <= self.max_tokens < 1 << 16:
            raise UserError(f"Metadata.max_tokens={self.max_tokens} must be at least 1 and below 65,536.")
        for template in self.templates:
            self._parse(template)

    @staticmethod
    def _parse(template: str) -> list[tuple[str, str | None, list[str]]]:
        """[(text, field after it or None, filters of the field), …]."""
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise UserError(f"Metadata.templates: {template!r} is no template: {error}.") from error
        result = []
        for text, field, spec, conversion in parts:
            filters = spec.split(",") if spec else []
            if field == "" or conversion:
                raise UserError(f"Metadata.templates: {template!r} must name fields as {{name}} or {{name:filter}}.")
            if unknown := [name for name in filters if name not in FILTERS]:
                raise UserError(
                    f"Metadata.templates: {template!r} has the filter '{unknown[0]}', not one of {', '.join(FILTERS)}."
                )
            result.append((text, field, filters))
        return result

    @property
    def field_sets(self) -> list[set[str]]:
        """The fields that each template needs."""
        return [{field for _, field, _ in self._parse(template) if field is not None} for template in self.templates]

    def check_fields(self, known: set[str], where: str) -> None:
        """Raises UserError if every template needs a field that no document has; `where` names the documents."""
        if self.fields is not None:
            known, where = set(self.fields), "the given metadata"
            named = set().union(*self.field_sets)
            if unknown := sorted(known - named):
                raise UserError(
                    f"the given metadata name the field {unknown[0]}, but Metadata.templates have only "
                    f"{', '.join(sorted(named)) or 'none'}."
                )
        if not any(fields <= known for fields in self.field_sets):
            missing = sorted(set().union(*self.field_sets) - known)
            raise UserError(
                f"Metadata.templates need the field{'s' * (len(missing) > 1)} {', '.join(missing)}, which nothing in "
                f"{where} has; the fields there are: {', '.join(sorted(known)) or 'none'}."
            )

    def text(self, fields: Mapping[str, Any]) -> str:
        """The metadata of a document with these fields; '' if no template suits."""
        given = fields if self.fields is None else self.fields
        fields = {name: value for name, value in given.items() if value not in (None, "", [])}
        for template, needed in zip(self.templates, self.field_sets, strict=True):
            if needed <= fields.keys():
                return "".join(_filled(*part, fields) for part in self._parse(template))
        return ""

    def ids(self, fields: Mapping[str, Any], vocabulary: Vocabulary | ByteVocabulary) -> np.ndarray:
        """Token ids of `text`, int32 [n], n <= max_tokens."""
        text = self.text(fields)
        return vocabulary.encode(text)[: self.max_tokens] if text else NO_TOKENS

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digits that tell apart whatever gives a document other metadata; `rate` does not."""
        return hashlib.sha256(repr((self.templates, self.max_tokens, self.fields)).encode()).hexdigest()[:16]


def prefix_ids(
    vocabulary: Vocabulary | ByteVocabulary,
    *,
    metadata: Metadata | None = None,
    fields: Mapping[str, Any] | None = None,
    mode: Mode | None = None,
) -> np.ndarray:
    """What stands before an example of a document with these fields: metadata, then the mode token; int32 [n]."""
    before = NO_TOKENS if metadata is None else metadata.ids(fields or {}, vocabulary)
    return np.concatenate([before, NO_TOKENS if mode is None else mode.ids(vocabulary)])


def _filtered(value: Any, filters: Sequence[str]) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    for name in filters:
        text = FILTERS[name](text)
    return text


def _filled(text: str, field: str | None, filters: Sequence[str], fields: Mapping[str, Any]) -> str:
    return text + ("" if field is None else _filtered(fields[field], filters))
