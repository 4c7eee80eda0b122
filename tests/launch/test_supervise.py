"""The supervisor with a stand-in for the trainer: it does in each attempt what the test says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import supervise
from launch.supervise import Supervisor

REPOSITORY = Path(__file__).parents[2]

# Attempts of a process are counted in a file of its own; in the n-th it does what the n-th of its list says.
STAND_IN = """
import os, signal, sys, time
folder, *plans = sys.argv[1:]
index = int(os.environ.get("JAX_PROCESS_ID", 0))
count = os.path.join(folder, f"attempts-{index}")
attempt = os.path.getsize(count) if os.path.exists(count) else 0
open(count, "a").write(".")
what = plans[index].split(",")
what = what[min(attempt, len(what) - 1)]
print({name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_"))}, flush=True)
if what == "slow75":  # when the other is ready to be told
    while not os.path.exists(os.path.join(folder, "ready-0")):
        time.sleep(0.02)
    sys.exit(75)
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if what in ("save", "deaf", "crash"):
    def told(*_):
        if what == "save":
            print("saved", flush=True)
            sys.exit(75)
        if what == "crash":
            sys.exit(9)
    signal.signal(signal.SIGTERM, told)
if what in ("save", "deaf", "crash", "wait"):
    open(os.path.join(folder, f"ready-{index}"), "w").close()
    time.sleep(60)
sys.exit(int(what))
"""


@pytest.fixture
def program(tmp_path):
    """(plan of process 0, of process 1, …) -> command."""
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    return lambda *plans: [sys.executable, "-S", str(path), str(tmp_path), *plans]


def attempts(folder, index=0):
    return len((folder / f"attempts-{index}").read_text())


def wait_for(path, process):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def run(folder, command, **options):
    return Supervisor(command=command, logs=folder / "logs", notice_seconds=10, **options).run()


def test_a_preempted_program_is_started_again_however_often(tmp_path, program):
    assert run(tmp_path, program("75,75,75,0"), max_restarts=0) == 0
    assert attempts(tmp_path) == 4


def test_failures_are_counted_preemptions_between_them_are_not(tmp_path, program):
    assert run(tmp_path, program("1,75,1,75,7"), max_restarts=2) == 7
    assert attempts(tmp_path) == 5


def test_a_users_error_is_the_end(tmp_path, program):
    assert run(tmp_path, program("2"), max_restarts=5) == 2
    assert attempts(tmp_path) == 1


def test_the_first_failure_ends_the_others(tmp_path, program):
    began = time.monotonic()
    assert run(tmp_path, program("wait", "3"), processes=2) == 3
    assert time.monotonic() - began < 10  # the other would have waited a minute


def test_after_a_failure_nobody_is_waited_for_long(tmp_path, program, monkeypatch):
    monkeypatch.setattr(supervise, "_AFTER_FAILURE_SECONDS", 0.2)
    began = time.monotonic()
    assert run(tmp_path, program("deaf", "3"), processes=2) == 3
    assert time.monotonic() - began < 8  # the notice is 10 s


def test_one_that_was_preempted_leaves_the_others_their_notice(tmp_path, program, monkeypatch):
    monkeypatch.setattr(supervise, "_AFTER_FAILURE_SECONDS", 0.0)
    assert run(tmp_path, program("save,0", "slow75,0"), processes=2) == 0
    assert "saved" in (tmp_path / "logs" / "process-0.txt").read_text()


def test_all_are_started_again(tmp_path, program):
    assert run(tmp_path, program("wait,0", "kill,0"), processes=2, max_restarts=1) == 0
    assert attempts(tmp_path, 0) == attempts(tmp_path, 1) == 2


def test_a_killed_process_has_failed(tmp_path, program):
    assert run(tmp_path, program("kill")) == 128 + signal.SIGKILL


def test_a_lost_process_says_more_than_peers_that_noticed():
    # All of these may have ended between two looks.
    assert max([75, 128 + 9, 0], key=supervise._gravity) == 128 + 9
    assert max([75, 1, 2], key=supervise._gravity) == 2
    assert max([0, 75], key=supervise._gravity) == 75


def test_a_crash_that_ends_after_a_peer_has_noticed_it(tmp_path, program):
    assert run(tmp_path, program("crash", "slow75"), processes=2) == 9


def test_each_process_has_a_log_and_knows_its_place(tmp_path, program, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert run(tmp_path, program("0", "0"), processes=2, devices=4) == 0
    said = [eval((tmp_path / "logs" / f"process-{index}.txt").read_text()) for index in range(2)]
    assert [environment["JAX_PROCESS_ID"] for environment in said] == ["0", "1"]
    assert {environment["JAX_NUM_PROCESSES"] for environment in said} == {"2"}
    assert len({environment["JAX_COORDINATOR_ADDRESS"] for environment in said}) == 1
    assert said[0]["JAX_PLATFORMS"] == "cpu"
    assert said[0]["XLA_FLAGS"].split() == [
        "--xla_cpu_enable_fast_math=false",
        "--xla_force_host_platform_device_count=4",
    ]


def test_a_process_of_its_own_is_told_of_no_others(tmp_path, program, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("JAX_", "XLA_"))]:
        monkeypatch.delenv(name)
    assert run(tmp_path, program("0")) == 0
    assert (tmp_path / "logs" / "process-0.txt").read_text() == "{}\n"


def test_processes_on_accelerators_take_one_each(tmp_path, program):
    assert run(tmp_path, program("0", "0"), processes=2) == 0
    assert "'JAX_LOCAL_DEVICE_IDS': '1'" in (tmp_path / "logs" / "process-1.txt").read_text()


@pytest.mark.parametrize(("plan", "status"), [("save", 75), ("deaf", 128 + signal.SIGKILL)])
def test_sigterm_is_handed_on_and_is_the_end(tmp_path, program, plan, status):
    arguments = [
        f"--logs={tmp_path / 'logs'}",
        f"--run_dir={tmp_path / 'run'}",
        "--notice_seconds=1.5",
        "--processes=2",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.supervise", *arguments, "--max_restarts=5", "--", *program(plan, plan)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path / "ready-0", process)
    wait_for(tmp_path / "ready-1", process)
    assert json.loads((tmp_path / "run" / "launch.json").read_text()) == {"exit_status": None}
    process.terminate()
    said, _ = process.communicate(timeout=30)
    assert process.returncode == status
    assert said.splitlines()[-1] == f"launch: ended with status {status}"
    assert attempts(tmp_path, 0) == attempts(tmp_path, 1) == 1
    assert json.loads((tmp_path / "run" / "launch.json").read_text()) == {"exit_status": status}
    if plan == "save":
        assert "saved" in (tmp_path / "logs" / "process-1.txt").read_text()


def test_an_earlier_supervisor_is_told_to_stop_and_waited_for(tmp_path, program):
    lock = tmp_path / "lock"
    arguments = [f"--logs={tmp_path / 'earlier'}", f"--lock={lock}", "--", *program("save,0")]
    earlier = subprocess.Popen([sys.executable, "-m", "launch.supervise", *arguments], cwd=REPOSITORY)
    wait_for(tmp_path / "ready-0", earlier)
    assert run(tmp_path, program("save,0"), lock=lock) == 0  # the second attempt, begun after the first had saved
    assert earlier.wait(10) == 75
    assert "saved" in (tmp_path / "earlier" / "process-0.txt").read_text()


def test_an_earlier_supervisor_that_has_just_ended_is_no_error(tmp_path, program, monkeypatch):
    lock, asked = tmp_path / "lock", []
    lock.write_text("4194304")  # beyond the numbers of processes
    flock = supervise.fcntl.flock

    def held_once(file, how):
        asked.append(how)
        if len(asked) == 1:
            raise BlockingIOError
        flock(file, how)

    monkeypatch.setattr(supervise.fcntl, "flock", held_once)
    assert run(tmp_path, program("0"), lock=lock) == 0
    assert len(asked) == 2


def test_the_reason_of_a_failure_is_shown(tmp_path, program, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "process-1.txt").write_text("".join(f"line {number}\n" for number in range(5000)))
    assert run(tmp_path, program("wait", "3"), processes=2) == 3
    shown = capsys.readouterr().out.partition("process-1.txt:\n")[2].splitlines()
    assert shown[0] == "line 4981" and shown[18] == "line 4999"  # with the line that the stand-in prints, 20
    assert "JAX_PROCESS_ID" in shown[19]
    assert run(tmp_path, program("75,0")) == 0
    assert "the last lines" not in capsys.readouterr().out


def test_the_run_goes_on_when_nobody_listens(tmp_path, program):
    command = [sys.executable, "-m", "launch.supervise", f"--logs={tmp_path / 'logs'}", "--", *program("75,75,0")]
    listener, said = os.pipe()
    os.close(listener)
    process = subprocess.run(command, cwd=REPOSITORY, stdout=said, stderr=subprocess.PIPE, timeout=30)
    os.close(said)
    assert (process.returncode, process.stderr) == (0, b"")
    assert attempts(tmp_path) == 3


def test_no_wait_is_begun_or_kept_up_after_a_signal(tmp_path, program):
    with supervise._Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        began = time.monotonic()
        stop.wait(30)
    assert time.monotonic() - began < 1
