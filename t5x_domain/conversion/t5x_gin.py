"""What arrays do not tell of their model: read from the `config.gin` that T5X leaves in MODEL_DIR, or assumed."""

import ast
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from t5x_domain.errors import UserError

_SYNONYMS = {"swish": "silu"}
_CONFIG = r"^\S*(?:T5Config|TransformerConfig)"  # of T5X's networks, with or without module and scope


def unsaid_fields(
    folder: epath.Path, gated: bool, overrides: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Fields of `ModelConfig`, and a sentence for each that had to be assumed.

    Args:
      folder: of the arrays; `config.gin` is looked for there, beside `state/`, and in MODEL_DIR.
      gated: whether each feed-forward layer has two input kernels.
      overrides: fields that need neither be read nor assumed.
      defaults: fields that need not be assumed if they are not read.

    Raises:
      UserError: config.gin belongs to another model.
    """
    step = folder.parent if folder.name == "state" else folder
    files = [place / "config.gin" for place in (folder, step, step.parent)]
    file = next((file for file in files if file.is_file()), None)
    said = {} if file is None else _said(file.read_text())
    activations = said.get("mlp_activations")
    if activations and len(activations) != 1 + gated and "mlp_activations" not in overrides:
        raise UserError(
            f"{file}: mlp_activations = {activations}, but each feed-forward layer of the checkpoint has "
            f"{1 + gated} input kernel(s); move this file away or give the right mlp_activations."
        )
    guesses = {
        "mlp_activations": ("gelu", "linear") if gated else ("relu",),
        "dropout_rate": 0.0,
        "norm_epsilon": 1e-6,
        "relative_bias_max_distance": 128,
    }
    assumed = [
        f"{key} = {guess!r}, which neither the arrays nor a config.gin beside them say; --gin.ModelConfig.{key}=VALUE "
        "sets it."
        for key, guess in guesses.items()
        if key not in said and key not in overrides and key not in defaults
    ]
    return guesses | dict(defaults) | said, assumed


def _said(text: str) -> dict[str, Any]:
    """What can be used of a gin file. No full reader: gin would have to import T5X for that."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"#.*", "", text)) + "\n"
    said: dict[str, Any] = {}
    activations = _bound(text, "mlp_activations")
    if isinstance(activations, tuple | list):
        said["mlp_activations"] = tuple(_SYNONYMS.get(name, name) for name in activations)
    dropout_rate = _bound(text, "dropout_rate")
    if isinstance(dropout_rate, float | int):
        said["dropout_rate"] = float(dropout_rate)
    return said


def _bound(text: str, key: str) -> Any:
    """The value of a field of the network's configuration, by itself or through a macro; None if there is none."""
    blocks = "".join(re.findall(rf"{_CONFIG}:[ \t]*\n((?:[ \t]+\S.*\n|[ \t]*\n)*)", text, re.MULTILINE))
    value = _last(rf"{_CONFIG}\.{key}[ \t]*=[ \t]*(.+)$", text) or _last(rf"^[ \t]+{key}[ \t]*=[ \t]*(.+)$", blocks)
    if value and value.startswith("%"):
        value = _last(rf"^{re.escape(value[1:])}[ \t]*=[ \t]*(.+)$", text)
    try:
        return ast.literal_eval(value) if value else None
    except (ValueError, SyntaxError):  # something that only gin can make
        return None


def _last(pattern: str, text: str) -> str | None:
    """In gin the last binding counts."""
    found = re.findall(pattern, text, re.MULTILINE)
    return found[-1].strip() if found else None
