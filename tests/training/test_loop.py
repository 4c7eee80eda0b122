"""The main job as a process of its own: killed, stopped, refused, resumed.

It learns UL2's denoisers with metadata, in two phases that differ in metadata, learning rate and place in the data.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[2]
STEPS = 24

GIN = """
include 'gin/mixtures/sample.gin'
include 'gin/runs/pretrain.gin'
MODEL = @EncoderDecoder
VOCABULARY = @ByteVocabulary()
prepare.vocabulary_size = None
LENGTHS = {'inputs': 64, 'targets': 64}
BATCH_SIZE = 8
DENOISERS = 'ul2_442'
Run.packing = 'first_fit'
Batches.rows_per_window = 16
mixture_of_denoisers.metadata = @Metadata()
Metadata.templates = ('{source} ',)
PHASES = [@main/Phase(), @cooldown/Phase()]
main/Phase.share = 0.5
cooldown/Phase.metadata_rate = 0.0
cooldown/Phase.schedule = @cooldown/linear()
cooldown/linear.peak = 0.01
cooldown/linear.total_steps = 12
Run.eval_mixture = @held_out/mixture_of_denoisers()
held_out/mixture_of_denoisers.denoisers = 't5'
ModelConfig.vocab_size = 384
ModelConfig.embed_dim = 32
ModelConfig.mlp_dim = 64
ModelConfig.num_heads = 2
ModelConfig.head_dim = 16
ModelConfig.num_encoder_layers = 1
ModelConfig.num_decoder_layers = 1
ModelConfig.dropout_rate = 0.1
ModelConfig.dtype = 'float32'
rsqrt.warmup_steps = 100
Run.log_every = 1
Run.eval_every = 6
Run.eval_batches = 2
Run.checkpoint_every = 3
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a gin file and a prepared cache."""
    folder = tmp_path_factory.mktemp("loop")
    lines = GIN + f"CACHE_DIR = '{folder / 'cache'}'\nTRAIN_STEPS = {STEPS}\n"
    (folder / "run.gin").write_text(lines)
    subprocess.run(
        command("prepare", folder, "--gin.RUN_DIR='unused'"), check=True, env=environment(), capture_output=True
    )
    return folder


def command(verb, folder, *flags):
    return [sys.executable, "-m", f"t5x_domain.{verb}", f"--gin_file={folder / 'run.gin'}", *flags]


def environment():
    # One device, as a user has; the suite's eight virtual ones would only cost time.
    return {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}


def start(folder, run_dir, *flags):
    return popen(command("train", folder, f"--run_dir={run_dir}", *flags))


def popen(arguments, **more):
    return subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def finish(folder, run_dir, *flags):
    process = start(folder, run_dir, *flags)
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []


def logged(run_dir):
    """All that is written of a run but what depends on the machine and the clock."""
    from t5x_domain.training.meter import MACHINE_KEYS

    metrics = [{k: v for k, v in line.items() if k not in MACHINE_KEYS} for line in lines(run_dir / "metrics.jsonl")]
    return metrics, lines(run_dir / "evaluations.jsonl")


def arrays(run_dir):
    """Every array of the last checkpoint, parameters and optimizer, as bytes by name."""
    import jax
    import orbax.checkpoint as ocp

    last = run_dir / "checkpoints" / str(STEPS)
    result = {}
    for item in ("params", "rest"):
        tree = ocp.PyTreeCheckpointer().restore(last / item)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            result[item + jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
    return result


@pytest.fixture(scope="module")
def undisturbed(workspace):
    status, _, err = finish(workspace, workspace / "undisturbed")
    assert status == 0, err
    return workspace / "undisturbed"


def wait_for(condition, process, seconds=120):
    deadline = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < deadline:
        time.sleep(0.002)


def saving(run_dir):
    folder = run_dir / "checkpoints"
    return folder.is_dir() and any("tmp" in child.name for child in folder.iterdir())


def test_killed_at_random_moments_ends_as_if_undisturbed(workspace, undisturbed):
    """kill -9 three times while training and twice while a checkpoint is being written."""
    run_dir, moments = workspace / "killed", random.Random(0)
    killed_while_saving, began = 0, time.time()
    for attempt in range(5):
        process = start(workspace, run_dir)
        before = len(lines(run_dir / "metrics.jsonl"))
        target = before + moments.randint(1, 4)
        wait_for(lambda: len(whole_lines(run_dir)) >= target, process)  # noqa: B023
        if attempt >= 3:
            wait_for(lambda: saving(run_dir), process)
        killed_while_saving += saving(run_dir)
        process.kill()
        process.communicate()
    assert killed_while_saving >= 1
    status, _, err = finish(workspace, run_dir)
    assert status == 0, err
    seconds = time.time() - began
    assert logged(run_dir) == logged(undisturbed)
    assert arrays(run_dir) == arrays(undisturbed)
    account = json.loads((run_dir / "goodput.json").read_text())
    assert account["starts"] == len(account["first_step_seconds"]) == 6
    assert sum(account["seconds"].values()) == pytest.approx(account["wall_seconds"])
    # Not in the account: Python before the program and after it, once; here a tenth of a second each when idle.
    assert seconds - 5 < account["wall_seconds"] < seconds
    assert account["goodput"] == account["seconds"]["step"] / account["wall_seconds"] < 1
    assert account["seconds"]["restart"] > 0


def whole_lines(run_dir):
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().splitlines() if path.exists() else []


def test_every_step_is_logged_once_and_its_examples_are_seen_once(workspace, undisturbed):
    assert [line["step"] for line in logged(undisturbed)[0]] == list(range(1, STEPS + 1))
    from t5x_domain import cli

    cli.load_gin([str(workspace / "run.gin")], ["RUN_DIR = 'unused'"])
    from t5x_domain.training.feed import Feed
    from t5x_domain.training.run import Run

    run = cli.build(Run)
    feed = Feed(run, run.mesh.build())
    seen = [chunk for step in range(STEPS) for chunk in feed.batches.seen(step)]
    assert len(seen) == len(set(seen)) > STEPS * run.batch_size
    # No two pieces of a corpus overlap within an epoch, whatever their denoiser and phase.
    for corpus in ("biomedical", "general"):
        pieces = sorted((s.epoch, s.start_token, s.stop_token) for s in seen if s.component.startswith(corpus))
        assert all(a[0] < b[0] or a[2] <= b[1] for a, b in zip(pieces, pieces[1:], strict=False))


def test_resumes_at_the_edge_of_a_phase(workspace, undisturbed):
    """Killed in the second phase with no other checkpoint than that between the two."""
    run_dir = workspace / "edge"
    process = start(workspace, run_dir, "--gin.Run.checkpoint_every=12")
    saved = run_dir / "checkpoints" / "12"  # it has its name when it is complete
    wait_for(lambda: len(whole_lines(run_dir)) >= 13 and saved.is_dir(), process)
    process.kill()
    process.communicate()
    assert [child.name for child in saved.parent.iterdir() if child.name.isdigit()] == ["12"]
    status, out, err = finish(workspace, run_dir)
    assert status == 0, err
    assert "from step 12" in out and "step 13: phase 2" in out
    assert logged(run_dir) == logged(undisturbed)
    assert arrays(run_dir) == arrays(undisturbed)
    assert (run_dir / "phases.json").read_bytes() == (undisturbed / "phases.json").read_bytes()


# The train verb that gets both signals once more when there is nothing to do but to wait until the checkpoint is whole.
IMPATIENT = """
import os, signal
from t5x_domain import train
from t5x_domain.training.checkpoint import Checkpoints
plain = Checkpoints.close
def close(self):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    plain(self)
Checkpoints.close = close
train.main()
"""


def test_sigterm_saves_and_exits_with_its_own_code(workspace, undisturbed):
    """Sent to the process and to all that it has started, as a terminal and some launchers do."""
    run_dir = workspace / "stopped"
    flags = command("train", workspace, f"--run_dir={run_dir}", "--gin.Run.data_workers=1")[3:]
    process = popen([sys.executable, "-c", IMPATIENT, *flags], start_new_session=True)
    wait_for(lambda: len(whole_lines(run_dir)) >= 4, process)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    steps = len(whole_lines(run_dir))
    assert f"saving step {steps}" in out
    assert (run_dir / "checkpoints" / str(steps)).is_dir()
    assert finish(workspace, run_dir)[0] == 0
    assert logged(run_dir) == logged(undisturbed)
    assert arrays(run_dir) == arrays(undisturbed)


def test_a_full_disk_ends_the_run_and_loses_nothing(workspace, undisturbed):
    run_dir = workspace / "full"
    process = start(workspace, run_dir)
    wait_for(lambda: len(whole_lines(run_dir)) >= 4, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    saved = sorted(int(child.name) for child in (run_dir / "checkpoints").iterdir())
    # No file may grow beyond 16 KiB: the embedding alone has 48.
    limited = ["prlimit", "--fsize=16384", *command("train", workspace, f"--run_dir={run_dir}")]
    result = subprocess.run(limited, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert "could not be written" in result.stderr
    assert f"newest complete checkpoint is of step {saved[-1]}" in result.stderr
    status, _, err = finish(workspace, run_dir)
    assert status == 0, err
    assert logged(run_dir) == logged(undisturbed)
    assert arrays(run_dir) == arrays(undisturbed)


def test_a_finished_run_is_left_as_it_is(workspace, undisturbed):
    """Also where the model is computed in another way, on other machines, or by a program that knows more settings."""
    before, record = logged(undisturbed), undisturbed / "run.json"
    identity = json.loads(record.read_text())
    later = {"Run.init_longer", "ModelConfig.norm", *(key for key in identity if "digest" in key)}
    earlier = {key: value for key, value in identity.items() if key not in later}
    record.write_text(json.dumps(earlier))
    elsewhere = ["--gin.ModelConfig.remat='full'", "--gin.ModelConfig.attention_backend='xla'"]
    status, out, err = finish(workspace, undisturbed, *elsewhere)
    assert status == 0, err
    assert f"from step {STEPS}" in out
    assert logged(undisturbed) == before
    assert json.loads(record.read_text()).keys() == identity.keys()


def test_what_a_run_leaves(undisturbed):
    line = lines(undisturbed / "metrics.jsonl")[-1]
    assert set(line) >= {"step", "loss", "accuracy", "tokens_per_second", "learning_rate", "grad_norm", "corpus_loss"}
    assert set(line["corpus_loss"]) == {"biomedical", "general"}
    assert 0 < line["step_seconds"]["p50"] <= line["step_seconds"]["p90"] <= line["step_seconds"]["max"]
    assert line["mfu"] is None and line["memory"]["device_peak"] is None  # nobody knows what a CPU could do
    assert set(line["denoiser_loss"]) >= {"r3_15", "x64_50", "s"}
    first, last = json.loads((undisturbed / "phases.json").read_text())
    assert (first["start"], first["stop"], last["start"], last["stop"]) == (0, 12, 12, 24)
    for phase in (first, last):
        # Documents of about 300 bytes in rows of 64 make shares coarse: 96 rows hold some hundred pieces.
        assert phase["corpora"] == pytest.approx({"biomedical": 0.5, "general": 0.5}, abs=0.1)
        assert phase["denoisers"]["s"] == pytest.approx(0.2, abs=0.08)
    summary = json.loads((undisturbed / "eval.json").read_text())
    assert (summary["before"]["step"], summary["after"]["step"]) == (0, STEPS)
    assert summary["after"]["biomedical"]["perplexity"] < summary["before"]["biomedical"]["perplexity"]
    assert "ModelConfig.embed_dim = 32" in (undisturbed / "config.gin").read_text()
    assert list((undisturbed / "tensorboard").iterdir())


def test_init_from_takes_the_parameters_and_starts_at_step_0(workspace, undisturbed):
    flags = (f"--init_from={undisturbed}", "--gin.TRAIN_STEPS=2", "--gin.Run.profile_steps=(2,2)")
    status, out, err = finish(workspace, workspace / "continued", *flags)
    assert status == 0, err
    assert "tracing updates 2 to 2" in out
    assert list((workspace / "continued" / "profile" / "process_0").rglob("*.xplane.pb"))
    assert "from step 0" in out
    first = lines(workspace / "continued" / "evaluations.jsonl")[0]
    assert first["step"] == 0
    assert first["corpora"] == lines(undisturbed / "evaluations.jsonl")[-1]["corpora"]


def test_the_trained_model_is_left_for_hugging_face(workspace):
    from t5x_domain.conversion.formats import open_checkpoint

    run_dir, target = workspace / "exported", workspace / "for hugging face"
    flags = ("--gin.TRAIN_STEPS=2", f"--export_on_finish={target}")
    status, out, err = finish(workspace, run_dir, *flags)
    assert status == 0, err
    assert f"{target}: written for Hugging Face" in out
    ours, theirs = open_checkpoint(str(run_dir)), open_checkpoint(str(target))
    assert theirs.vocabulary == ours.vocabulary
    for name, tensor in ours.tensors.items():
        np.testing.assert_array_equal(theirs.tensors[name].read(), tensor.read())
    card = (target / "README.md").read_text()
    assert "| updates | 2 |" in card and "| biomedical |" in card
    status, out, err = finish(workspace, run_dir, *flags)  # the same command once more does no harm
    assert status == 0, err
    assert "written for Hugging Face" not in out


def test_goes_on_where_another_program_stopped(workspace, undisturbed):
    """From step 1,000 with its second moments; killed before the first logged step, as if it was not."""
    from t5x_domain.conversion.checkpoint import SecondMoments
    from t5x_domain.conversion.formats import open_checkpoint, write_checkpoint

    model = open_checkpoint(str(undisturbed))
    # No matrix of this model is large enough to be factored.
    slots = {name: {"v": np.full(tensor.shape, 1e-4, np.float32)} for name, tensor in model.tensors.items()}
    stopped = dataclasses.replace(model, second_moments=SecondMoments(1000, slots))
    write_checkpoint(stopped, str(workspace / "another_program"), "native")
    flags = [f"--init_from={workspace / 'another_program'}", "--gin.Run.init_optimizer=True", "--gin.TRAIN_STEPS=1010"]
    flags += ["--gin.Run.log_every=5", "--gin.Run.checkpoint_every=4", "--gin.Run.eval_every=10"]
    status, out, err = finish(workspace, workspace / "goes_on", *flags)
    assert status == 0, err
    assert "from step 1,000" in out

    run_dir = workspace / "goes_on_killed"
    process = start(workspace, run_dir, *flags)
    wait_for((run_dir / "checkpoints" / "1004").is_dir, process)
    process.kill()
    process.communicate()
    status, out, err = finish(workspace, run_dir, *flags)
    assert status == 0, err
    assert logged(run_dir) == logged(workspace / "goes_on")
    assert [line["step"] for line in lines(run_dir / "evaluations.jsonl")] == [1000, 1010]
    assert (run_dir / "phases.json").read_bytes() == (workspace / "goes_on" / "phases.json").read_bytes()


def test_a_refused_start_leaves_the_directory_free(workspace):
    run_dir = workspace / "second_try"
    status, _, err = finish(workspace, run_dir, "--init_from=docs", "--gin.TRAIN_STEPS=2")
    assert status == 2 and "--init_from=docs: no model there" in err
    status, out, err = finish(workspace, run_dir, "--gin.TRAIN_STEPS=2")
    assert status == 0, err
    assert json.loads((run_dir / "run.json").read_text())["Run.init_from"] is None
    assert json.loads((run_dir / "model.json").read_text())["facts"] == {}


REFUSED = {
    "other_configuration": (["--gin.ModelConfig.mlp_dim=96"], r"ModelConfig.mlp_dim was 64, is 96"),
    "batch": (["--gin.BATCH_SIZE=9", "--gin.Run.accumulation_steps=2"], r"Run.batch_size = 9 does not divide"),
    "mesh": (["--gin.MeshShape.tensor=2"], r"there are 1; set MeshShape"),
    "unknown_name": (["--gin.Run.batch_sise=9"], r"batch_sise"),
    "unknown_gin_file": (["--gin_file=gin/models/none.gin"], r"gin/models/none.gin"),
    "vocabulary": (["--gin.ByteVocabulary.extra_ids=120"], r"vocabulary"),
    "too_few_sentinels": (
        ["--gin.DENOISERS=[('R', 1, 0.15, None, 1.0)]", "--gin.LENGTHS={'inputs':900,'targets':600}"],
        r"need \d+ sentinels but the vocabulary has only 100; set ByteVocabulary.extra_ids",
    ),
    "unknown_denoiser": (["--gin.DENOISERS='ul3'"], r"unknown denoiser mix 'ul3'; choose one of .*ul2_442"),
    "unknown_family": (["--gin.DENOISERS=[('Q', 3, 0.15, None, 1.0)]"], r"unknown denoiser 'Q'; the families are R,"),
    "weights": (["--gin.DENOISERS=[('R', 3, 0.15, None, 0.7)]"], r"the weights 0.7 sum to 0.7; make them sum to 1"),
    "missing_mode": (
        ["--gin.mixture_of_denoisers.mode_form='id'"],
        r"mode token missing in the vocabulary: .* for '\[R\]'; train a vocabulary",
    ),
    "template_field": (
        ["--gin.Metadata.templates=('{author}',)"],
        r"field author, which nothing in corpus 'biomedical', split 'train', has; the fields there are: .*source",
    ),
    "metadata_packing": (["--gin.Run.packing='concat_and_split'"], r"set Run.packing='first_fit'"),
    "phases": (
        ["--gin.cooldown/Phase.share=0.4"],
        r"the phases do not fill the run of 24 steps \(TRAIN_STEPS\), they have phase 1 12, phase 2 10",
    ),
    "phase_lengths": (["--gin.main/Phase.steps=24"], r"Phase.share and Phase.steps are both set"),
    "subset": (["--gin.Phase.subset={'law': 3}"], r"Phase.subset names the corpus 'law', but the mixture has only"),
    "metadata_rate": (["--gin.mixture_of_denoisers.metadata=None"], r"no component of mixture 'denoisers' has meta"),
    "small_embedding": (["--gin.ModelConfig.vocab_size=300"], r"ModelConfig.vocab_size = 300 is smaller"),
    "no_cache": (["--gin.CACHE_DIR='/nowhere'"], r"/nowhere"),
    "macro_not_set": (["--gin.Run.total_steps=%STEPS"], r"STEPS is not set; bind it in .* --gin.STEPS="),
    "init_from": (["--init_from=/nowhere", "--run_dir=RUN"], r"--init_from=/nowhere: there is no such folder"),
    "another_start": (["--init_from=gin"], r"Run.init_from was None, is 'gin'"),
    "export": (["--export_on_finish=gin"], r"--export_on_finish=gin: exists and is not empty"),
    "profile_steps": (["--gin.Run.profile_steps=(20,30)"], r"Run.profile_steps = \(20, 30\): .*last <= 24 "),
    "profile_order": (["--gin.Run.profile_steps=(5,3)"], r"give the first and the last update to trace"),
    "profile_one": (["--gin.Run.profile_steps=5"], r"give the first and the last update to trace"),
    "compilation_cache": (["--compilation_cache=setup.py/x"], r"--compilation_cache=setup.py/x: Not a directory"),
    "freeze": (["--gin.Updates.freeze=('encodr',)"], r"'encodr' matches no parameter"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_sentence_and_leave_the_run_alone(workspace, undisturbed, name, tmp_path, monkeypatch, capsys):
    import re

    from t5x_domain import train

    flags, message = REFUSED[name]
    before = logged(undisturbed)
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("jax.devices", lambda *_: __import__("jax").local_devices()[:1])
    run_dir = f"--run_dir={undisturbed}"
    flags = [flag.replace("RUN", str(tmp_path)) for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        train.main([f"--gin_file={workspace / 'run.gin'}", run_dir, *flags])
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert error.count("\n") == 0, error
    assert re.search(message, error), error
    assert logged(undisturbed) == before


def test_a_run_that_only_meets_nan_ends_with_the_batch_kept(workspace):
    run_dir = workspace / "nan"
    status, _, err = finish(workspace, run_dir, "--gin.rsqrt.base=1e30", "--gin.Run.max_skipped_in_a_row=3")
    assert status == 2
    assert "were not finite" in err
    (kept,) = run_dir.glob("nonfinite_batch_*.npz")
    assert np.load(kept)["encoder_input_tokens"].shape == (8, 64)
