"""A run whose directory is in a bucket: the same to the bit as one on this machine, whatever interrupts it."""

import gzip
import json

import pytest
from small_models import all_bits

from t5x_domain import files, prepare, train
from t5x_domain.conversion.native import open_native
from t5x_domain.training.meter import MACHINE_KEYS
from t5x_domain.training.metrics import read_json_lines

GIN = """
include 'gin/mixtures/sample.gin'
include 'gin/runs/pretrain.gin'
MODEL = @EncoderDecoder
VOCABULARY_SIZE = 320
LENGTHS = {'inputs': 32, 'targets': 16}
BATCH_SIZE = 8
rsqrt.warmup_steps = 100
ModelConfig.vocab_size = 576
ModelConfig.embed_dim = 16
ModelConfig.mlp_dim = 16
ModelConfig.num_heads = 2
ModelConfig.head_dim = 8
ModelConfig.num_encoder_layers = 1
ModelConfig.num_decoder_layers = 1
ModelConfig.dtype = 'float32'
Run.log_every = 1
Run.eval_every = 2
Run.eval_batches = 1
Run.checkpoint_every = 2
"""
STEPS = 4


def call(verb, gin_file, *flags):
    with pytest.raises(SystemExit) as ended:
        verb.main([f"--gin_file={gin_file}", *flags])
    return ended.value.code


@pytest.fixture
def prepared(bucket, tmp_path):
    """The gin file, sources and the trained vocabulary in a bucket, the token cache on this machine."""
    for name in ("biomedical", "general"):
        records = [
            {"text": f"{name} document {number}: " + "the quick brown fox jumps over it. " * 9, "split": split}
            for number in range(24)
            for split in ("train", "validation", "test")
        ]
        lines = gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode())
        files.write_atomically(f"{bucket}/corpus/{name}-0.jsonl.gz", lines)
    settings = {
        "CACHE_DIR": str(tmp_path / "cache"),
        "VOCABULARY_FILE": f"{bucket}/words.model",
        "BIOMEDICAL": f"{bucket}/corpus/biomedical-*.jsonl.gz",
        "GENERAL": f"{bucket}/corpus/general-0.jsonl.gz",
    }
    gin = GIN + "".join(f"{name} = {value!r}\n" for name, value in settings.items())
    files.write_atomically(f"{bucket}/run.gin", gin.encode())
    assert call(prepare, f"{bucket}/run.gin", "--gin.RUN_DIR='unused'", "--gin.TRAIN_STEPS=1") == 0
    return f"{bucket}/run.gin"


def written(run_dir):
    """All that a run says of itself but how fast it went."""
    folder = files.path(run_dir)
    timeless = [
        {key: value for key, value in line.items() if key not in MACHINE_KEYS}
        for line in read_json_lines(folder / "metrics.jsonl")
    ]
    scores = json.loads((folder / "eval.json").read_text())
    return timeless, read_json_lines(folder / "evaluations.jsonl"), scores, (folder / "phases.json").read_text()


@pytest.mark.parametrize("proxy", ["gs", "s3"], indirect=True)
def test_interrupted_and_resumed_among_faults_it_ends_like_one_on_this_machine(
    prepared, bucket, proxy, tmp_path, capsys
):
    assert call(train, prepared, f"--run_dir={tmp_path}/local", f"--gin.TRAIN_STEPS={STEPS}") == 0
    # Every twentieth request fails, in turn with an error of the server and with a connection that breaks.
    proxy.fault = lambda number, method, path: ("503", "reset")[number // 20 % 2] if number % 20 == 0 else None
    assert call(train, prepared, f"--run_dir={bucket}/run", f"--gin.TRAIN_STEPS={STEPS // 2}") == 0
    exported = f"--export_on_finish={bucket}/exported"
    assert call(train, prepared, f"--run_dir={bucket}/run", f"--gin.TRAIN_STEPS={STEPS}", exported) == 0
    proxy.fault = None
    assert "from step 2" in capsys.readouterr().out
    assert written(f"{bucket}/run") == written(tmp_path / "local")
    assert all_bits(open_native(f"{bucket}/run")) == all_bits(open_native(str(tmp_path / "local")))
    names = [name for name, _, _ in files.listing(files.path(f"{bucket}/run"))]
    assert sum(name.startswith("tensorboard/events") for name in names) == 2
    assert files.path(f"{bucket}/exported/model.safetensors").exists()
    assert call(train, prepared, f"--run_dir={bucket}/run", "--gin.TRAIN_STEPS=9", "--gin.Run.seed=1") == 2
    assert f"{bucket}/run belongs to a run of another configuration: Run.seed was 0, is 1" in capsys.readouterr().err


@pytest.mark.parametrize("proxy", ["s3"], indirect=True)  # in gs:// Orbax sees to it itself
def test_a_checkpoint_that_is_not_whole_is_none(prepared, bucket, proxy):
    """Its arrays are there, its last object is not: what a process leaves that is killed while it writes."""
    run = [train, prepared, f"--run_dir={bucket}/run"]
    assert call(*run, "--gin.TRAIN_STEPS=2") == 0
    whole = all_bits(open_native(f"{bucket}/run"))
    assert call(*run, "--gin.TRAIN_STEPS=4") == 0
    files.path(f"{bucket}/run/checkpoints/4/commit_success.txt").unlink()
    assert all_bits(open_native(f"{bucket}/run")) == whole
    assert call(*run, "--gin.TRAIN_STEPS=4") == 0  # goes on from step 2
    assert [line["step"] for line in read_json_lines(files.path(f"{bucket}/run/metrics.jsonl"))] == [1, 2, 3, 4]
