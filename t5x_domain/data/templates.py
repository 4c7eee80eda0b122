"""Templates that make a text of a record's fields, e.g. "question: {question} context: {text}"."""

import string
from collections.abc import Mapping
from typing import Any

from t5x_domain.errors import UserError


def fields_of(template: str, setting: str) -> list[str]:
    """Names of the fields that stand in a template.

    Args:
      template: literal text and fields by name; a literal brace is written twice.
      setting: what the template was given as, for messages.

    Raises:
      UserError: it does not parse, has no field, or has one with more than a name, e.g. "{text:>9}" or "{text!r}".
    """
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise UserError(f"{setting} = {template!r}: {error}; write fields as {{text}}, a brace twice.") from error
    if not parts or any(not name or spec or conversion for name, spec, conversion in parts):
        raise UserError(f"{setting} = {template!r}: write one or more fields by nothing but their names, as {{text}}.")
    return [name for name, _, _ in parts]


def filled(template: str, fields: Mapping[str, Any], place: str, *, mend: str = "mend the record or the task") -> str:
    """The template with the text of the fields, see `text_of`, whose arguments and errors it shares."""
    # Not str.format, in which a field's name could reach into objects and other fields.
    return "".join(
        literal + ("" if name is None else text_of(fields, name, place, mend=mend))
        for literal, name, _, _ in string.Formatter().parse(template)
    )


def field_of(fields: Mapping[str, Any], key: str, place: str, *, mend: str = "mend the record or the task") -> Any:
    """A field's value.

    Args:
      fields: of a record.
      key: the field's name.
      place: where the record stands, for messages.
      mend: what to do without the field, for messages.

    Raises:
      UserError: there is none, or it is null.
    """
    if fields.get(key) is None:
        raise UserError(f"{place}: there is no field '{key}', only {', '.join(fields)}; {mend}.")
    return fields[key]


def text_of(fields: Mapping[str, Any], key: str, place: str, *, mend: str = "mend the record or the task") -> str:
    """A field as text; numbers are written out, a list of words joined by blanks.

    Raises:
      UserError: as `field_of`; or it is no text, or none that can be written as UTF-8.
    """
    value = field_of(fields, key, place, mend=mend)
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        value = " ".join(value)
    if not isinstance(value, str | int | float):
        raise UserError(f"{place}: field '{key}' is no text but {type(value).__name__}; {mend}.")
    try:
        str(value).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: field '{key}' holds half of a surrogate pair; mend the record.") from error
    return str(value)
