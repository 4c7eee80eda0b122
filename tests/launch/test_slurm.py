import json
import os
import re
import signal
import subprocess
import time

import pytest
import shell

from launch import slurm
from launch.config import check, defaults
from launch.sweep import grid, runs
from t5x_domain.errors import UserError

# Long options that the sbatch of SLURM 24.05 knows and that may be of use to a run (sbatch(1), "OPTIONS").
OPTIONS = """
account acctg-freq array batch begin chdir cluster-constraint clusters comment constraint container contiguous
core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution error
exclude exclusive export export-file extra extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node
gpus-per-socket gpus-per-task gres gres-flags hint hold ignore-pbs input job-name kill-on-invalid-dep licenses
mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue nodefile
nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output
overcommit oversubscribe parsable partition power prefer priority profile propagate qos quiet reboot requeue
reservation segment signal sockets-per-node spread-job switches test-only thread-spec threads-per-core time
time-min tmp tres-per-task uid use-min-nodes verbose wait wait-all-nodes wckey wrap
"""


@pytest.fixture
def config(tmp_path):
    config = defaults("slurm")
    config.name = "trial"
    config.accelerator = "gpu"
    config.gin_files = ("gin/models/tiny.gin",)
    config.storage = "/shared/runs"
    config.logs = str(tmp_path)
    config.notice_seconds = 90
    config.max_restarts = 1
    return config


def directives(script):
    """Those that sbatch reads: up to the first command."""
    head = script.split("\n\n")[0].splitlines()[1:]
    assert all(line.startswith("#SBATCH --") for line in head)
    return dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in head)


@pytest.mark.parametrize("points", [1, 6])
def test_sbatch_knows_every_option(config, points):
    config.sweep = grid({"Run.seed": range(points)})
    config.slurm.update(partition="gpu", account="mine", qos="long", parallel_runs=2, options=("--exclusive",))
    found = directives(slurm.script(config))
    assert set(found) <= set(OPTIONS.split())
    assert found.get("array") == (None if points == 1 else "0-5%2")
    assert found["signal"] == "TERM@90"
    assert (found["partition"], found["account"], found["qos"]) == ("gpu", "mine", "long")


def test_a_task_for_each_gpu_that_sees_all_gpus_of_its_node(config):
    # jax/_src/clusters: local_device_ids = [SLURM_LOCALID], an index into the GPUs that the task sees.
    config.slurm.nodes, config.slurm.gpus_per_node = 3, 4
    found = directives(slurm.script(config))
    assert (found["nodes"], found["ntasks-per-node"], found["gpus-per-node"]) == ("3", "4", "4")
    assert not {"gpus-per-task", "gpu-bind", "ntasks-per-gpu"} & set(found)


def test_bash_reads_it(config):
    config.overrides = (shell.NASTY,)
    assert shell.parses(slurm.script(config))


# Does with the tasks' processes as the real one: srun(1) kills them when it is told to end (src/srun/signals.c).
SRUN = """
while [[ $1 == --* ]]; do shift; done
setsid "$@" &
echo $! >step
trap 'kill -KILL -- -$(cat step)' TERM
wait $(cat step)
"""


@pytest.fixture
def cluster(tmp_path):
    """srun for the task of one GPU; what scontrol is told is kept. Job 17 is alone; 36 is an array, and its task 1."""
    shell.put(tmp_path, "srun", SRUN)
    shell.put(tmp_path, "scancel", 'kill "-${1#--signal=}" -- "-$(cat step)"')
    shell.put(tmp_path, "scontrol", 'echo "$*" >>requeued')
    shell.put(
        tmp_path,
        "squeue",
        """
        case $* in
          *--jobs=17 | *--jobs=36_[01]) cat job_state ;;
          *--jobs=36) echo PENDING; cat job_state; cat job_state ;;
        esac
        """,
    )
    (tmp_path / "job_state").write_text("RUNNING\n")
    return tmp_path


def stand_in(folder, program):
    """`python`, which is the trainer and the record of how it ended."""
    shell.put(folder, "python", f'if [[ $2 == launch.record ]]; then echo "$4" >>recorded; exit; fi\n{program}')


def submit(folder, config, program, task=None):
    stand_in(folder, program)
    array = {"SLURM_ARRAY_JOB_ID": "36", "SLURM_ARRAY_TASK_ID": str(task)}
    job = {"SLURM_JOB_ID": "17"} if task is None else {"SLURM_JOB_ID": "36" if task == 1 else "35", **array}
    return shell.bash(folder, slurm.script(config), SLURM_CPUS_PER_TASK="8", **job)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("status", [0, 2])
def test_the_end_is_the_end(config, cluster, status):
    assert submit(cluster, config, f"exit {status}").returncode == status
    assert lines(cluster / "requeued") == []
    assert lines(cluster / "recorded") == [str(status)]


def test_a_preempted_job_is_queued_again_however_often(config, cluster):
    for _ in range(3):
        submit(cluster, config, "exit 75")
    assert lines(cluster / "requeued") == ["requeue 17"] * 3


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED"])
def test_a_cancelled_job_stays_so(config, cluster, state):
    (cluster / "job_state").write_text(f"{state}\n")
    assert submit(cluster, config, "exit 75").returncode == 75
    assert lines(cluster / "requeued") == []


def test_failures_are_queued_again_up_to_the_limit(config, cluster):
    assert submit(cluster, config, "exit 9").returncode == 0
    submit(cluster, config, "exit 75")
    assert submit(cluster, config, "kill -9 $$").returncode == 1
    assert lines(cluster / "requeued") == ["requeue 17"] * 2


@pytest.mark.parametrize(
    ("statuses", "meaning"), [((75, 75), 75), ((75, 1), 101), ((137, 75), 101), ((2, 75), 102), ((1, 2), 102)]
)
def test_the_gravest_task_has_the_highest_status(statuses, meaning):
    # srun(1): "srun will return the highest exit code of all tasks run".
    ended = [subprocess.run(["bash", "-c", slurm._TASK, "task", "bash", "-c", f"exit {s}"]) for s in statuses]
    assert max(task.returncode for task in ended) == meaning


@pytest.mark.parametrize("task", [0, 1])
def test_a_task_of_an_array_is_queued_again_alone(config, cluster, task):
    config.sweep = (("Run.seed=1",), ("Run.seed=2",))
    assert submit(cluster, config, "exit 75", task).returncode == 0
    assert lines(cluster / "requeued") == [f"requeue 36_{task}"]


SAVES = "trap 'echo saved >>saved; exit 75' TERM\ntouch ready\nwhile :; do sleep 0.05; done"


def test_sigterm_to_the_shell_reaches_the_program_which_saves(config, cluster):
    stand_in(cluster, SAVES)
    process = subprocess.Popen(
        ["bash", "-c", slurm.script(config)],
        cwd=cluster,
        env=shell.environment(cluster, SLURM_JOB_ID="17", SLURM_CPUS_PER_TASK="8"),
    )
    deadline = time.monotonic() + 20
    while not (cluster / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    process.wait(20)
    assert lines(cluster / "saved") == ["saved"]
    assert lines(cluster / "recorded") == ["75"]
    assert lines(cluster / "requeued") == ["requeue 17"]


def test_a_profile_is_asked_for_without_ending_the_task(tmp_path):
    # scancel --signal=USR1 tells the task's shell as well as the program.
    program = ["bash", "-c", "trap 'exit 7' USR1; echo ready; while :; do sleep 0.05; done"]
    task = subprocess.Popen(
        ["bash", "-c", slurm._TASK, "task", *program], stdout=subprocess.PIPE, start_new_session=True
    )
    task.stdout.readline()
    os.killpg(task.pid, signal.SIGUSR1)
    assert task.wait(10) == 101  # the program's own end
    task.stdout.close()


def test_each_array_task_runs_its_point_of_the_sweep_word_for_word(config, cluster):
    config.overrides = (shell.NASTY, "TRAIN_STEPS=5")
    config.sweep = (("Run.seed=1",), ("Run.seed=2", "DENOISERS='t5'"))
    config.env = {"XLA_FLAGS": "--a=1 --b='$x'"}
    for index, run in enumerate(runs(config)):
        result = submit(cluster, config, 'echo "$XLA_FLAGS"\n' + shell.SHOW_ARGUMENTS, task=index)
        flags, arguments = result.stdout.splitlines()
        assert flags == "--a=1 --b='$x'"
        assert json.loads(arguments) == run.program(config)[1:]
        assert run.run_dir in result.stdout


def test_setup_comes_before_unset_variables_are_errors(config, cluster):
    config.setup = ('echo "at $UNSET first"',)  # as in the scripts of many module systems and environments
    assert submit(cluster, config, "echo then").stdout.splitlines() == ["at  first", "then"]


def test_a_setup_that_fails_is_the_end(config, cluster):
    config.setup = ("cd /nowhere",)
    assert submit(cluster, config, "echo trained").returncode == 1
    assert lines(cluster / "recorded") == lines(cluster / "requeued") == []


def test_failures_are_counted_beside_the_logs_wherever_the_setup_goes(config, cluster):
    config.logs, config.setup = "logs", ("mkdir -p elsewhere; cp job_state elsewhere; cd elsewhere",)
    (cluster / "logs").mkdir()
    submit(cluster, config, "exit 9")
    assert lines(cluster / "logs" / "trial.failures") == ["1"]


def test_the_script_is_written_and_submitted(config, tmp_path):
    plan = slurm.plan(config)
    assert list(plan.files) == [f"{tmp_path}/trial.sbatch"]
    assert plan.commands == [["sbatch", f"{tmp_path}/trial.sbatch"]]
    assert re.search(rf"--output={tmp_path}/%x-%j.txt", next(iter(plan.files.values())))


def test_wrong_use(config):
    config.slurm.nodes = 0
    with pytest.raises(UserError, match="config.slurm.nodes = 0"):
        slurm.plan(config)
    config.slurm.nodes = 1
    config.accelerator = "cpu"
    with pytest.raises(UserError, match="config.accelerator = 'cpu'"):
        slurm.plan(config)
    config.accelerator = "v5e"
    with pytest.raises(UserError, match="the target slurm runs"):
        check(config)
