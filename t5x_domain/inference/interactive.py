"""A prompt: blanks are filled, anything else is continued or answered."""

import re
from collections.abc import Callable, Iterable

import numpy as np

from t5x_domain.errors import UserError
from t5x_domain.inference.generator import Generator
from t5x_domain.inference.opened import Opened
from t5x_domain.objectives.span_corruption import spans

BLANK = re.compile(r"_{3,}")
HELP = "Write a text; ___ is a blank to fill. :q leaves."


def converse(model: Opened, generator: Generator, prefix: np.ndarray, lines: Iterable[str], say: Callable) -> None:
    """Answers each line until ':q' or the end.

    Args:
      model: the model asked.
      generator: writes its answers.
      prefix: ids before every input.
      lines: what the user writes.
      say: prints an answer.
    """
    for number, line in enumerate(map(str.strip, lines)):
        if line in (":q", ":quit"):
            return
        if not line:
            continue
        try:
            for answer in _answers(model, generator, prefix, line, number):
                say(answer)
        except UserError as error:
            say(f"error: {error}")


def _answers(model: Opened, generator: Generator, prefix: np.ndarray, line: str, number: int) -> list[str]:
    pieces = BLANK.split(line)
    if len(pieces) == 1:
        (outputs,) = generator([model.inputs(line, prefix)], first=number)
        before = "" if model.reads_whole_inputs else f"{line} "
        return [f"{before}{output.text}  ({output.score:.2f})" for output in outputs]
    if not model.reads_whole_inputs:
        raise UserError("this model continues text and was not trained to fill blanks; write a beginning.")
    (outputs,) = generator([with_blanks(model, pieces, prefix)], first=number)
    return [f"{filled(model, pieces, output.tokens)}  ({output.score:.2f})" for output in outputs]


def with_blanks(model: Opened, pieces: list[str], prefix: np.ndarray) -> np.ndarray:
    """Ids of the pieces with a sentinel between each two, int32 [n]."""
    vocabulary = model.vocabulary
    parts = [prefix, vocabulary.encode(pieces[0])]
    for sentinel, piece in zip(vocabulary.sentinel_ids(len(pieces) - 1), pieces[1:], strict=True):
        parts += [[sentinel], vocabulary.encode(piece)]
    return np.concatenate([*parts, [vocabulary.eos_id]]).astype(np.int32)


def filled(model: Opened, pieces: list[str], tokens: np.ndarray) -> str:
    """The text with what was written for each blank in brackets; [] where nothing was."""
    vocabulary = model.vocabulary
    written = spans(tokens, vocabulary)
    text = pieces[0]
    for sentinel, piece in zip(vocabulary.sentinel_ids(len(pieces) - 1).tolist(), pieces[1:], strict=True):
        text += f"[{vocabulary.decode(written.get(sentinel, [])).strip()}]{piece}"
    return text
