"""What a file of configs/ says: where a run of gin files happens, on how many machines, and how often."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from launch.tpu import TPUS, slice_of
from t5x_domain.cli import gin_search_paths
from t5x_domain.errors import UserError

_SECTIONS = {
    # A machine of one's own. `processes` share its accelerators, one each; with accelerator = "cpu" each has
    # `devices_per_process` virtual ones.
    "local": {"processes": 1, "devices_per_process": 1},
    # `time_limit` as sbatch reads it (1-12:00:00); `parallel_runs` of a sweep at once, 0 for all; `options` are more
    # lines for sbatch, such as "--exclusive".
    "slurm": {
        "nodes": 1,
        "gpus_per_node": 8,
        "cpus_per_task": 8,
        "time_limit": "1-00:00:00",
        "partition": "",
        "account": "",
        "qos": "",
        "parallel_runs": 0,
        "options": (),
    },
    # `capacity` is "on_demand", "spot" or "reserved"; `runtime_version` "" for the accelerator's own.
    "tpu_queued": {
        "project": "",
        "zone": "",
        "capacity": "on_demand",
        "runtime_version": "",
        "service_account": "",
        "network": "",
    },
    # `queue` is a LocalQueue of Kueue, "" for none; `service_account` Kubernetes' own, which is not who buckets see:
    # that is the account of the node pool.
    "gke_jobset": {"namespace": "default", "service_account": "", "queue": "", "spot": False},
    "xpk": {"cluster": "", "project": "", "zone": "", "priority": "medium"},
}
TARGETS = tuple(_SECTIONS)
TPU_TARGETS = ("tpu_queued", "gke_jobset", "xpk")
_OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COMPILATION_CACHE_DIR")


def defaults(target: str) -> ConfigDict:
    """The configuration of a target, to be filled in by a file of configs/.

    Fields:
      name: of the run or sweep; part of every run directory's and job's name.
      gin_files, gin_search_paths: WHAT is run, as `t5x_domain.train` takes it.
      overrides: gin bindings 'NAME=VALUE', as after `--gin.`; e.g. the mesh that this target's devices want.
      sweep: points, each a tuple of bindings 'NAME=VALUE'; see launch/sweep.py. () for a single run.
      storage: root of the run directories, <storage>/<run>; a folder that all machines share, or gs://bucket/folder.
      logs: a local folder for logs and for what is submitted.
      compilation_cache: folder or bucket for compiled programs, so that a restart does not compile anew; "" for none.
      accelerator: "cpu", "gpu", or a TPU: v4, v5e, v5p, v6e, tpu7x.
      topology: chips of a TPU slice along each axis, "16x16" or "4x4x8".
      slices: TPU slices of that topology; gin's MeshShape.slice is to agree. 1 where there are no TPUs.
      image: container image that has t5x_domain installed (gke_jobset, xpk).
      setup: shell lines that every machine runs first (slurm, tpu_queued), e.g. "cd /shared/t5x_domain".
      python: the interpreter there.
      env: environment variables.
      max_restarts: after failures. Preempted runs (exit status 75) are always started again; a user's error (2) never.
      restart_wait_seconds: between an end and the next start (local, tpu_queued).
      notice_seconds: from SIGTERM until a process is killed: what saving a checkpoint takes.
      <target>: what only this target has.

    Raises:
      UserError: there is no such target.
    """
    if target not in TARGETS:
        raise UserError(f"config.target = {target!r}: choose one of {', '.join(TARGETS)}.")
    config = ConfigDict(
        {
            "target": target,
            "name": "run",
            "gin_files": (),
            "gin_search_paths": (),
            "overrides": (),
            "sweep": (),
            "storage": "runs",
            "logs": "runs/logs",
            "compilation_cache": "",
            "accelerator": "cpu",
            "topology": "",
            "slices": 1,
            "image": "",
            "setup": (),
            "python": sys.executable if target == "local" else "python",
            "env": {},
            "max_restarts": 3,
            "restart_wait_seconds": 5.0,
            "notice_seconds": 120,
            target: _SECTIONS[target],
        }
    )
    config.lock()  # a field that does not exist is an error
    config.env.unlock()
    return config


def check(config: ConfigDict) -> None:
    """Raises UserError, naming field and mend, for what cannot be launched."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        raise UserError(f"config.name = {config.name!r}: use letters, digits, '.', '_' and '-' only.")
    if not config.gin_files:
        raise UserError("config.gin_files is empty: name the gin files to run, e.g. ('gin/runs/pretrain.gin',).")
    for file in config.gin_files:
        find_gin(file, config.gin_search_paths)
    check_bindings("config.overrides", config.overrides)
    for point in config.sweep:
        check_bindings("config.sweep", point)
    if not config.storage:
        raise UserError("config.storage is empty: name a folder or bucket for the run directories.")
    if taken := [key for key in _OURS if key in config.env]:
        raise UserError(
            f"config.env sets {taken[0]}: the launcher does that; config.compilation_cache is for the cache."
        )
    for field in ("max_restarts", "restart_wait_seconds", "notice_seconds"):
        if config[field] < 0:
            raise UserError(f"config.{field} = {config[field]}: it cannot be negative.")
    if config.target in TPU_TARGETS:
        _check_tpu(config)
        return
    if config.accelerator not in ("cpu", "gpu"):
        raise UserError(f"config.accelerator = {config.accelerator!r}: the target {config.target} runs 'cpu' or 'gpu'.")
    if config.slices != 1:
        raise UserError(
            f"config.slices = {config.slices}: the target {config.target} has none to ask for; set MeshShape.slice in "
            "config.overrides where nodes are to be slices of the mesh."
        )


def _check_tpu(config: ConfigDict) -> None:
    if config.accelerator not in TPUS:
        raise UserError(
            f"config.accelerator = {config.accelerator!r}: the target {config.target} runs {', '.join(TPUS)}."
        )
    slice_of(config.accelerator, config.topology)
    if config.slices < 1:
        raise UserError(f"config.slices = {config.slices}: it must be at least 1.")
    for field in ("storage", "compilation_cache"):
        if config[field] and not config[field].startswith("gs://"):
            raise UserError(
                f"config.{field} = {config[field]!r}: TPU hosts share no disk; set it to gs://bucket/folder."
            )
    needed = {"tpu_queued": ("project", "zone"), "gke_jobset": ("namespace",), "xpk": ("cluster", "project", "zone")}
    for field in needed[config.target]:
        if not config[config.target][field]:
            raise UserError(f"config.{config.target}.{field} is empty: the target needs it.")
    if config.target == "tpu_queued":
        capacity = config.tpu_queued.capacity
        if capacity not in ("on_demand", "spot", "reserved"):
            raise UserError(f"config.tpu_queued.capacity = {capacity!r}: choose 'on_demand', 'spot' or 'reserved'.")
        if not config.setup:
            raise UserError("config.setup is empty: a new TPU VM must install t5x_domain, see configs/tpu_v5e_256.py.")
    elif not config.image:
        raise UserError("config.image is empty: name the container image that has t5x_domain installed.")


def check_bindings(field: str, bindings: Sequence[str]) -> None:
    """Raises UserError unless each binding is 'NAME=VALUE' and leaves the run directory alone."""
    if isinstance(bindings, str):
        raise UserError(f"{field} holds the text {bindings!r} where a tuple of 'NAME=VALUE' belongs; add a comma.")
    for binding in bindings:
        name, separator, value = binding.partition("=")
        if not separator or not value or not re.fullmatch(r"[\w./]+", name):
            raise UserError(f"{field}: {binding!r} is no gin binding; write 'NAME=VALUE', e.g. 'TRAIN_STEPS=200'.")
        if "\n" in binding:
            raise UserError(f"{field}: {binding!r} has several lines; write it in a gin file.")
        if name in ("RUN_DIR", "Run.run_dir"):
            raise UserError(f"{field} sets {name}: a run's directory is <config.storage>/<run>; set config.storage.")


def find_gin(file: str, search_paths: Sequence[str] = ()) -> Path:
    """Where a gin file lies on this machine. Raises UserError if it does not."""
    for folder in ("", *search_paths, *gin_search_paths()):
        if (path := Path(folder) / file).is_file():
            return path
    raise UserError(f"config.gin_files: {file} is not found; add its folder to config.gin_search_paths.")
