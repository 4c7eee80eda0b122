"""What fine-tuning takes of a model that replaced-token detection has trained."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_models import random_checkpoint

from t5x_domain.adaptation.finetune_config import FineTuning
from t5x_domain.adaptation.finetuning import SeedRun
from t5x_domain.conversion.formats import write_checkpoint
from t5x_domain.conversion.layout import leaves
from t5x_domain.conversion.rtd import discriminator
from t5x_domain.data.labelled import LabelledTask
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.inference.opened import open_model
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.heads import head
from t5x_domain.models.names import path_name
from t5x_domain.models.rtd import ReplacedTokenDetection
from t5x_domain.training.checkpoint import Checkpoints
from t5x_domain.training.optimizer import AdamW, Updates
from t5x_domain.training.schedule import constant

CONFIG = ModelConfig(
    vocab_size=384,
    embed_dim=16,
    mlp_dim=32,
    num_heads=2,
    head_dim=8,
    num_encoder_layers=2,
    num_decoder_layers=0,
    norm_placement="post",
    embedding_norm=True,
    position="learned",
    rtd_embedding_sharing="gdes",
    dtype="float32",
)


def tuning(folder: Path) -> FineTuning:
    """How it is fine-tuned does not matter here."""
    (folder / "train.csv").write_text("text,label\na,a\nb,b\n")
    return FineTuning(
        task=LabelledTask(name="letters", files={"train": str(folder / "train.csv")}),
        init_from=str(folder / "pretrained"),
        out_dir=str(folder / "out"),
        updates=Updates(AdamW(), constant(0.01)),
        steps=1,
        lengths={"inputs": 8, "targets": 4},
    )


@pytest.mark.parametrize(("kind", "labels"), [("classification", 3), ("tagging", 5), ("spans", None), ("pairs", None)])
def test_every_head_starts_from_a_discriminator_to_the_bit(tmp_path, kind, labels):
    """All of the encoder, and its table as it was used: the generator's plus the difference."""
    checkpoint = random_checkpoint(ReplacedTokenDetection, CONFIG, vocabulary=ByteVocabulary())
    write_checkpoint(checkpoint, str(tmp_path / "pretrained"), "native")
    model = open_model(str(tmp_path / "pretrained"))
    form = SimpleNamespace(model_class=head(kind, num_labels=labels), loss=None)
    run = SeedRun(tuning(tmp_path), model, form, {"train": []}, 0, tmp_path / "out")
    state, _, _ = run._start(Checkpoints(tmp_path / "out" / "checkpoints"))
    found = {path_name(p): np.asarray(a) for p, a in jax.tree_util.tree_flatten_with_path(state.params)[0]}
    shared, delta = (checkpoint.tensors[name].read() for name in ("generator/embedding/embedding", "embedding_delta"))
    np.testing.assert_array_equal(found["embedding/embedding"], shared + delta)
    wanted = discriminator(checkpoint).tensors
    parts = {leaf.name: leaf.parts[0] for leaf in leaves(form.model_class, model.blueprint.config)}
    assert set(wanted) == {parts[name] for name in found if not name.startswith("head/")}
    for name, value in found.items():
        if not name.startswith("head/"):
            np.testing.assert_array_equal(value, wanted[parts[name]].read())
