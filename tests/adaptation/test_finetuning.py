"""A tiny model of bytes learns to tell texts apart: by writing the label, by a head, adapted, interrupted."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import random_checkpoint

from t5x_domain.adaptation import finetuning
from t5x_domain.adaptation.finetune_config import FineTuning
from t5x_domain.adaptation.finetuning import Record, batch_positions, finetune
from t5x_domain.adaptation.lora import Lora
from t5x_domain.conversion.formats import open_checkpoint, write_checkpoint
from t5x_domain.conversion.tensors import Tensor
from t5x_domain.data.labelled import LabelledTask
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.inference.decoding import Decoding
from t5x_domain.inference.opened import open_model
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder, EncoderOnly
from t5x_domain.models.config import ModelConfig
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.training.checkpoint import Checkpoints
from t5x_domain.training.optimizer import AdamW, Updates
from t5x_domain.training.schedule import constant

CONFIG = ModelConfig(
    vocab_size=384,
    embed_dim=16,
    mlp_dim=32,
    num_heads=2,
    head_dim=8,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dtype="float32",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of small random numbers, and a task: is it a text of a's or of b's?"""
    folder = tmp_path_factory.mktemp("finetuning")
    for model in (EncoderDecoder, DecoderOnly, EncoderOnly):
        checkpoint = random_checkpoint(model, CONFIG, vocabulary=ByteVocabulary())
        rng = np.random.default_rng(0)
        tensors = {
            name: tensor
            if name.endswith("scale")
            else Tensor.of((rng.standard_normal(tensor.shape) * tensor.shape[-1] ** -0.5).astype(np.float32))
            for name, tensor in checkpoint.tensors.items()
        }
        write_checkpoint(dataclasses.replace(checkpoint, tensors=tensors), str(folder / model.__name__), "native")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("validation", 8), ("test", 6)):
        lines = ["text,label"]
        for number in range(count):
            letter = "ab"[number % 2]
            lines.append(f"{''.join(rng.choice([letter, 'c'], 6, p=[0.8, 0.2]))},{letter * 2}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


def task(folder, splits=("train", "validation", "test"), **fields):
    return LabelledTask(**{"name": "letters", "files": {s: str(folder / f"{s}.csv") for s in splits}, **fields})


def tuning(folder, out, model=EncoderDecoder, **fields):
    defaults = {
        "task": task(folder),
        "init_from": str(folder / model.__name__),
        "out_dir": str(out),
        "updates": Updates(AdamW(), constant(0.01)),
        "steps": 12,
        "batch_size": 8,
        "lengths": {"inputs": 8, "targets": 4},
        "eval_every": 4,
        "decoding": Decoding(max_tokens=4),
        "mesh": MeshShape(data=8),
    }
    return FineTuning(**{**defaults, **fields})


class Notice:
    """Tells to stop after so many steps."""

    def __init__(self, after):
        self.left = after

    def poll(self):
        self.left -= 1
        return self.left <= 0

    def close(self):
        pass


def files(folder: Path) -> dict[str, bytes]:
    """What a seed leaves behind, but for TensorBoard's and Orbax's records of time."""
    names = ("*.jsonl", "scores.json", "summary.json")
    return {str(path.relative_to(folder)): path.read_bytes() for name in names for path in sorted(folder.rglob(name))}


def weights(path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_checkpoint(str(path)).tensors.items()}


@given(st.integers(0, 5), st.integers(1, 40), st.integers(1, 50))
def test_every_epoch_has_each_example_once(seed, batch_size, num_examples):
    steps = -(-2 * num_examples // batch_size)
    stream = [batch_positions(seed, s, batch_size=batch_size, num_examples=num_examples) for s in range(steps)]
    assert all(len(batch) == batch_size for batch in stream)
    flat = np.concatenate(stream)
    for epoch in (0, 1):
        assert sorted(flat[epoch * num_examples : (epoch + 1) * num_examples]) == list(range(num_examples))


def test_orders_differ_by_seed_and_epoch():
    orders = [batch_positions(s, e, batch_size=50, num_examples=50).tolist() for s in (0, 1) for e in (0, 1)]
    assert len(set(map(tuple, orders))) == 4


def test_the_first_of_equally_good_evaluations_is_best():
    record = Record()
    assert [record.improved(step, value) for step, value in enumerate([0.1, 0.4, 0.4, 0.3])] == [1, 1, 0, 0]
    assert record == Record(best_step=1, best_score=0.4, stale=2)


@pytest.mark.parametrize(("model", "seeds"), [(EncoderDecoder, (0,)), (DecoderOnly, (0, 1))])
def test_a_model_learns_to_write_labels(folder, tmp_path, model, seeds):
    out = tmp_path / "out"
    assert finetune(tuning(folder, out, model, steps=40, eval_every=40, seeds=seeds)) == 0
    summary = json.loads((out / "summary.json").read_text())
    accuracy = summary["scores"]["test"]["accuracy"]
    # Letters are told apart at a glance.
    assert accuracy == {"mean": 1.0, "std": 0.0 if len(seeds) > 1 else None, "values": [1.0] * len(seeds)}
    lines = [json.loads(line) for line in (out / f"seed_{seeds[-1]}/predictions-test.jsonl").read_text().splitlines()]
    assert lines[1] == {"id": "test.csv:3", "target": "bb", "prediction": "bb"}
    assert sorted(path.name for path in (out / "seed_0").glob("predictions*")) == [
        "predictions-test.jsonl",
        "predictions-validation.jsonl",
    ]
    # What was written is a model as any other, and reads inputs as it has learnt to.
    opened = open_model(str(out / "seed_0/model"))
    assert opened.blueprint.model_class is model
    assert opened.reads_whole_inputs
    assert not list((out / "seed_0").glob("checkpoints"))


def test_an_interrupted_seed_goes_on_to_the_same_bits(folder, tmp_path, monkeypatch):
    at_once, halted = tmp_path / "at_once", tmp_path / "halted"
    wanted = tuning(folder, at_once, steps=10, patience=2, dropout_rate=0.3, head="task")
    assert finetune(wanted) == 0

    again = dataclasses.replace(wanted, out_dir=str(halted))
    with monkeypatch.context() as patched:
        patched.setattr(finetuning, "PreemptionNotice", lambda: Notice(after=3))
        assert finetune(again) == finetuning.EXIT_PREEMPTED
    assert not (halted / "summary.json").exists()
    assert list((halted / "seed_0/checkpoints").glob("3"))
    # Killed at step 4, when the best parameters are saved already but the record that says so is not.
    save = Checkpoints.save

    def killed(self, *arguments):
        if self.directory.name == "checkpoints":
            raise KeyboardInterrupt
        return save(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(again)
    assert list((halted / "seed_0/best").glob("4"))
    assert finetune(again) == 0
    assert files(halted) == files(at_once)
    theirs = weights(at_once / "seed_0/model")
    for name, array in weights(halted / "seed_0/model").items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_finished_seeds_stay_and_others_can_be_added(folder, tmp_path, capsys):
    first = tuning(folder, tmp_path / "out", steps=2, eval_every=2, head="task")
    assert finetune(first) == 0
    before = (tmp_path / "out/seed_0/scores.json").stat().st_mtime_ns
    assert finetune(dataclasses.replace(first, seeds=(0, 1))) == 0
    assert "seed 0: finished before" in capsys.readouterr().out
    assert (tmp_path / "out/seed_0/scores.json").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "out/summary.json").read_text())["seeds"] == [0, 1]
    with pytest.raises(UserError, match=r"another configuration: FineTuning.batch_size was 8, is 4. Set --out_dir"):
        finetune(dataclasses.replace(first, batch_size=4))
    with pytest.raises(UserError, match=r"learning rates was \[0.01"):
        finetune(dataclasses.replace(first, updates=Updates(AdamW(), constant(0.02))))


def test_what_defines_a_fine_tuning_tells_warm_ups_and_steps_of_a_run_apart(folder, tmp_path):
    one = tuning(folder, tmp_path / "out", steps=1000)
    model = open_model(one.init_from, mesh=one.mesh)
    data = {"train": one.task.examples("train")}

    def identity(warmup_steps, step):
        described = dataclasses.replace(one, updates=Updates(AdamW(), constant(0.01, warmup_steps)))
        return described.identity(dataclasses.replace(model, facts={"step": step}), data)

    assert identity(50, 7) == identity(50, 7)
    # Both begin at 0 and have ended their warm-up at the half; the means are 0.01 * (1 - (w + 1) / 2 / 1000).
    assert identity(50, 7)["mean learning rate"] == pytest.approx(0.01 * (1 - 0.0255))
    assert identity(100, 7)["mean learning rate"] == pytest.approx(0.01 * (1 - 0.0505))
    assert identity(50, 7) != identity(50, 8)


def test_early_stopping_keeps_the_best(folder, tmp_path, monkeypatch):
    """Learning at a rate of 0 never improves on the first evaluation: two more, and it is over, interrupted or not."""
    still = tuning(
        folder,
        tmp_path / "out",
        head="task",
        updates=Updates(AdamW(), constant(0.0)),
        steps=50,
        eval_every=1,
        patience=2,
    )
    with monkeypatch.context() as patched:
        patched.setattr(finetuning, "PreemptionNotice", lambda: Notice(after=2))
        assert finetune(still) == finetuning.EXIT_PREEMPTED
    assert finetune(still) == 0
    evaluations = (tmp_path / "out/seed_0/evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in evaluations] == [1, 2, 3]
    theirs = weights(folder / "EncoderDecoder")
    for name, array in weights(tmp_path / "out/seed_0/model").items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_the_metric_says_which_way_is_better(folder, tmp_path, monkeypatch):
    def kept(name, scores, **fields):
        said = iter([*scores, 0.0, 0.0])  # two evaluations, then what is kept is scored on both splits
        monkeypatch.setattr(LabelledTask, "score", lambda *_: {"error": next(said)})
        finetune(tuning(folder, tmp_path / name, head="task", steps=2, eval_every=1, **fields))
        return weights(tmp_path / name / "seed_0/model")["encoder/0/self_attention/inner/query/kernel"]

    lowest = kept("lowest", [0.1, 0.2], lower_is_better=True)
    np.testing.assert_array_equal(lowest, kept("first", [0.2, 0.1]))
    assert not np.array_equal(lowest, kept("highest", [0.1, 0.2]))


def test_a_batch_can_be_learnt_in_parts(folder, tmp_path, monkeypatch):
    asked, make = [], finetuning.make_train_step
    monkeypatch.setattr(finetuning, "make_train_step", lambda *a, **k: asked.append(k) or make(*a, **k))
    finetune(tuning(folder, tmp_path / "out", head="task", steps=1, batch_size=16, accumulation_steps=2))
    assert asked[0]["accumulation_steps"] == 2


def test_a_head_and_low_rank_factors_learn_and_merge(folder, tmp_path):
    lora = tuning(folder, tmp_path / "out", steps=40, eval_every=40, lora=Lora(rank=2), head="task", dropout_rate=0.0)
    assert finetune(lora) == 0
    scores = json.loads((tmp_path / "out/seed_0/scores.json").read_text())
    assert scores["test"] == {"accuracy": 1.0, "macro_f1": 1.0}
    before, after = weights(folder / "EncoderDecoder"), weights(tmp_path / "out/seed_0/model")
    assert sorted(before) == sorted(after)
    changed = sorted(name for name in before if not np.array_equal(before[name], after[name]))
    # Of the encoder only, for the head has no use for the decoder.
    assert changed == [f"encoder/0/self_attention/inner/{name}/kernel" for name in ("query", "value")]
    with np.load(tmp_path / "out/seed_0/model/head.npz") as head:
        assert head["labels"].tolist() == ["aa", "bb"]
        assert {name: head[name].shape for name in ("kernel", "bias")} == {"kernel": (16, 2), "bias": (2,)}


KINDS = {
    # Tag the a's; find the b; find the text that is written with the same letter.
    "tagging": [
        {"text": " ".join(w), "label": [("B-A" if x == "a" else "O") for x in w]} for w in ("abc", "bca", "cab")
    ],
    "spans": [{"text": w, "label": ["b"]} for w in ("a b c", "c a b", "b c a")],
    "pairs": [{"text": 3 * x, "label": 4 * x} for x in "abc"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_head_learns_by_heart(folder, tmp_path, kind):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in KINDS[kind]))
    its = LabelledTask(name=kind, kind=kind, files={"train": str(path), "test": str(path)})
    out = tmp_path / "out"
    assert (
        finetune(tuning(folder, out, EncoderOnly, task=its, head="task", steps=60, dropout_rate=0.0, batch_size=3)) == 0
    )
    scores = json.loads((out / "seed_0/scores.json").read_text())
    assert set(scores["test"].values()) == {1.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 2}, "set one of steps and epochs"),
        ({"steps": None}, "set one of steps and epochs"),
        ({"accumulation_steps": 3}, r"FineTuning.accumulation_steps = 3: batch_size"),
        ({"patience": 0}, r"FineTuning.patience = 0: it must be above 0"),
        ({"head": "tex"}, r"FineTuning.head = 'tex': choose 'text' or 'task'"),
        ({"seeds": (1, 1)}, r"FineTuning.seeds = \[1, 1\]: give different numbers"),
        ({"lengths": {"inputs": 8}}, r"FineTuning.lengths: 'targets' must be at least 2"),
        ({"lora": Lora(), "freeze_layers": 1}, r"FineTuning.lora freezes the whole model"),
    ],
)
def test_values_that_no_finetuning_can_have_are_refused(folder, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        tuning(folder, tmp_path / "out", **fields)


def test_what_does_not_go_together_is_refused(folder, tmp_path):
    only_train = task(folder, splits=("train",))
    one_label = tmp_path / "one.csv"
    one_label.write_text("text,label\na,x\nb,x\n")
    cases = [
        ({"task": only_train, "patience": 1}, r"task 'letters' has no examples in a split 'validation' to stop by"),
        ({"task": task(folder, splits=("test",), labels=("aa", "bb"))}, r"no examples in a split 'train'"),
        ({"task": task(tmp_path, files={"train": str(one_label)})}, r"all training examples are labelled 'x'"),
        ({"model": EncoderOnly}, r"an encoder alone cannot write text; set FineTuning.head = 'task'"),
        ({"model": DecoderOnly, "head": "task"}, r"heads stand on an encoder"),
        ({"task": task(folder, kind="text_to_text"), "head": "task"}, r"no head for text_to_text"),
        ({"task": task(folder, kind="pairs")}, r"pairs cannot be written as text; set 'task'"),
        ({"metric": "bleu"}, r"FineTuning.metric = 'bleu': the task has accuracy, macro_f1"),
    ]
    for fields, message in cases:
        with pytest.raises(UserError, match=message):
            finetune(tuning(folder, tmp_path / "out", **{"head": "task" if "metric" in fields else "text", **fields}))


def test_labels_that_training_lacks_and_long_texts_are_told(folder, tmp_path, capsys):
    test = tmp_path / "test.csv"
    test.write_text("text,label\naaaaaaaaaaaa,aa\nc,cc\n")
    its = task(folder, files={"train": str(folder / "train.csv"), "test": str(test)})
    assert finetune(tuning(folder, tmp_path / "out", task=its, head="task", steps=1)) == 0
    said = capsys.readouterr().out
    assert "test: 1 of 2 examples have labels that training lacks: cc" in said
    assert "test: 1 of 2 examples are longer than {'inputs': 8, 'targets': 4}, hence cut" in said
