"""Scores by a metadata field, of a model that was trained for a moment."""

import json

import pytest

from t5x_domain import evaluate, prepare, train

GIN = """
include 'gin/mixtures/sample.gin'
include 'gin/runs/pretrain.gin'
include 'gin/models/tiny.gin'
VOCABULARY = @ByteVocabulary()
prepare.vocabulary_size = None
LENGTHS = {'inputs': 128, 'targets': 64}
BATCH_SIZE = 64
TRAIN_STEPS = 20
ModelConfig.vocab_size = 384
ModelConfig.embed_dim = 32
ModelConfig.mlp_dim = 64
ModelConfig.num_heads = 2
ModelConfig.head_dim = 16
ModelConfig.num_encoder_layers = 1
ModelConfig.num_decoder_layers = 1
rsqrt.warmup_steps = 100
Run.eval_batches = None
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "run.gin").write_text(GIN + f"CACHE_DIR = '{folder / 'cache'}'\n")
    for verb, flags in ((prepare, ["--gin.RUN_DIR='unused'"]), (train, [f"--run_dir={folder / 'run'}"])):
        with pytest.raises(SystemExit) as exit:
            verb.main([f"--gin_file={folder / 'run.gin'}", *flags])
        assert exit.value.code == 0
    return folder / "run"


def scores(run_dir, capsys, *flags):
    with pytest.raises(SystemExit) as exit:
        evaluate.main([f"--run_dir={run_dir}", *flags])
    printed = capsys.readouterr()
    assert exit.value.code == 0, printed.err
    return json.loads(printed.out)


def test_scores_by_source(run_dir, capsys):
    plain = scores(run_dir, capsys)
    by_source = scores(run_dir, capsys, "--by=source")
    # data/sample: held-out documents of each source; the two speeches of general English are too few.
    documents = {
        "biomedical": {"MONDO": 354, "CHEBI": 338, "GO": 298},
        "general": {"wordnet": 552, "kjv": 14, "(other)": 2},
    }
    for corpus, sources in documents.items():
        values = by_source[corpus].pop("by")["source"]
        assert {value: found["documents"] for value, found in values.items()} == sources
        assert len({found["perplexity"] for found in values.values()}) == 3
        # Every document is scored once, by itself with its like or among all, though other spans of it are masked: of
        # some 40,000 targets, whose loss has a deviation of at most 2 nats: 4 * 2 * sqrt(2 / 40,000) = 0.06.
        targets = sum(found["targets"] for found in values.values())
        assert targets == pytest.approx(plain[corpus]["targets"], rel=0.01)
        loss = sum(found["loss"] * found["targets"] for found in values.values()) / targets
        assert loss == pytest.approx(plain[corpus]["loss"], abs=0.06)
    assert by_source == plain


def test_the_only_value_scores_what_the_corpus_does(run_dir, capsys):
    # No document of general English has a `url`, and hardly two of biomedical the same: all are pooled, hence scored in
    # the same rows as the corpus. A byte vocabulary decodes to the very bytes.
    found = scores(run_dir, capsys, "--by=url")
    pooled = found["biomedical"].pop("by")["url"]
    assert list(pooled) == ["(other)"]
    assert pooled["(other)"] == pytest.approx({**found["biomedical"], "documents": 990})
    assert "by" not in found["general"]


def test_a_field_that_no_corpus_has(run_dir, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main([f"--run_dir={run_dir}", "--by=year"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "t5x-domain evaluate: error: --by=year: no document of biomedical/validation has this field"
    )
    assert "source" in error


def test_a_model_on_a_labelled_task(run_dir, tmp_path, capsys):
    rows = ["text,label", *(f"protein number {i},{'gene' if i % 2 else 'a rather long name'}" for i in range(6))]
    (tmp_path / "claims.csv").write_text("\n".join(rows))
    files = {"train": str(tmp_path / "claims.csv"), "test": str(tmp_path / "claims.csv")}
    (tmp_path / "tasks.gin").write_text(f"""
LabelledTask.files = {files}
TaskEvaluation.split = 'test'
ranked/LabelledTask.name = 'ranked'
written/LabelledTask.name = 'written'
written/LabelledTask.kind = 'text_to_text'
TaskEvaluation.decoding = @Decoding()
Decoding.max_tokens = 4
""")
    flags = [f"--model={run_dir}", f"--gin_file={tmp_path / 'tasks.gin'}"]
    with pytest.raises(SystemExit) as exit:
        evaluate.main([*flags, "--task=@ranked/LabelledTask()", "--task=@written/LabelledTask()"])
    printed = capsys.readouterr()
    assert exit.value.code == 0, printed.err
    found = json.loads(printed.out)
    # Trained for a moment, the model has no idea: it says the same label to all, or writes nonsense.
    assert found["ranked"] == {"accuracy": 0.5, "macro_f1": pytest.approx(1 / 3), "examples": 6}
    assert found["written"] == {"exact_match": 0.0, "token_f1": 0.0, "examples": 6}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=x", "--by=source"], "--by is for held-out text"),
        (["--run_dir={run_dir}", "--task=@LabelledTask()"], "--task is for --model=DIR"),
        (["--model={run_dir}", "--task=@claims/NoTask()"], "NoTask"),
        (["--model={run_dir}"], "TaskEvaluation"),
    ],
)
def test_flags_that_do_not_go_together(run_dir, capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        evaluate.main([flag.format(run_dir=run_dir) for flag in flags])
    error = capsys.readouterr().err
    assert (exit.value.code, message in error, error.count("\n")) == (2, True, 1), error
