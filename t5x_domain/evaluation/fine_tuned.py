"""What a comparison reads of fine-tunings and training runs: predictions by seed, and learning curves."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gin
import numpy as np
from etils import epath

from t5x_domain import files
from t5x_domain.adaptation.finetune_config import IDENTITY_FILE, OF_THE_MODEL
from t5x_domain.errors import UserError
from t5x_domain.evaluation import metrics
from t5x_domain.files import changed_keys
from t5x_domain.training.metrics import read_json_lines

Curve = list[tuple[int, float]]


@gin.configurable
@dataclasses.dataclass(frozen=True)
class FineTuned:
    """Two fine-tunings on one task, as `t5x_domain.finetune` leaves them.

    Attributes:
      name: of the task.
      base, adapted: output folders, with `seed_K/predictions-test.jsonl` of at least two seeds each.
      metric: key of `metrics.METRICS`.
      split: whose predictions are compared.
    """

    name: str
    base: str
    adapted: str
    metric: str = "accuracy"
    split: str = "test"

    def __post_init__(self) -> None:
        if self.metric not in metrics.METRICS:
            raise UserError(f"FineTuned.metric = '{self.metric}': choose one of {', '.join(metrics.METRICS)}.")

    def predictions(self) -> tuple[list[Any], dict[int, list[Any]], dict[int, list[Any]]]:
        """Targets of the test items, and of base and adapted model the predictions of each seed, in the same order.

        Raises:
          UserError: a folder has no predictions, one is damaged, or not all are of the same items.
        """
        targets: dict[str, Any] | None = None
        sides: list[dict[int, list[Any]]] = []
        for folder in (self.base, self.adapted):
            sides.append({})
            for seed, seed_folder in _seed_folders(folder).items():
                path = seed_folder / f"predictions-{self.split}.jsonl"
                lines = _lines(path)
                of_seed = {line["id"]: line["target"] for line in lines}
                targets = of_seed if targets is None else targets
                if of_seed != targets:
                    raise UserError(f"{path}: its items or targets are not those of the other seeds; fine-tune again.")
                said = {line["id"]: line["prediction"] for line in lines}
                sides[-1][seed] = [said[item] for item in targets]
        return list(targets.values()), *sides

    def differences(self) -> list[str]:
        """Settings in which the two fine-tunings differ, but for the model they start from."""
        records = [files.path(folder) / IDENTITY_FILE for folder in (self.base, self.adapted)]
        if not all(record.exists() for record in records):
            return []
        base, adapted = (json.loads(record.read_text(encoding="utf-8")) for record in records)
        return [key for key in changed_keys(base, adapted) if key not in OF_THE_MODEL]

    def curves(self) -> dict[str, dict[str, Curve]]:
        """Training loss and validation scores of both, the mean over seeds; empty without logs."""
        found: dict[str, dict[str, Curve]] = {}
        for model, folder in (("base", self.base), ("adapted", self.adapted)):
            folders = list(_seed_folders(folder).values())
            loss = _mean_curve(folders, "metrics.jsonl", lambda line: line.get("loss"))
            score = _mean_curve(
                folders, "evaluations.jsonl", lambda line: line["corpora"].get("validation", {}).get(self.metric)
            )
            for what, curve in (("training loss", loss), (f"validation {self.metric}", score)):
                if curve:
                    found.setdefault(f"{self.name}: {what}", {})[model] = curve
        return found


def run_curves(runs: Mapping[str, str]) -> dict[str, dict[str, Curve]]:
    """The training loss of {name: run directory}, in one figure; empty without runs.

    Raises:
      UserError: a directory has no metrics.jsonl.
    """
    curves = {}
    for name, folder in runs.items():
        curves[name] = _mean_curve([files.path(folder)], "metrics.jsonl", lambda line: line.get("loss"))
        if not curves[name]:
            raise UserError(f"{folder}/metrics.jsonl holds no training loss; mend HeadToHead.training_runs['{name}'].")
    return {"Training loss": curves} if curves else {}


def _seed_folders(folder: str) -> dict[int, epath.Path]:
    found = {
        int(match[1]): path
        for path in files.path(folder).glob("seed_*")
        if (match := re.fullmatch(r"seed_(\d+)", path.name))
    }
    if not found:
        raise UserError(f"{folder}: no folder seed_K there; give what `finetune` wrote with --out_dir.")
    return dict(sorted(found.items()))


def _lines(path: epath.Path) -> list[dict[str, Any]]:
    """Whole records of a predictions file."""
    if not path.exists():
        raise UserError(f"{path} is missing; let that fine-tuning finish, with a task that has this split.")
    lines = []
    # Not `str.splitlines`: a text that a model wrote may hold U+2028 and its like, which JSON leaves as they are.
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(text)
        except ValueError:
            record = {}
        if not isinstance(record, dict) or not {"id", "target", "prediction"} <= record.keys():
            raise UserError(f"{path}, line {number}: no object with id, target and prediction; fine-tune again.")
        lines.append(record)
    return lines


def _mean_curve(folders: Sequence[epath.Path], file: str, value: Callable[[Mapping[str, Any]], float | None]) -> Curve:
    """Mean over folders, at the steps that all of them have."""
    logged = [
        {line["step"]: number for line in read_json_lines(folder / file) if (number := value(line)) is not None}
        for folder in folders
    ]
    steps = sorted(set.intersection(*(set(one) for one in logged)))
    return [(step, float(np.mean([one[step] for one in logged]))) for step in steps]
