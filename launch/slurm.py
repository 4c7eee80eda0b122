"""GPU nodes under SLURM: one sbatch script, an array task for each run of a sweep.

JAX finds its peers from SLURM's variables and takes one GPU a task, that of the task's number on its node
(jax/_src/clusters/slurm_cluster.py), so there are as many tasks on a node as GPUs, and all see all of its GPUs:
`--gpus-per-task` or `--gpu-bind` would hide those it asks for. Options: https://slurm.schedmd.com/sbatch.html.
"""

import shlex
from collections.abc import Sequence

from ml_collections import ConfigDict

from launch.plan import Plan
from launch.sweep import Run, environment, runs
from t5x_domain.errors import UserError

# srun's exit status is the highest of its tasks', so a task gives the gravest the highest: a lost process makes its
# peers end with 75, and what lost it must not be mistaken for a preemption. The trap keeps the shell alive while the
# program, which gets the same signals, saves (SIGTERM) or writes a profile (SIGUSR1).
_TASK = r"""
trap : TERM USR1
"$@"
case $? in 0) exit 0 ;; 75) exit 75 ;; 2) exit 102 ;; *) exit 101 ;; esac
""".strip()

_BODY = r"""
logs=$(realpath -- {logs}) # as sbatch has it, wherever the setup goes
set -e
{setup}
set +e
set -u
{environment}
case "${{SLURM_ARRAY_TASK_ID:-0}}" in
{cases}
esac

# Of an array this task alone: the number of one of its tasks is also that of the whole.
job=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}

# SLURM tells the steps when time is up. What this shell alone is told it hands on, not through srun, which would kill
# the tasks at once.
told=0
trap 'told=1; scancel --signal=TERM "$job"' TERM
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" --label \
  bash -c {task} task "${{program[@]}}" &
steps=$!
while wait "$steps"; status=$?; ((told)); do told=0; done
case $status in 102) status=2 ;; 101) status=1 ;; esac
{python} -m launch.record "$run_dir" "$status"

failures=$logs/$run.failures
case $status in
  0 | 2) exit "$status" ;;
  75) ;;
  *)
    echo "$status" >>"$failures"
    (($(wc -l <"$failures") <= {max_restarts})) || exit "$status"
    ;;
esac
# A job that was cancelled is to stay so, and what SLURM has preempted it queues again itself.
[[ $(squeue --noheader --format=%T --jobs="$job") == RUNNING ]] || exit "$status"
echo "status $status: back into the queue"
scontrol requeue "$job"
""".lstrip()


def plan(config: ConfigDict) -> Plan:
    """The script, and the sbatch that submits it."""
    path = f"{config.logs}/{config.name}.sbatch"
    return Plan({path: script(config)}, [["sbatch", path]])


def script(config: ConfigDict) -> str:
    """The sbatch script.

    Raises:
      UserError: nodes, GPUs or CPUs are not positive, or no GPUs are asked for.
    """
    for field in ("nodes", "gpus_per_node", "cpus_per_task"):
        if config.slurm[field] < 1:
            raise UserError(f"config.slurm.{field} = {config.slurm[field]}: it must be at least 1.")
    if config.accelerator != "gpu":
        raise UserError(f"config.accelerator = {config.accelerator!r}: the target slurm runs 'gpu'.")
    all_runs = runs(config)
    exports = [f"export {key}={shlex.quote(value)}" for key, value in environment(config).items()]
    body = _BODY.format(
        setup="\n".join(config.setup),
        environment="\n".join(exports),
        cases="\n".join(_case(config, index, run) for index, run in enumerate(all_runs)),
        task=shlex.quote(_TASK),
        python=shlex.quote(config.python),
        logs=shlex.quote(config.logs),
        max_restarts=config.max_restarts,
    )
    options = "".join(f"#SBATCH {option}\n" for option in _options(config, len(all_runs)))
    return f"#!/bin/bash\n{options}\n{body}"


def _options(config: ConfigDict, count: int) -> Sequence[str]:
    """What sbatch is asked for, a line each."""
    slurm = config.slurm
    at_once = f"%{slurm.parallel_runs}" if slurm.parallel_runs else ""
    chosen = {key: slurm[key] for key in ("partition", "account", "qos") if slurm[key]}
    return [
        f"--job-name={config.name}",
        f"--nodes={slurm.nodes}",
        f"--ntasks-per-node={slurm.gpus_per_node}",
        f"--gpus-per-node={slurm.gpus_per_node}",
        f"--cpus-per-task={slurm.cpus_per_task}",
        f"--time={slurm.time_limit}",
        *(f"--{key}={value}" for key, value in chosen.items()),
        *([f"--array=0-{count - 1}{at_once}"] if count > 1 else []),
        # To the steps, not the shell: they save and end with 75, and the shell has the time to queue the job again.
        f"--signal=TERM@{config.notice_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output={config.logs}/%x-{'%A_%a' if count > 1 else '%j'}.txt",
        *slurm.options,
    ]


def _case(config: ConfigDict, index: int, run: Run) -> str:
    program = " ".join(shlex.quote(word) for word in run.program(config))
    return (
        f"  {index})\n"
        f"    run={shlex.quote(run.name)} run_dir={shlex.quote(run.run_dir)}\n"
        f"    program=({program})\n"
        "    ;;"
    )
