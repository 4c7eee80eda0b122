"""Cloud TPU queued resources: a script that asks for the TPUs, runs on all their hosts, and gives them back.

Every host runs `launch.supervise`, which starts the program again after preemption notices and failures, so that the
hosts come together anew. What it cannot see, that the machines themselves were taken, this script sees: the queued
resource is no longer ACTIVE, and it asks for another. https://cloud.google.com/tpu/docs/queued-resources,
https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources.
"""

import shlex

from ml_collections import ConfigDict

from launch.plan import Plan
from launch.sweep import Run, environment, runs
from launch.tpu import Slice, slice_of
from t5x_domain.errors import UserError

_GCLOUD = ("gcloud", "compute", "tpus", "queued-resources")

# What every host says last, whether its program, its supervisor or its setup has ended.
_ENDED = "launch: host ended with status"

_SCRIPT = r"""
#!/bin/bash
# Run {run} on {slices} x {accelerator_type}. Kill this script and start it again as you like: it goes on with the
# queued resource that is there, and the hosts never run two programs at once. To give the TPUs back before the end:
# {delete}
set -u
# Empty for a queued resource that does not exist, unlike one that cannot be asked for just now.
state() {{ {list} || echo UNKNOWN; }}
delete() {{ {delete}; }}
finish() {{
  echo "ended with status $1; what the hosts said is in ${{log:-no log}}"
  {python} -m launch.record {run_dir} "$1"
  delete
  exit "$1"
}}
# A group of its own: gcloud's ssh processes would go on without it, and write to the log.
connect() {{
  set -m
  {ssh} >"$log" 2>&1 &
  ssh=$!
  set +m
}}
disconnect() {{
  [[ -n $ssh ]] || return 0
  kill -- -"$ssh" 2>/dev/null
  wait "$ssh" 2>/dev/null
  ssh=
}}
ssh=
trap disconnect EXIT

attempts=0 failures=0 refusals=0 pause=30
began=$(date -u +%Y%m%dT%H%M%SZ)
ended='{ended}'
while :; do
  case $(state) in
    '')
      if {create}; then refusals=0; else refusals=$((refusals + 1)); fi
      ((refusals < 5)) || exit 1
      sleep $((refusals * 30))
      ;;
    ACTIVE)
      attempts=$((attempts + 1)) connected=$SECONDS
      log={logs}-$began-$attempts.txt # a log for each: what an earlier connection still says is not of this one
      echo "running; the hosts write to $log"
      connect
      # A host that has given up would leave the others waiting for it.
      while kill -0 "$ssh" 2>/dev/null && ! grep -q "$ended [1-9]" "$log"; do sleep 30; done
      disconnect
      if (($(grep -c "$ended 0$" "$log") == {hosts})); then finish 0; fi
      if grep -q "$ended 2$" "$log"; then finish 2; fi
      if ! grep -q "$ended [1-9]" "$log"; then
        # Nobody has given up, so it is the connection that was lost, or the machines. The hosts that are there go on.
        ((SECONDS - connected < 600)) || pause=30
        echo "connection lost; looking again in $pause seconds"
        sleep "$pause"
        pause=$((pause < 480 ? 2 * pause : pause))
        continue
      fi
      pause=30
      # The machines are there and a host was not told to stop: its program failed beyond its restarts, or its setup.
      if grep "$ended [1-9]" "$log" | grep -qv "$ended 75$" && [[ $(state) == ACTIVE ]]; then
        failures=$((failures + 1))
        ((failures > {max_restarts})) && finish 1
      fi
      ;;
    SUSPENDED) delete ;; # taken away: asked for anew
    FAILED) # never given
      {describe}
      finish 1
      ;;
  esac
  sleep 30
done
""".lstrip()


def plan(config: ConfigDict) -> Plan:
    """A script for each run, and the shell that runs it."""
    scripts = {f"{config.logs}/{run.job_name}.sh": script(config, run) for run in runs(config)}
    return Plan(scripts, [["bash", path] for path in scripts])


def script(config: ConfigDict, run: Run) -> str:
    """The script of one run.

    Raises:
      UserError: queued resources have no such TPU.
    """
    slice_ = slice_of(config.accelerator, config.topology)
    where = [f"--project={config.tpu_queued.project}", f"--zone={config.tpu_queued.zone}"]
    # All hosts in one batch: gcloud waits for the end of one before it begins the next. Signs of life, or a connection
    # that a firewall has dropped looks like one that is quiet.
    hosts = ["--worker=all", "--node=all", "--batch-size=all", "--ssh-flag=-o ServerAliveInterval=60"]
    ssh = _gcloud("ssh", run, *where, *hosts, f"--command={remote_command(config, run)}")
    return _SCRIPT.format(
        run=run.name,
        slices=config.slices,
        accelerator_type=slice_.accelerator_type,
        logs=shlex.quote(f"{config.logs}/{run.job_name}"),
        list=shlex.join([*_GCLOUD, "list", *where, f"--filter=name~/{run.job_name}$", "--format=value(state.state)"]),
        delete=_gcloud("delete", run, *where, "--force", "--quiet"),
        create=_gcloud("create", run, *where, *_request(config, run, slice_)),
        describe=_gcloud("describe", run, *where),
        ssh=ssh,
        ended=_ENDED,
        python=shlex.quote(config.python),
        run_dir=shlex.quote(run.run_dir),
        hosts=slice_.vm_hosts * config.slices,
        max_restarts=config.max_restarts,
    )


def remote_command(config: ConfigDict, run: Run) -> str:
    """What every host runs: the setup, then the program under supervision."""
    supervise = [
        *(config.python, "-m", "launch.supervise", "--logs=logs"),
        # What an earlier connection has left running would keep the TPU.
        "--lock=/tmp/t5x_domain.lock",
        f"--max_restarts={config.max_restarts}",
        f"--restart_wait_seconds={config.restart_wait_seconds}",
        f"--notice_seconds={config.notice_seconds}",
        "--",
        *run.program(config),
    ]
    variables = [f"{key}={value}" for key, value in environment(config).items()]
    return "\n".join(
        [
            # Also of a host whose setup fails, or the others would wait for it.
            f"status=1; trap 'echo \"{_ENDED} $status\"' EXIT",
            "set -e",
            *config.setup,
            f"status=0; {shlex.join(['env', *variables, *supervise])} || status=$?",
        ]
    )


def _gcloud(verb: str, run: Run, *flags: str) -> str:
    return shlex.join([*_GCLOUD, verb, run.job_name, *flags])


def _request(config: ConfigDict, run: Run, slice_: Slice) -> list[str]:
    """Which TPUs, and how they are had."""
    queued = config.tpu_queued
    runtime = queued.runtime_version or slice_.tpu.runtime_version
    if runtime is None:
        raise UserError(f"config.accelerator = {config.accelerator!r}: it is had by gke_jobset or xpk only.")
    several = [f"--node-count={config.slices}", f"--node-prefix={run.job_name}"]
    capacity = {"on_demand": [], "spot": ["--spot"], "reserved": ["--reserved"]}[queued.capacity]
    return [
        *_shape(config.accelerator, slice_),
        f"--runtime-version={runtime}",
        *(several if config.slices > 1 else [f"--node-id={run.job_name}"]),
        *capacity,
        *([f"--service-account={queued.service_account}"] if queued.service_account else []),
        *([f"--network={queued.network}"] if queued.network else []),
        "--quiet",
    ]


def _shape(accelerator: str, slice_: Slice) -> list[str]:
    """The slice in gcloud's words, which has topologies of v4 only and else the one that is nearest to a cube."""
    if accelerator == "v4":
        return ["--type=v4", f"--topology={slice_.topology}"]
    sides = [int(side) for side in slice_.topology.split("x")]
    if max(sides) > 3 * min(sides):
        raise UserError(
            f"config.topology = {slice_.topology!r}: Cloud TPU lays {accelerator} out by its number of chips, as "
            "evenly as can be; choose such a topology, or the target gke_jobset or xpk for this one."
        )
    return [f"--accelerator-type={slice_.accelerator_type}"]
