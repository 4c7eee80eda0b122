import json
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
import shell

from launch import tpu_queued
from launch.config import check, defaults
from launch.sweep import runs
from t5x_domain.errors import UserError

# https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/{create,ssh,list,delete,describe}
GCLOUD_WIDE = {"project", "quiet", "format", "filter", "zone"}
FLAGS = {
    "create": {"accelerator-type", "runtime-version", "node-id", "node-count", "node-prefix", "spot", "reserved"}
    | {"service-account", "network", "type", "topology"},
    "ssh": {"worker", "node", "command", "batch-size", "ssh-flag"},
    "list": set(),
    "delete": {"force"},
    "describe": set(),
}


@pytest.fixture
def config(tmp_path):
    config = defaults("tpu_queued")
    config.name = "trial"
    config.accelerator = "v5e"
    config.topology = "4x4"
    config.gin_files = ("gin/models/tiny.gin",)
    config.storage = "gs://bucket/runs"
    config.logs = str(tmp_path / "logs")
    config.setup = ("cd /tmp",)
    config.max_restarts = 1
    config.tpu_queued.project = "mine"
    config.tpu_queued.zone = "us-west4-a"
    (tmp_path / "logs").mkdir()
    return config


def script(config):
    (run,) = runs(config)
    return tpu_queued.script(config, run)


def commands(text):
    """Words of each gcloud command in a script, by verb."""
    code = re.sub(r"^#.*\n", "", text, flags=re.M)
    found = {}
    for begin in re.finditer(r"gcloud compute tpus queued-resources (\w+)", code):
        lexer = shlex.shlex(code[begin.start() :], posix=True, punctuation_chars=";|)&<>")
        lexer.whitespace_split = True
        words = []
        for word in lexer:
            if not set(word) - set(";|)&<>2"):
                break
            words.append(word)
        found[begin[1]] = words
    return found


@pytest.mark.parametrize("capacity", ["on_demand", "spot", "reserved"])
@pytest.mark.parametrize("slices", [1, 3])
def test_gcloud_knows_every_flag(config, capacity, slices):
    config.slices = slices
    config.tpu_queued.update(capacity=capacity, service_account="a@b", network="net")
    found = commands(script(config))
    assert set(found) == set(FLAGS)
    for verb, words in found.items():
        flags = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        assert flags <= FLAGS[verb] | GCLOUD_WIDE
        assert flags >= {"project", "zone"}
    create = found["create"]
    assert ("--node-count=3" in create) == (slices == 3)
    assert ("--node-id=trial" in create) == (slices == 1)
    assert [word for word in create if word in ("--spot", "--reserved")] == (
        [] if capacity == "on_demand" else [f"--{capacity}"]
    )
    assert {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"} <= set(create)
    assert {"--worker=all", "--node=all"} <= set(found["ssh"])


def test_the_topology_is_the_one_that_is_had(config):
    # gcloud takes --type=v4 with --topology, of later TPUs only the number of chips or cores.
    config.accelerator, config.topology = "v4", "2x2x16"
    create = commands(script(config))["create"]
    assert {"--type=v4", "--topology=2x2x16"} <= set(create) and not any("accelerator" in word for word in create)
    for accelerator, topology in (("v5p", "2x2x16"), ("v5e", "2x32")):
        config.accelerator, config.topology = accelerator, topology
        with pytest.raises(UserError, match=f"config.topology = '{topology}': Cloud TPU lays {accelerator} out"):
            script(config)
    for accelerator, topology in (("v5p", "2x2x1"), ("v5p", "4x4x12"), ("v5e", "1x1"), ("v6e", "8x16")):
        config.accelerator, config.topology = accelerator, topology
        assert not any("topology" in word for word in commands(script(config))["create"])


def test_bash_reads_it(config):
    config.overrides = (shell.NASTY,)
    assert shell.parses(script(config))


@pytest.fixture
def cloud(tmp_path):
    """A gcloud that goes through the states of the file `states`, and whose hosts say what `said-<n>` has."""
    shell.put(tmp_path, "sleep", 'echo "$1" >>slept')
    shell.put(tmp_path, "python", 'echo "$4" >>recorded')
    shell.put(
        tmp_path,
        "gcloud",
        """
        echo "$4" >>called
        case $4 in
          list) head -n 1 states; [[ $(wc -l <states) == 1 ]] || sed -i 1d states ;;
          ssh)
            n=$(grep -c ssh called)
            # By default the 65th host waits for the first 64 to end (gcloud's tpus/queued_resources/ssh.py).
            [[ $* == *--batch-size=all* ]] || { head -n 128 "said-$n"; exec /bin/sleep 60; }
            cat "said-$n"
            ;;
          create) if [[ -s refused ]]; then sed -i 1d refused; exit 1; fi ;;
        esac
        """,
    )
    return tmp_path


def go(folder, config, states, *said):
    (folder / "states").write_text("".join(f"{state}\n" for state in states))
    for number, status in enumerate(said, 1):
        text = "".join(f"some output\nlaunch: host ended with status {s}\n" for s in status)
        (folder / f"said-{number}").write_text(text)
    result = shell.bash(folder, script(config))
    called = [verb for verb in (folder / "called").read_text().split() if verb != "list"]
    recorded = folder / "recorded"
    return result.returncode, called, recorded.read_text().split() if recorded.exists() else []


def prefix_stand_in(folder, name, text):
    """Has a stand-in do something else first."""
    shell.put(folder, name, (folder / "bin" / name).read_text().replace("#!/bin/bash", text))


HOSTS = 4  # a v5e slice of 16 chips


def test_asked_for_waited_for_run_given_back(config, cloud):
    states = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert go(cloud, config, states, [0] * HOSTS) == (0, ["create", "ssh", "delete"], ["0"])


def test_what_is_there_is_gone_on_with(config, cloud):
    assert go(cloud, config, ["ACTIVE"], [0] * HOSTS)[1] == ["ssh", "delete"]


def test_machines_that_were_taken_are_asked_for_anew_however_often(config, cloud):
    lost = ["ACTIVE", "SUSPENDING", "SUSPENDED", ""]  # what ssh ended with, SUSPENDING, is no failure of the program's
    status, called, _ = go(cloud, config, lost * 3 + ["ACTIVE"], [75], [], [137], [0] * HOSTS)
    assert status == 0
    assert called == ["ssh", "delete", "create"] * 3 + ["ssh", "delete"]


def test_failures_are_run_again_up_to_the_limit(config, cloud):
    assert go(cloud, config, ["ACTIVE"], [1], [0, 0, 0, 1]) == (1, ["ssh", "ssh", "delete"], ["1"])


def test_a_users_error_is_the_end(config, cloud):
    assert go(cloud, config, ["ACTIVE"], [1, 2]) == (2, ["ssh", "delete"], ["2"])


def test_a_lost_connection_is_no_failure_however_often(config, cloud):
    status, called, _ = go(cloud, config, ["ACTIVE"], [], [0], [], [], [], [], [0] * HOSTS)
    assert (status, called) == (0, ["ssh"] * 7 + ["delete"])
    waited = [int(seconds) for seconds in (cloud / "slept").read_text().split() if seconds != "30"]
    assert waited == [60, 120, 240, 480, 480]


def test_more_hosts_than_gcloud_reaches_at_once(config, cloud):
    config.topology, config.slices = "16x16", 2
    assert go(cloud, config, ["ACTIVE"], [0] * 128)[:2] == (0, ["ssh", "delete"])


def test_hosts_that_were_told_to_stop_have_not_failed(config, cloud):
    assert go(cloud, config, ["ACTIVE"], [75] * HOSTS, [75], [75], [0] * HOSTS)[:2] == (0, ["ssh"] * 4 + ["delete"])


def test_a_host_that_has_given_up_is_not_waited_for(config, cloud):
    # The others go on trying to reach it, so that ssh does not end by itself.
    real = (cloud / "bin" / "gcloud").read_text()
    shell.put(
        cloud, "gcloud", real.replace('cat "said-$n"', 'cat "said-$n"; exec /bin/sleep 60').replace("#!/bin/bash", "")
    )
    shell.put(cloud, "sleep", "exec /bin/sleep 0.05")
    assert go(cloud, config, ["ACTIVE"], [2]) == (2, ["ssh", "delete"], ["2"])


HANGS = """
    if [[ $4 == ssh && ! -e child ]]; then
      echo ssh >>called
      /bin/sleep 60 & echo $! >child
      echo "launch: host ended with status 75"
      wait
    fi
"""


def ends(pid):
    """Whether a process that has been told to end does so, within seconds."""
    status, deadline = Path(f"/proc/{pid}/status"), time.monotonic() + 10
    while status.exists() and "zombie" not in status.read_text():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_an_earlier_connection_ends_with_its_processes(config, cloud):
    prefix_stand_in(cloud, "gcloud", HANGS)
    assert go(cloud, config, ["ACTIVE"], [], [0] * HOSTS)[:2] == (0, ["ssh", "ssh", "delete"])
    assert ends((cloud / "child").read_text().strip())
    assert len(list((cloud / "logs").glob("trial-*.txt"))) == 2  # a log for each


def test_a_killed_script_takes_its_connection_with_it(config, cloud):
    prefix_stand_in(cloud, "gcloud", HANGS.replace("75", "0"))
    shell.put(cloud, "sleep", "exec /bin/sleep 0.05")
    (cloud / "states").write_text("ACTIVE\n")
    process = subprocess.Popen(["bash", "-c", script(config)], cwd=cloud, env=shell.environment(cloud))
    deadline = time.monotonic() + 20
    while not (cloud / "child").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(20) != 0
    assert ends((cloud / "child").read_text().strip())


def test_a_request_that_cannot_be_met_is_the_end(config, cloud):
    assert go(cloud, config, ["", "FAILED"]) == (1, ["create", "describe", "delete"], ["1"])


@pytest.mark.parametrize(
    ("refusals", "ended"), [(2, (0, ["create"] * 3 + ["ssh", "delete"])), (9, (1, ["create"] * 5))]
)
def test_a_request_that_is_refused_is_made_again_a_few_times(config, cloud, refusals, ended):
    (cloud / "refused").write_text("x\n" * refusals)
    states = [""] * (refusals + 1) + ["ACTIVE"]
    assert go(cloud, config, states, [0] * HOSTS)[:2] == ended


def test_a_gcloud_that_fails_makes_no_second_request(config, cloud):
    prefix_stand_in(cloud, "gcloud", "if [[ $4 == list && ! -e failed ]]; then touch failed; exit 1; fi")
    assert go(cloud, config, ["ACTIVE"], [0] * HOSTS)[1] == ["ssh", "delete"]


def test_hosts_run_the_program_word_for_word(config, tmp_path):
    config.overrides = (shell.NASTY,)
    config.env = {"XLA_FLAGS": "--a=1 --b='$x'"}
    (run,) = runs(config)
    shell.put(tmp_path, "python", 'echo "$XLA_FLAGS"\n' + shell.SHOW_ARGUMENTS)
    # As the shell of this machine hands it to gcloud, and gcloud to that of the host.
    command = next(word for word in commands(script(config))["ssh"] if word.startswith("--command="))
    flags, arguments, ended = shell.bash(tmp_path, command.removeprefix("--command=")).stdout.splitlines()
    assert flags == "--a=1 --b='$x'"
    assert ended == "launch: host ended with status 0"
    arguments = json.loads(arguments)
    assert arguments[:2] == ["-m", "launch.supervise"]
    assert arguments[arguments.index("--") + 1 :] == run.program(config)


@pytest.mark.parametrize(
    ("setup", "program", "status"),
    [("true", "exit 75", 75), ("true", "exit 2", 2), ("tar xf nothing", "exit 0", 1), ("rm bin/python", "", 127)],
)
def test_a_host_always_says_how_it_ended(config, tmp_path, setup, program, status):
    """A setup that fails is no user's error, whatever its status; tar's is 2."""
    config.setup, config.python = (setup,), str(tmp_path / "bin" / "python")
    shell.put(tmp_path, "python", program)
    (run,) = runs(config)
    said = shell.bash(tmp_path, tpu_queued.remote_command(config, run)).stdout
    assert said == f"launch: host ended with status {status}\n"


def test_wrong_use(config):
    check(config)
    config.accelerator, config.topology = "tpu7x", "2x2x1"
    with pytest.raises(UserError, match="gke_jobset or xpk only"):
        tpu_queued.plan(config)
    config.setup = ()
    with pytest.raises(UserError, match="config.setup is empty"):
        check(config)
