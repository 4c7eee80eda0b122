"""A fine-tuned head that is read back says what fine-tuning wrote down."""

import json
import shutil

import numpy as np
import pytest

from t5x_domain.adaptation.finetuning import finetune
from t5x_domain.data.labelled import LabelledTask
from t5x_domain.errors import UserError
from t5x_domain.inference.embedding import Embedder
from t5x_domain.inference.heads import Predictor, has_head, open_head
from t5x_domain.inference.opened import open_model
from t5x_domain.models.assemblies import EncoderDecoder
from tests.adaptation.test_finetuning import KINDS, folder, tuning  # noqa: F401

RECORDS = {
    **KINDS,
    "classification": [{"text": word, "label": word[0]} for word in ("aaaa", "bbbb", "aaa", "bbb", "aa")],
    # The last answer is cut off, and one text has none.
    "spans": [*KINDS["spans"], {"text": "a c", "label": []}, {"text": "a c a c a b", "label": ["b"]}],
}


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory):  # noqa: F811
    """For each kind the folder of a model, and the lines that fine-tuning wrote."""
    found = {}
    for kind, records in RECORDS.items():
        place = tmp_path_factory.mktemp(kind)
        file = place / "data.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        its = LabelledTask(name=kind, kind=kind, files={"train": str(file), "test": str(file)})
        settings = {"task": its, "head": "task", "steps": 40, "dropout_rate": 0.0, "batch_size": 8}
        assert finetune(tuning(folder, place / "out", EncoderDecoder, **settings)) == 0
        lines = (place / "out/seed_0/predictions-test.jsonl").read_text().splitlines()
        found[kind] = place / "out/seed_0/model", [json.loads(line)["prediction"] for line in lines]
    return found


@pytest.mark.parametrize("kind", ["classification", "tagging", "spans"])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_predictions_are_those_of_fine_tuning(tuned, kind, batch_size):
    path, written = tuned[kind]
    assert len({str(prediction) for prediction in written}) > 1  # or a constant would do
    headed = open_head(str(path))
    assert (headed.kind, headed.length) == (kind, 8)
    assert Predictor(headed, batch_size=batch_size)([record["text"] for record in RECORDS[kind]]) == written


def test_nothing_asked_is_nothing_answered(tuned):
    assert Predictor(open_head(str(tuned["tagging"][0])))([]) == []


def test_a_model_fine_tuned_on_pairs_embeds_by_its_projection(tuned):
    path, written = tuned["pairs"]
    texts, positives = ([record[side] for record in RECORDS["pairs"]] for side in ("text", "label"))
    headed = open_head(str(path))
    embed = Embedder(headed.model)
    nearest = (embed(texts) @ embed(positives).T).argmax(axis=1)
    assert [positives[i] for i in nearest] == written
    assert np.abs(embed(texts) - Embedder(open_model(str(path)))(texts)).max() > 1e-3  # it has learnt
    with pytest.raises(UserError, match="makes embeddings and predicts nothing; use --embed"):
        Predictor(headed)


def test_a_head_that_is_missing_damaged_or_of_another_model_is_refused(tuned, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(tuned["classification"][0], path)
    file = path / "head.npz"
    whole = file.read_bytes()
    with np.load(file) as stored:
        arrays = dict(stored)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="head.npz: damaged or not a head"):
        open_head(str(path))
    changes = [
        ({"kind": "ranking"}, "a head of kind 'ranking' is not known"),
        ({"labels": np.array(["a", "b", "c"])}, r"head/bias is \(2,\), not \(3,\)"),
        ({"kernel": arrays["kernel"][:5]}, r"head/kernel is \(5, 2\), not \(16, 2\)"),
    ]
    for change, said in changes:
        np.savez(file, **{**arrays, **change})
        with pytest.raises(UserError, match=said):
            open_head(str(path))
    for lacking, said in (("length", "damaged or not a head"), ("bias", "head/bias is missing")):
        np.savez(file, **{name: array for name, array in arrays.items() if name != lacking})
        with pytest.raises(UserError, match=said):
            open_head(str(path))
    assert has_head(str(path))
    file.unlink()
    assert not has_head(str(path))
    with pytest.raises(UserError, match="has no head.npz"):
        open_head(str(path))
