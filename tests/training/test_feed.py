"""What a run's processes read: the rows of every batch once, whether or not they keep to their own lanes."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from t5x_domain import cli
from t5x_domain.data.preparation import prepare
from t5x_domain.errors import UserError
from t5x_domain.training.feed import Feed
from t5x_domain.training.run import Run

GIN = """
include 'gin/mixtures/sample.gin'
include 'gin/runs/pretrain.gin'
MODEL = @EncoderDecoder
VOCABULARY = @ByteVocabulary()
prepare.vocabulary_size = None
prepare.inputs_length = None
LENGTHS = {'inputs': 64, 'targets': 64}
BATCH_SIZE = 8
DENOISERS = 'ul2_442'
Run.packing = 'first_fit'
Batches.rows_per_window = 4
mixture_of_denoisers.metadata = @Metadata()
Metadata.templates = ('{source} ',)
PHASES = [@main/Phase(), @cooldown/Phase()]
main/Phase.epochs = 0.5
cooldown/Phase.metadata_rate = 0.0
TRAIN_STEPS = 80
RUN_DIR = 'unused'
ModelConfig.vocab_size = 384
"""


@pytest.fixture(scope="module")
def run_with(tmp_path_factory):
    """(bindings) -> a run over two corpora of 400 documents."""
    folder = tmp_path_factory.mktemp("feed")
    bindings = [f"CACHE_DIR = '{folder / 'cache'}'"]
    for name in ("biomedical", "general"):
        records = [
            {
                "text": f"{name} {i} " * (1 + i % 7),
                "source": name[:3],
                "split": "validation" if i % 10 == 0 else "train",
            }
            for i in range(400)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        bindings += [f"{name.upper()} = '{folder / name}.jsonl'"]
        bindings += [f"{name}/JsonlSource.files = {{'train': %{name.upper()}, 'validation': %{name.upper()}}}"]
    (folder / "run.gin").write_text(GIN)

    def build(*more):
        cli.load_gin([str(folder / "run.gin")], [*bindings, *more])
        if not (folder / "cache").exists():
            prepare()
        return cli.build(Run)

    return build


def feed_of(run, monkeypatch, host=0, num_hosts=1):
    monkeypatch.setattr("t5x_domain.training.feed.process_share", lambda mesh: (host, num_hosts))
    return Feed(run, run.mesh.build(jax.devices()[:1]))


@pytest.mark.parametrize("lanes", [None, 4])
def test_processes_share_out_every_batch(run_with, monkeypatch, lanes):
    run = run_with(f"Run.lanes = {lanes}")
    whole = feed_of(run, monkeypatch)
    parts = [feed_of(run, monkeypatch, host, 4) for host in range(4)]
    assert {tuple(feed.batches.starts) for feed in [whole, *parts]} == {tuple(whole.batches.starts)}
    steps = (0, whole.batches.starts[1], 79)
    for step in steps:
        rows = [next(feed.train_batches(step)) for feed in parts]
        _, expected, _ = next(whole.train_batches(step))
        for name, feature in expected.items():
            np.testing.assert_array_equal(np.concatenate([batch[name] for _, batch, _ in rows]), feature)
    if lanes:  # of 720 documents each has a quarter, and no token is another's
        seen = [
            {(s.component.split("_")[0], s.start_token) for i in range(30) for s in f.batches.seen(i)} for f in parts
        ]
        assert sum(map(len, seen)) == len(set().union(*seen))


@pytest.mark.parametrize("lanes", [None, 4])
def test_worker_processes_make_the_same_batches(run_with, monkeypatch, lanes):
    _, batch, _ = next(feed_of(run_with(f"Run.lanes = {lanes}", "Run.data_workers = 1"), monkeypatch).train_batches(7))
    _, expected, _ = next(feed_of(run_with(f"Run.lanes = {lanes}"), monkeypatch).train_batches(7))
    for name, feature in expected.items():
        np.testing.assert_array_equal(batch[name], feature)


def test_a_run_goes_on_over_the_documents_it_began_with(run_with, tmp_path):
    """Whatever name and version they have. A cache that was moved is the same."""
    run = run_with()
    moved = shutil.copytree(run.cache_dir, tmp_path / "moved")
    run = dataclasses.replace(run, run_dir=str(tmp_path / "run"))
    (run.claim_directory([0, 20]) / "metrics.jsonl").write_text("{}\n")
    run = dataclasses.replace(run, cache_dir=str(moved))
    run.claim_directory([0, 20])
    manifest = json.loads((moved / "general" / "manifest.json").read_text())
    check, *_ = manifest["splits"]["train"]["shards"][2]["checks"].values()
    check["sha256"] = "0" * 64
    (moved / "general" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="belongs to a run .*: digest of the token cache of general was '.*', is '"):
        run.claim_directory([0, 20])


def test_lanes_are_part_of_what_a_run_is(run_with, monkeypatch):
    starts = [0, 20]
    assert run_with("Run.lanes = 4").identity(starts) != run_with("Run.lanes = 8").identity(starts)
    with pytest.raises(UserError, match="Run.lanes = 3 must divide the batch of 8 rows"):
        feed_of(run_with("Run.lanes = 3"), monkeypatch)
