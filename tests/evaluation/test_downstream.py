"""Tasks put to a model that answers by rote: which text is asked, how the answer is read, and how it is scored."""

import dataclasses
import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest

from t5x_domain.data.labelled import LabelledTask, SeqioTask
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.evaluation import downstream
from t5x_domain.evaluation.downstream import TaskEvaluation
from t5x_domain.inference import answering

VOCABULARY = ByteVocabulary()


class Rote:
    """Stands for the model, the generator and the scorer: its ids are bytes, its answers are looked up."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def inputs(self, text):
        return VOCABULARY.encode(text)

    targets = inputs

    def generator(self, model, decoding, *, batch_size):
        def write(inputs, *, params):
            assert params is None
            self.asked += [(VOCABULARY.decode(ids), decoding.max_tokens, batch_size) for ids in inputs]
            return [[SimpleNamespace(text=self.answers[VOCABULARY.decode(ids)])] for ids in inputs]

        return write

    def scorer(self, model, *, batch_size):
        return self

    def choose(self, inputs, choices, *, params):
        return np.array(
            [[float(choice == self.answers[VOCABULARY.decode(ids)]) for choice in choices] for ids in inputs]
        )

    def __call__(self, inputs, targets):
        return np.array([[-float(len(target)), len(target)] for target in targets])


@pytest.fixture
def rote(monkeypatch):
    model = Rote({})
    monkeypatch.setattr(answering, "Generator", model.generator)
    monkeypatch.setattr(answering, "Scorer", model.scorer)
    return model


def task(folder, kind, records, **more):
    path = folder / f"{kind}.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps(record) for record in records).encode()))
    return LabelledTask(kind, {"train": str(path), "validation": str(path)}, kind=kind, **more)


def test_classification_is_by_rank(tmp_path, rote):
    records = [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}, {"text": "c", "label": "no"}]
    rote.answers = {"a": "yes", "b": "no", "c": "yes"}
    scores = TaskEvaluation([task(tmp_path, "classification", records)]).scores(rote)
    # Both labels have F1 2/3: yes 2 * 1 / (1 + 2), no 2 * 1 / (2 + 1).
    expected = {"accuracy": pytest.approx(2 / 3), "macro_f1": pytest.approx(2 / 3), "examples": 3}
    assert scores == {"classification": expected}
    assert rote.asked == []


def test_text_is_written(tmp_path, rote):
    records = [{"text": "2 + 2", "label": "four"}, {"text": "2 + 3", "label": "five"}]
    rote.answers = {"sum: 2 + 2": "Four.", "sum: 2 + 3": ""}
    evaluation = TaskEvaluation(
        [task(tmp_path, "text_to_text", records, input_template="sum: {text}")],
        decoding=downstream.Decoding(max_tokens=5),
        batch_size=2,
    )
    assert evaluation.scores(rote) == {"text_to_text": {"exact_match": 0.5, "token_f1": 0.5, "examples": 2}}
    assert rote.asked == [("sum: 2 + 2", 5, 2), ("sum: 2 + 3", 5, 2)]


def test_answers_are_compared_with_all_that_are_right(tmp_path, rote):
    records = [{"text": "when", "label": ["in 1999", "1999"]}, {"text": "who", "label": []}]
    rote.answers = {"when": "1999", "who": "nobody"}
    scores = TaskEvaluation([task(tmp_path, "spans", records)]).scores(rote)
    assert scores["spans"] == {"span_exact_match": 0.5, "span_f1": 0.5, "examples": 2}


@pytest.mark.parametrize(
    ("written", "f1"),
    [
        ("O B-X I-X", 1.0),
        ("O B-X I-X O O", 1.0),  # too many: the rest is not looked at
        ("O B-X", 0.0),  # too few: the last word is O, so that the entity ends too early
        ("O B-X nonsense", 0.0),
        ("", 0.0),
    ],
)
def test_written_tags_are_made_to_fit(tmp_path, rote, written, f1):
    rote.answers = {"the zinc finger": written}
    records = [{"text": "the zinc finger", "label": "O B-X I-X"}]
    assert TaskEvaluation([task(tmp_path, "tagging", records)]).scores(rote)["tagging"]["entity_f1"] == f1


def test_pairs_are_found_among_all_that_belong_to_any(tmp_path, rote, monkeypatch):
    records = [{"text": "a", "label": "x"}, {"text": "a", "label": "y"}, {"text": "b", "label": "x"}]
    vectors = {"a": [1, 0], "b": [0, 1], "x": [3, 1], "y": [1, 3]}  # a is nearer to x, b to y
    monkeypatch.setattr(
        downstream, "Embedder", lambda model, *, batch_size: lambda texts: np.array([vectors[text] for text in texts])
    )
    scores = TaskEvaluation([task(tmp_path, "pairs", records)]).scores(rote)["pairs"]
    # Of two texts, a finds one of its two first, b its only one second.
    assert scores["recall@1"] == pytest.approx((1 / 2 + 0) / 2)
    assert scores["mrr"] == pytest.approx((1 + 1 / 2) / 2)
    assert scores["examples"] == 3


def test_tasks_that_cannot_be_asked_are_refused(tmp_path):
    records = [{"text": "a", "label": "b"}]
    without = LabelledTask("unlabelled", {"validation": str(tmp_path / "none.jsonl.gz")})
    with pytest.raises(UserError, match="'unlabelled' has no training split to find labels in"):
        TaskEvaluation([without])
    with pytest.raises(UserError, match="'unlabelled' has no training split to find labels in"):
        TaskEvaluation([dataclasses.replace(without, kind="tagging", metrics=None)])  # every tag would become O
    twice = task(tmp_path, "text_to_text", records)
    with pytest.raises(UserError, match="'text_to_text' twice"):
        TaskEvaluation([twice, twice])


def test_a_seqio_task_is_scored_by_its_own_metric_functions(rote):
    import seqio
    import tensorflow as tf

    def dataset(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices({"inputs": ["one", "two", "three"], "targets": ["1", "2", "33"]})

    def share_right(targets, predictions):  # the postprocessor doubles both
        assert targets == ["11", "22", "3333"]
        return {"share_right": float(np.mean([t == p for t, p in zip(targets, predictions, strict=True)]))}

    def mean_score(targets, scores):
        return {"mean_score": float(np.mean(scores))}

    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
    seqio.TaskRegistry.add(
        "counting_for_downstream",
        source=seqio.FunctionDataSource(dataset, splits=["validation"]),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"inputs": feature, "targets": feature},
        postprocess_fn=lambda text, example=None, is_target=False: text * 2,
        metric_fns=[share_right, mean_score],
    )
    rote.answers = {"one": "1", "two": "2", "three": "3"}
    scores = TaskEvaluation([SeqioTask("counting_for_downstream")]).scores(rote)
    # Two of three are right; the stand-in gives a target -1 for each of its bytes: -(1 + 1 + 2) / 3.
    expected = {"share_right": pytest.approx(2 / 3), "mean_score": pytest.approx(-4 / 3), "examples": 3}
    assert scores == {"counting_for_downstream": expected}

    def fails(targets, predictions):
        raise ValueError("no such label")

    seqio.TaskRegistry.add(
        "failing_for_downstream",
        source=seqio.FunctionDataSource(dataset, splits=["validation"]),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"inputs": feature, "targets": feature},
        metric_fns=[fails],
    )
    with pytest.raises(UserError, match="failing_for_downstream' cannot be evaluated: .*no such label"):
        TaskEvaluation([SeqioTask("failing_for_downstream")]).scores(rote)
