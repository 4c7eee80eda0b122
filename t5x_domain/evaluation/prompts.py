"""Prompts for models that were not fine-tuned: templates, few-shot draws, and the choice on validation data.

A prompt is a template and a draw of worked examples from the training split. Which prompt suits a model is a property
of the model: a comparison under one prompt for both favours the model that the prompt was written for (Jeong et al.
2024, "Are We Making Progress?", section 5). So each model chooses its own, on validation data only.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_domain.data.templates import fields_of, filled
from t5x_domain.errors import UserError

# What stands between worked examples, and before the item that is asked.
SEPARATOR = "\n\n"


class Prompt(NamedTuple):
    """A way to ask.

    Attributes:
      template: a worked example without its answer, e.g. "Question: {inputs}\\nAnswer:"; `{inputs}` and every field of
        the record may stand in it.
      draw: number of the few-shot draw.
      shots: worked examples as text, each with its answer.
    """

    template: str
    draw: int
    shots: Sequence[str]

    def ask(self, item: Any) -> str:
        """The text that the model reads about an item (`data.labelled.Labelled`)."""
        return SEPARATOR.join([*self.shots, _asked(self.template, item)])


class Chosen(NamedTuple):
    """The prompt that a model did best with on validation data, its score, and the scores of all in their order."""

    prompt: Prompt
    validation_score: float
    tried: Sequence[float]


def check_template(template: str, target_field: str | None) -> None:
    """Refuses templates that do not parse, ask nothing, or tell the answer.

    Args:
      template: see `Prompt`.
      target_field: the field that holds the answer, if there is one.

    Raises:
      UserError: what is wrong.
    """
    if target_field in fields_of(template, "template"):
        raise UserError(f"template {template!r} tells the answer, field '{target_field}'; leave it out.")


def answer_text(target: Any) -> str:
    """What a worked example shows as its answer: the text, or the first of several answers; "" if there is none."""
    if isinstance(target, str):
        return target
    return target[0] if target else ""


def candidates(templates: Sequence[str], training: Sequence[Any], *, shots: int, draws: int, seed: int) -> list[Prompt]:
    """Every template with every draw: the default template's first.

    Draw k takes the same training items whatever the template and the model.

    Args:
      templates: the first is the default.
      training: items of the training split.
      shots: worked examples in a prompt; with 0 there is one draw.
      draws: few-shot draws for each template.
      seed: of the draws.

    Raises:
      UserError: there are fewer training items than shots, or no template.
    """
    if not templates:
        raise UserError("no prompt template; set HeadToHead.templates.")
    if len(training) < shots:
        raise UserError(f"{len(training)} training items are fewer than shots = {shots}; lower HeadToHead.shots.")
    streams = np.random.default_rng(seed).spawn(draws if shots else 1)
    drawn = [[training[i] for i in rng.choice(len(training), shots, replace=False)] for rng in streams]
    return [
        Prompt(template, draw, [_worked(template, item) for item in items])
        for template, (draw, items) in itertools.product(templates, enumerate(drawn))
    ]


def choose_prompt(prompts: Sequence[Prompt], score: Callable[[Prompt], float]) -> Chosen:
    """The prompt with the highest validation score; of equal ones the first, so that no chance decides."""
    tried = [score(prompt) for prompt in prompts]
    best = int(np.argmax(tried))
    return Chosen(prompts[best], tried[best], tried)


def subsample(items: Sequence[Any], most: int | None, *, seed: int) -> list[Any]:
    """At most so many items, drawn without replacement and kept in their order; the same for every model."""
    if most is None or len(items) <= most:
        return list(items)
    return [items[i] for i in np.sort(np.random.default_rng(seed).choice(len(items), most, replace=False))]


def leaked(test: Sequence[Any], *seen: Sequence[Any]) -> int:
    """How many test items have inputs, but for white space and case, that stand in one of the other splits too."""
    known = {_plain(item) for items in seen for item in items}
    return sum(_plain(item) in known for item in test)


def describe(chosen: Chosen) -> Mapping[str, Any]:
    """What verdict.json says of it."""
    return {
        "template": chosen.prompt.template,
        "draw": chosen.prompt.draw,
        "shots": len(chosen.prompt.shots),
        "validation_score": chosen.validation_score,
        "tried": len(chosen.tried),
        "validation_scores": {"lowest": min(chosen.tried), "highest": max(chosen.tried)},
    }


def _worked(template: str, item: Any) -> str:
    return f"{_asked(template, item)} {answer_text(item.target)}".rstrip()


def _asked(template: str, item: Any) -> str:
    fields = {**item.fields, "inputs": item.inputs}
    return filled(template, fields, f"template {template!r}, item {item.id}", mend="mend the template")


def _plain(item: Any) -> str:
    return " ".join(item.inputs.lower().split())
