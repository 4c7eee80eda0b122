"""Several processes train one model: the same batches, the same losses; stopped, killed, and started again."""

import json
import re
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest

from tests.processes.cluster import HEARTBEAT_SECONDS, REPOSITORY, Cluster

STEPS, LOG_EVERY, CHECKPOINT_EVERY, BATCH = 60, 5, 10, 8
SLACK = 8  # seconds to write messages and to end processes, on a machine that has other things to do

GIN = f"""
include 'gin/mixtures/sample.gin'
include 'gin/runs/pretrain.gin'
MODEL = @DecoderOnly
VOCABULARY = @ByteVocabulary()
prepare.vocabulary_size = None
LENGTHS = {{'inputs': 32, 'targets': 32}}
BATCH_SIZE = {BATCH}
TRAIN_STEPS = {STEPS}
Run.packing = 'first_fit'
Batches.rows_per_window = 16
MeshShape.data = -1
MeshShape.fsdp = 2
ModelConfig.vocab_size = 384
ModelConfig.embed_dim = 32
ModelConfig.mlp_dim = 64
ModelConfig.num_heads = 2
ModelConfig.head_dim = 16
ModelConfig.num_decoder_layers = 1
ModelConfig.dropout_rate = 0.1
ModelConfig.dtype = 'float32'
rsqrt.warmup_steps = 100
Run.log_every = {LOG_EVERY}
Run.eval_every = {STEPS}
Run.eval_batches = 1
Run.checkpoint_every = {CHECKPOINT_EVERY}
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a gin file and a prepared cache."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "run.gin").write_text(GIN + f"CACHE_DIR = '{folder / 'cache'}'\n")
    prepare = [sys.executable, "-m", "t5x_domain.prepare", f"--gin_file={folder / 'run.gin'}", "--gin.RUN_DIR='unused'"]
    subprocess.run(prepare, check=True, cwd=REPOSITORY, capture_output=True)
    return folder


def start(workspace, count, name, *flags, kept, **more):
    flags = (f"--gin_file={workspace / 'run.gin'}", f"--run_dir={workspace / name}", *flags)
    return Cluster(count, kept, *flags, **more)


@pytest.fixture(scope="module")
def alone(workspace):
    """A run of one process with as many devices."""
    ((status, _, err),) = start(workspace, 1, "alone", kept=workspace / "alone_batches").finish()
    assert status == 0, err
    return workspace / "alone"


def lines(run_dir, file="metrics.jsonl"):
    path = run_dir / file
    return [json.loads(line) for line in path.read_bytes().rpartition(b"\n")[0].splitlines()] if path.exists() else []


def last_logged(run_dir):
    return max((line["step"] for line in lines(run_dir)), default=0)


def saved(run_dir):
    return max((int(child.name) for child in (run_dir / "checkpoints").iterdir() if child.name.isdigit()), default=0)


def kept_batches(folder):
    """{step: [features [rows, T] that a process read, for each process]}, of steps that all of them read."""
    steps = {}
    for file in sorted(folder.glob("[0-9]*.npz")):
        steps.setdefault(int(file.stem.split("_")[0]), []).append(dict(np.load(file)))
    count = max(map(len, steps.values()))
    return {step: parts for step, parts in steps.items() if len(parts) == count}


class Scene(NamedTuple):
    """Processes, which of them is sent what when the run has logged which step, and what else they are told."""

    count: int
    victim: int
    notice: signal.Signals
    logged: int
    flags: tuple[str, ...] = ()


SCENES = (
    Scene(4, 2, signal.SIGTERM, logged=5),
    Scene(2, 1, signal.SIGKILL, logged=30),
    # Four parts of every matrix and one of the batch, which both processes read then.
    Scene(2, 0, signal.SIGKILL, logged=45, flags=("--gin.MeshShape.fsdp=1", "--gin.MeshShape.tensor=4")),
)


class Ended(NamedTuple):
    """How a scene ended: [(status, stdout, stderr)], seconds after the signal, what was logged and saved by then."""

    results: list
    seconds: float
    logged: int
    saved: int


@pytest.fixture(scope="module")
def disturbed(workspace):
    """A run through all scenes, finished by one process; in the first, process 1 has slow data."""
    run_dir, history = workspace / "disturbed", []
    for number, scene in enumerate(SCENES):
        kept, slow_data = workspace / f"batches_{number}", 0.0 if number else 0.2
        cluster = start(workspace, scene.count, "disturbed", *scene.flags, kept=kept, slow_data=slow_data)
        cluster.wait_for(lambda: last_logged(run_dir) >= scene.logged)  # noqa: B023
        told = time.monotonic()
        cluster.processes[scene.victim].send_signal(scene.notice)
        results = cluster.finish()
        history.append(Ended(results, time.monotonic() - told, last_logged(run_dir), saved(run_dir)))
    (result,) = start(workspace, 1, "disturbed", kept=workspace / "batches_3").finish()
    assert result[0] == 0, result
    return history


def test_told_to_stop_all_save_the_same_step(disturbed):
    """SIGTERM to process 2 of 4. JAX looks for the signal once a second, and a step takes 0.2 s."""
    ended = disturbed[0]
    assert [status for status, _, _ in ended.results] == [75] * 4, ended
    assert f"told to stop; saving step {ended.saved}" in ended.results[0][1]
    assert ended.logged <= ended.saved < STEPS
    assert all("told to stop" not in out and "loss" not in out for _, out, _ in ended.results[1:])


def test_a_lost_process_ends_the_others(disturbed):
    """Within the time for its sign of life, a tenth between two questions, and two seconds of farewell of process 0."""
    ended = disturbed[1]
    (status, _, err), (killed, _, _) = ended.results
    assert (status, killed) == (75, -signal.SIGKILL), err
    assert f"process 0: process 1 was lost: nothing was heard of it for {HEARTBEAT_SECONDS} s" in err
    assert ended.seconds < 1.1 * HEARTBEAT_SECONDS + 2 + SLACK


def test_lost_process_0_ends_the_others_at_once(disturbed):
    (killed, _, _), (status, _, err) = disturbed[2].results
    assert (status, killed) == (75, -signal.SIGKILL), err
    assert err.splitlines()[-1].startswith("t5x-domain: process 1: process 0 (127.0.0.1:")
    assert disturbed[2].seconds < SLACK


def test_a_restart_loses_only_steps_since_the_last_checkpoint(workspace, disturbed):
    """Saving goes on beside the next steps, so it is the checkpoint before the last that is certain to be whole."""
    assert not list((workspace / "disturbed").glob(".*"))  # nor is anything left that only the start needed
    begins = [min(kept_batches(workspace / f"batches_{number}")) - 1 for number in range(4)]
    assert begins == [0, *(ended.saved for ended in disturbed)]
    assert all(ended.saved > ended.logged - 2 * CHECKPOINT_EVERY for ended in disturbed)


def test_every_process_reads_its_share_of_the_same_batches(workspace, alone, disturbed):
    """Bit for bit, whatever the number of processes and however often the run began again."""
    whole = {step: batch for step, (batch,) in kept_batches(workspace / "alone_batches").items()}
    assert list(whole) == list(range(1, STEPS + 1))
    for number, rows in enumerate((BATCH // 4, BATCH // 2, BATCH, BATCH)):
        for step, parts in kept_batches(workspace / f"batches_{number}").items():
            for key, expected in whole[step].items():
                assert {part[key].shape[0] for part in parts} == {rows}
                read = np.concatenate([part[key] for part in parts])
                np.testing.assert_array_equal(read, np.concatenate([expected] * (len(read) // BATCH)))
    assert {step for n in range(4) for step in kept_batches(workspace / f"batches_{n}")} == set(whole)


def test_the_losses_are_those_of_one_process(workspace, alone, disturbed):
    """Four devices' sums are added in another order, in one process, in several, and with other parts of the matrices.

    Adding four numbers in two orders differs by 2 x 3 roundings of 2**-24. So every update is that of one process but
    for that share of it; none moves the loss by more than 1, which all the following ones keep at worst.
    """
    bound = STEPS * 6 * 2.0**-24
    assert [line["step"] for line in lines(workspace / "disturbed")] == list(range(LOG_EVERY, STEPS + 1, LOG_EVERY))
    for ours, theirs in zip(lines(workspace / "disturbed"), lines(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0, abs=bound)
        assert ours["raw_tokens"] == theirs["raw_tokens"]
    ours, theirs = (lines(folder, "evaluations.jsonl") for folder in (workspace / "disturbed", alone))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [0, STEPS]
    for corpus, scores in theirs[-1]["corpora"].items():
        assert ours[-1]["corpora"][corpus]["loss"] == pytest.approx(scores["loss"], rel=0, abs=bound)
        assert ours[-1]["corpora"][corpus]["targets"] == scores["targets"]


def test_the_slow_process_is_named_with_the_cause(workspace, disturbed):
    """Process 1 of the first scene waits 0.2 s for every batch."""
    out = disturbed[0].results[0][1]
    said = re.search(
        r"process 1 on \S+ keeps the others waiting: .* a step .*, waiting for data \(([\d.]+) s against", out
    )
    assert said and float(said[1]) >= 0.2, out
    hosts = lines(workspace / "disturbed", "hosts.jsonl")[0]["hosts"]
    assert [host["host"].split(" on ")[0] for host in hosts] == [f"process {index}" for index in range(4)]
    for host in hosts:  # all wait for the slow one; one that is two updates ahead may have waited two times less
        assert host["p50"] <= host["p90"] <= host["max"]
        assert host["max"] >= 0.2 * (host["steps"] - 2) / host["steps"]


def test_what_process_0_refuses_ends_all_with_the_same_sentence(workspace, alone):
    """Only process 0 looks at the run's directory."""
    before = lines(alone)
    results = start(workspace, 2, "alone", "--gin.ModelConfig.mlp_dim=96", kept=workspace / "none").finish()
    for status, _, err in results:
        assert status == 2, err
        assert "ModelConfig.mlp_dim was 64, is 96" in err.splitlines()[-1]
    assert lines(alone) == before


def test_what_one_process_refuses_ends_the_others(workspace):
    """The cache is not where process 1 looks for it."""
    own = {1: ["--gin.CACHE_DIR='/nowhere'"]}
    (status, _, err), (other, _, own_err) = start(workspace, 2, "one", kept=workspace / "none", own_flags=own).finish()
    assert (status, other) == (2, 2), (err, own_err)
    assert "/nowhere" in own_err.splitlines()[-1]
    assert "t5x-domain: process 0: process 1 ended: " in err and "/nowhere" in err
