"""The verb: flags, gin, one line for a user's mistake."""

import json

import pytest
from small_models import random_checkpoint

from t5x_domain.conversion.formats import write_checkpoint
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.finetune import main
from t5x_domain.models.assemblies import EncoderDecoder
from t5x_domain.models.config import ModelConfig

SHAPE = {"vocab_size": 384, "embed_dim": 8, "mlp_dim": 12, "num_heads": 2, "head_dim": 4, "dtype": "float32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and a task with a column that the shipped gin file does not expect."""
    folder = tmp_path_factory.mktemp("finetune")
    config = ModelConfig(**SHAPE, num_encoder_layers=1, num_decoder_layers=1)
    model = random_checkpoint(EncoderDecoder, config, vocabulary=ByteVocabulary())
    write_checkpoint(model, str(folder / "model"), "native")
    for split in ("train", "validation"):
        (folder / f"{split}.csv").write_text("claim,label\n" + "".join(f"{x * 3},{x}\n" for x in "abab"))
    return folder


def run(folder, *flags):
    files = [f"--gin.{split.upper()}_FILE='{folder / split}.csv'" for split in ("train", "validation")]
    with pytest.raises(SystemExit) as exit:
        main(["--gin_file=gin/runs/finetune.gin", *files, "--gin.LabelledTask.input_template='{claim}'", *flags])
    return exit.value.code


def test_the_shipped_gin_file_fine_tunes_each_seed(folder, capsys):
    out = folder / "out"
    places = (f"--init_from={folder / 'model'}", f"--out_dir={out}", "--seeds=3,5")
    small = ("--gin.FineTuning.batch_size=4", "--gin.FineTuning.lengths={'inputs': 8, 'targets': 4}")
    assert run(folder, *places, *small, "--gin.STEPS=2", "--gin.linear.warmup_steps=1") == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seeds"] == [3, 5]
    assert set(summary["scores"]["validation"]) == {"accuracy", "macro_f1"}
    lines = [json.loads(line) for line in (out / "seed_5/predictions-validation.jsonl").read_text().splitlines()]
    assert [line["target"] for line in lines] == list("abab")
    assert "STEPS = 2" in (out / "config.gin").read_text()
    assert "macro_f1" in capsys.readouterr().out


def test_a_mistake_is_one_line(folder, capsys):
    assert run(folder, f"--init_from={folder / 'nothing'}", f"--out_dir={folder / 'other'}") == 2
    error = capsys.readouterr().err
    assert error.startswith("t5x-domain finetune: error: --init_from=")
    assert error.count("\n") == 1
    assert run(folder, f"--init_from={folder / 'model'}", f"--out_dir={folder / 'other'}", "--seeds=one") == 2
    assert "--seeds=one: write numbers with commas between them" in capsys.readouterr().err
    assert run(folder, f"--init_from={folder / 'model'}", f"--out_dir={folder / 'model'}") == 2
    assert "holds something else; name another folder" in capsys.readouterr().err
