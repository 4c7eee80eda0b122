"""Processes on this machine: one `launch.supervise` for each run, one after the other."""

from ml_collections import ConfigDict

from launch.plan import Plan
from launch.sweep import Run, environment, runs
from t5x_domain.errors import UserError


def plan(config: ConfigDict) -> Plan:
    """The commands, each with its environment before it.

    Raises:
      UserError: no processes or devices are asked for.
    """
    for field, value in config.local.items():
        if value < 1:
            raise UserError(f"config.local.{field} = {value}: it must be at least 1.")
    return Plan({}, [_command(config, run) for run in runs(config)])


def _command(config: ConfigDict, run: Run) -> list[str]:
    devices = config.local.devices_per_process if config.accelerator == "cpu" else 0
    return [
        "env",
        *(f"{key}={value}" for key, value in environment(config).items()),
        *(config.python, "-m", "launch.supervise"),
        f"--processes={config.local.processes}",
        f"--devices={devices}",
        f"--logs={config.logs}/{run.name}",
        f"--max_restarts={config.max_restarts}",
        f"--restart_wait_seconds={config.restart_wait_seconds}",
        f"--notice_seconds={config.notice_seconds}",
        f"--run_dir={run.run_dir}",
        "--",
        *run.program(config),
    ]
