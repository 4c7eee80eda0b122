"""How a process learns from its environment that there are others."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from t5x_domain import evaluate
from t5x_domain.errors import UserError
from t5x_domain.parallel import processes
from tests.processes.cluster import LIMIT_SECONDS, REPOSITORY, free_port

ALL = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def describe(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("JAX_COORD", "JAX_NUM", "JAX_PROC", "SLURM", "KUBE"))]:
        monkeypatch.delenv(name)
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


def test_nothing_said_is_one_process(describe):
    assert processes._described() is None
    processes.start()
    assert processes.peers() is None and processes.is_first()
    processes.require_one("evaluate")


def test_the_three_variables(describe):
    describe(ALL)
    described = processes._described()
    assert (described["coordinator_address"], described["num_processes"], described["process_id"]) == (
        "10.0.0.1:1234",
        4,
        3,
    )


def test_a_cluster_of_several(describe):
    describe(SLURM)
    assert processes._described() == {}  # JAX finds out itself


def test_a_cluster_of_one_is_one_process(describe):
    """JAX would take one of its GPUs only."""
    describe(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert processes._described() is None


def test_one_process_said_explicitly_inside_of_a_cluster(describe):
    describe(SLURM | ALL | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"})
    assert processes._described() is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES set, but not JAX_PROCESS_ID; set all"),
        ({"JAX_NUM_PROCESSES": "", "JAX_PROCESS_ID": ""}, "set, but not JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_NUM_PROCESSES=4, JAX_PROCESS_ID=4: processes are numbered from 0"),
        ({"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES=four"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "JAX_COORDINATOR_ADDRESS=10.0.0.1: write it as HOST:PORT"),
    ],
)
def test_half_a_description_is_refused(describe, changed, message):
    describe(ALL | changed)
    with pytest.raises(UserError, match=message):
        processes.start()


def test_a_port_in_use_is_refused(describe):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        describe(ALL | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_PROCESS_ID": "0"})
        with pytest.raises(UserError, match=f"port {port} of this host cannot be used .*; choose another"):
            processes.start()


# jax/_src/clusters/cloud_tpu_cluster.py, wait_for_coordinator: on GKE a pod that is not there has no address.
NO_ADDRESS = """
import jax
def initialize(**_):
    raise RuntimeError("Failed to recognize coordinator address trial-slice-0-0.trial")
jax.distributed.initialize = initialize
"""


@pytest.mark.parametrize("before", ["", NO_ADDRESS])
def test_a_process_that_waits_for_others_in_vain_says_so(describe, before):
    """JAX aborts it after the time, or gives up; the status says that it may be started again."""
    alone = "from t5x_domain.parallel import processes; processes._MEET_SECONDS = 1; processes.start()"
    describe(ALL | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"})
    result = subprocess.run(
        [sys.executable, "-c", before + alone], cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert result.returncode == 75, result.stderr
    assert "the processes of this run did not all come together within 1 s" in result.stderr


def test_a_process_0_that_aborts_later_is_not_said_to_have_waited_in_vain(describe):
    """Its end is its own: a status that has it started again would do so for ever."""
    aborts = (
        "import os, jax; from t5x_domain.parallel import processes; processes.Peers = lambda *_: None;"
        "jax.distributed.initialize = lambda **_: None; processes.start(); os.abort()"
    )
    describe(ALL | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_PROCESS_ID": "0"})
    result = subprocess.run([sys.executable, "-c", aborts], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (result.returncode, "come together" in result.stderr) == (-signal.SIGABRT, False), result.stderr


def test_a_heartbeat_below_a_second_is_refused(describe):
    describe(ALL)
    with pytest.raises(UserError, match="--heartbeat_seconds=0.5: it must be at least 1"):
        processes.start(0.5)


def test_processes_that_only_jax_has_found_are_refused(monkeypatch):
    processes.require_joined()
    monkeypatch.setattr("jax.process_count", lambda: 4)
    with pytest.raises(UserError, match="JAX has found 4 processes, .*; set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROC"):
        processes.require_joined()


def test_verbs_of_one_process_refuse_several(describe, capsys):
    describe(ALL)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--run_dir=runs/demo"])
    assert stopped.value.code == 2
    assert "evaluate runs in one process, but the environment describes several" in capsys.readouterr().err
