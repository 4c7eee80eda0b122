"""One run or many: which bindings each has, and what it and its directory are called."""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from t5x_domain.errors import UserError

Point = tuple[str, ...]


def grid(axes: Mapping[str, Sequence[float | str]]) -> tuple[Point, ...]:
    """Every combination of values, the last axis fastest, for `config.sweep`.

    {"linear.peak": (0.01, 0.03), "DENOISERS": ("'t5'", "'ul2_442'")} has four points. Text is gin's own, hence a
    string has quotes within.
    """
    return tuple(
        tuple(f"{name}={value}" for name, value in zip(axes, values, strict=True))
        for values in itertools.product(*axes.values())
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
      name: of the run directory, the same whenever the same point is launched.
      bindings: 'NAME=VALUE', the config's and those of its point of the sweep; a later one wins.
      run_dir: `<storage>/<name>`.
    """

    name: str
    bindings: Point
    run_dir: str

    @property
    def job_name(self) -> str:
        """The name in the form of a DNS label of at most 40 characters, which Kubernetes and xpk ask for."""
        label = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        if label == self.name and len(label) <= 40 and label[0].isalpha():
            return label
        label = label if label[0].isalpha() else f"run-{label}"
        return f"{label[:33].rstrip('-')}-{_digest(self.name)}"

    def program(self, config: ConfigDict, gin_files: Sequence[str] | None = None) -> list[str]:
        """The command of every process; `gin_files` where they lie elsewhere on the machine that runs it."""
        return [
            config.python,
            *("-m", "t5x_domain.train"),
            *(f"--gin_file={file}" for file in gin_files or config.gin_files),
            *(f"--gin_search_path={folder}" for folder in config.gin_search_paths),
            f"--run_dir={self.run_dir}",
            *(f"--gin.{binding}" for binding in self.bindings),
        ]


def runs(config: ConfigDict) -> list[Run]:
    """The runs of a configuration, one for each point of its sweep.

    Raises:
      UserError: two points are the same.
    """
    points = config.sweep or ((),)
    names = [_name(config.name, point) for point in points]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"config.sweep: two points are {twice}; leave one out.")
    storage = config.storage.rstrip("/")
    return [
        Run(name, (*config.overrides, *point), f"{storage}/{name}") for name, point in zip(names, points, strict=True)
    ]


def environment(config: ConfigDict) -> dict[str, str]:
    """Environment variables of every process."""
    cache = {"JAX_COMPILATION_CACHE_DIR": config.compilation_cache} if config.compilation_cache else {}
    return {**cache, **{key: str(value) for key, value in config.env.items()}}


def for_kubernetes(text: str) -> str:
    """Text of a container's command or environment: Kubernetes reads `$(NAME)` as a variable and `$$` as a dollar."""
    return text.replace("$", "$$")


def _name(name: str, point: Point) -> str:
    """`name-linear.peak=0.01,Run.seed=1`; where that is no good folder's name, with a digest of the point."""
    if not point:
        return name
    said = ",".join(point)
    readable = re.sub(r"[^A-Za-z0-9.,=_+-]+", "", said)
    if readable == said and len(said) <= 80:
        return f"{name}-{said}"
    return f"{name}-{readable[:70]}-{_digest(said)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
