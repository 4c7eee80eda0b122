"""Asking a model: the choice of its prompt, its answers, and what documents cost it, each computed once and kept."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from etils import epath

from t5x_domain.data.labelled import Labelled, Task
from t5x_domain.data.tasks import Corpus
from t5x_domain.errors import UserError
from t5x_domain.evaluation import metrics, prompts
from t5x_domain.evaluation.document_scores import document_costs
from t5x_domain.evaluation.verdict import Answers
from t5x_domain.files import changed_keys, write_atomically
from t5x_domain.inference.answering import Answerer
from t5x_domain.inference.opened import open_model

if TYPE_CHECKING:
    from t5x_domain.evaluation.head_to_head import HeadToHead


class Prompted(NamedTuple):
    """A task's items and the prompts to choose from."""

    task: Task
    metrics: Sequence[str]
    validation: Sequence[Labelled]
    test: Sequence[Labelled]
    candidates: Sequence[prompts.Prompt]
    leaked: int


class Kept:
    """Results in a folder, each computed once."""

    def __init__(self, folder: epath.Path, identity: Mapping[str, str]) -> None:
        """Takes the folder for this comparison. Raises UserError if it holds another one."""
        self._folder, record = folder, folder / "comparison.json"
        if record.exists():
            before = json.loads(record.read_text(encoding="utf-8"))
            if changed := changed_keys(before, identity):
                raise UserError(
                    f"{folder} holds another comparison: {changed[0]} was {before.get(changed[0])}, is "
                    f"{identity.get(changed[0])}. Set another HeadToHead.out_dir."
                )
        write_atomically(record, json.dumps(identity, indent=1).encode())

    def result(self, name: str, asked: Any, compute: Callable[[], Any]) -> Any:
        """The result of that name, plain JSON.

        Args:
          name: names the file.
          asked: what the result is an answer to, plain JSON.
          compute: called if there is no result yet.

        Raises:
          UserError: there is one, but to something else, e.g. because data files have changed.
        """
        path = self._folder / "answers" / f"{name}.json"
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        if path.exists():
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["asked"] != digest:
                raise UserError(
                    f"{path} answers other items or prompts, so the data has changed; remove {self._folder}."
                )
            return record["result"]
        result = compute()
        write_atomically(path, json.dumps({"asked": digest, "result": result}, ensure_ascii=False).encode())
        return result


class Side:
    """One of the two models; opened when something is asked that is not kept."""

    def __init__(self, role: str, path: str, settings: "HeadToHead", kept: Kept) -> None:
        """Opens nothing yet."""
        self._role, self._path, self._settings, self._kept = role, path, settings, kept

    @functools.cached_property
    def _answerer(self) -> Answerer:
        print(f"{self._role}: opening {self._path}", flush=True)
        model = open_model(self._path, flag=f"--{self._role}")
        return Answerer(model, self._settings.decoding, batch_size=self._settings.batch_size)

    def answer(self, one: Prompted) -> Answers:
        """Chooses a prompt on validation data, and answers the test items with it."""
        targets = [item.target for item in one.validation]

        def score(prompt: prompts.Prompt) -> float:
            number = one.candidates.index(prompt)
            said = self._answers(one.task, prompt, one.validation, f"validation-{number}")
            return metrics.score(one.metrics[:1], targets, said)[one.metrics[0]]

        chosen = prompts.choose_prompt(one.candidates, score)
        number = one.candidates.index(chosen.prompt)
        print(
            f"{self._role}: {one.task.name}, prompt {number + 1} of {len(one.candidates)}, "
            f"validation {one.metrics[0]} {chosen.validation_score:.3f}",
            flush=True,
        )
        return Answers(self._answers(one.task, chosen.prompt, one.test, f"test-{number}"), prompts.describe(chosen))

    def costs(self, corpus: Corpus, texts: Sequence[str], measure: str) -> list[tuple[float, float]]:
        """See `document_costs`."""

        def compute() -> list[tuple[float, float]]:
            asked = self._answerer
            return document_costs(asked.model, asked.scorer, texts, measure, seed=self._settings.seed)

        found = self._kept.result(f"{self._role}/corpora/{corpus.name}", [texts, measure], compute)
        return [tuple(cost) for cost in found]

    def _answers(self, task: Task, prompt: prompts.Prompt, items: Sequence[Labelled], name: str) -> list[str]:
        asked = [prompt.ask(item) for item in items]

        def compute() -> list[str]:
            said = self._answerer(task, [self._answerer.model.inputs(text) for text in asked])
            # A model that was shown worked examples may go on with one of its own.
            return said if task.kind == "classification" else [s.split(prompts.SEPARATOR)[0].strip() for s in said]

        return self._kept.result(f"{self._role}/{task.name}/{name}", [asked, *task.labels], compute)
