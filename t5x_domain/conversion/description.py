"""What model a folder of ours holds: `model.json` for programs, `model.gin` to include, and the vocabulary itself."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from t5x_domain.conversion.stores import absolute
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.files import path, write_atomically
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder, EncoderOnly, LanguageModel
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.rtd import DetectingEncoderDecoder, ReplacedTokenDetection

DESCRIPTION, VOCABULARY, GIN = "model.json", "vocabulary.model", "model.gin"
_KINDS = {"sentencepiece": Vocabulary, "bytes": ByteVocabulary}
_MODELS = {
    model.__name__: model
    for model in (EncoderDecoder, DecoderOnly, EncoderOnly, ReplacedTokenDetection, DetectingEncoderDecoder)
}


def describe(
    folder: epath.PathLike,
    model: type[LanguageModel],
    config: ModelConfig,
    vocabulary: Vocabulary | ByteVocabulary | None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes model.json and, if it is SentencePiece's, the vocabulary beside it."""
    described = None
    if vocabulary is not None:
        described = {"kind": vocabulary.description["kind"], "extra_ids": vocabulary.extra_ids}
    folder = path(folder)
    if isinstance(vocabulary, Vocabulary):
        write_atomically(folder / VOCABULARY, path(vocabulary.model_file).read_bytes())
    description = {
        "model": model.__name__,
        "config": dataclasses.asdict(config),
        "vocabulary": described,
        "facts": dict(facts or {}),
    }
    write_atomically(folder / DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())


def read_description(
    folder: epath.Path,
) -> tuple[type[LanguageModel], ModelConfig, Vocabulary | ByteVocabulary | None, dict[str, Any]]:
    """Model, its shape, its vocabulary and the facts known of its training.

    Raises:
      UserError: model.json is damaged.
    """
    file = folder / DESCRIPTION
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        model = _MODELS[description["model"]]
        config = ModelConfig(**{key: _frozen(value) for key, value in description["config"].items()})
        vocabulary = description["vocabulary"]
        if vocabulary is not None:
            place = [str(folder / VOCABULARY)] if vocabulary["kind"] == "sentencepiece" else []
            vocabulary = _KINDS[vocabulary["kind"]](*place, extra_ids=vocabulary["extra_ids"])
        return model, config, vocabulary, description["facts"]
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: no description of a model ({error!r}); restore that file.") from error


def write_gin(
    folder: Path,
    model: type[LanguageModel],
    config: ModelConfig,
    vocabulary: Vocabulary | ByteVocabulary | None,
    *,
    home: str,
) -> None:
    """Writes model.gin, to be included by the gin file of a run; `home` is where the folder will be then."""
    settings = {key: _frozen(value) for key, value in dataclasses.asdict(config).items()}
    lines = [
        "# Include this last in the gin file of a run that starts with --init_from=<this folder>. If the folder moves,",
        "# change VOCABULARY_FILE.",
        "",
        f"MODEL = @{model.__name__}",
        *(f"ModelConfig.{key} = {value!r}" for key, value in settings.items() if key not in ModelConfig.HOW),
    ]
    if vocabulary is not None:
        kind = type(vocabulary).__name__
        lines += ["", f"VOCABULARY = @{kind}()", f"{kind}.extra_ids = {vocabulary.extra_ids}"]
        lines += ["VOCABULARY_SIZE = None  # it is not to be trained"]
    if isinstance(vocabulary, Vocabulary):
        place = str(absolute(home) / VOCABULARY)
        lines += [f"VOCABULARY_FILE = {place!r}", "Vocabulary.model_file = %VOCABULARY_FILE"]
    (folder / GIN).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _frozen(value: Any) -> Any:
    """JSON has lists where the configuration has tuples."""
    return tuple(value) if isinstance(value, list) else value
