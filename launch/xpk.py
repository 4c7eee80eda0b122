"""TPU slices on GKE through xpk (https://github.com/AI-Hypercomputer/xpk): `xpk workload create` for each run.

xpk restarts a workload on the exit statuses it is told, and counts every restart, preemptions too, so give
config.max_restarts room. Commands are as its version 1.16 reads them.
"""

import shlex

from ml_collections import ConfigDict

from launch.plan import Plan
from launch.sweep import Run, environment, for_kubernetes, runs
from launch.tpu import slice_of

# Every status but 0 and the user's error 2; 42 and 127 to 255 are restarted without being named.
_RESTARTED = "1,3-126"


_ADVICE = (
    "If the workload is there already, running or ended, `xpk workload delete` with the same --workload, --cluster, "
    "--project and --zone, then launch again: the run goes on from its last checkpoint."
)


def plan(config: ConfigDict) -> Plan:
    """The commands."""
    return Plan({}, [_command(config, run) for run in runs(config)], advice=_ADVICE)


def _command(config: ConfigDict, run: Run) -> list[str]:
    slice_ = slice_of(config.accelerator, config.topology)
    return [
        *("xpk", "workload", "create"),
        f"--workload={run.job_name}",
        f"--cluster={config.xpk.cluster}",
        f"--project={config.xpk.project}",
        f"--zone={config.xpk.zone}",
        # By topology: a number of chips may have several.
        f"--tpu-type={slice_.tpu.prefix}-{slice_.topology}",
        f"--num-slices={config.slices}",
        f"--docker-image={config.image}",
        f"--priority={config.xpk.priority}",
        f"--max-restarts={config.max_restarts}",
        f"--restart-on-exit-codes={_RESTARTED}",
        f"--termination-grace-period-seconds={config.notice_seconds}",
        *(f"--env={key}={value}" for key, value in environment(config).items()),
        # `exec`: xpk hands SIGTERM on to the shell that it runs this in.
        f"--command={for_kubernetes(shlex.join(['exec', *run.program(config)]))}",
    ]
