import dataclasses
import json
import re

import numpy as np
import pytest
from small_models import random_checkpoint

from t5x_domain import cli, compare
from t5x_domain.conversion.formats import write_checkpoint
from t5x_domain.data.labelled import LabelledTask
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Corpus
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary, train_sentencepiece
from t5x_domain.errors import UserError
from t5x_domain.evaluation import asking
from t5x_domain.evaluation.document_scores import corrupted, hidden_words, written_on
from t5x_domain.evaluation.fine_tuned import FineTuned
from t5x_domain.evaluation.head_to_head import HeadToHead, head_to_head, prepare_task
from t5x_domain.inference.decoding import Decoding
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder
from t5x_domain.models.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=384,
    embed_dim=8,
    mlp_dim=12,
    num_heads=2,
    head_dim=4,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dtype="float32",
)
WORDS = "the router forwards each packet to its next hop unless a rule of the table says otherwise and then drops it"
BYTES = ByteVocabulary()


def write_model(folder, seed, *, model=EncoderDecoder, vocabulary=BYTES):
    config = dataclasses.replace(CONFIG, num_encoder_layers=0) if model is DecoderOnly else CONFIG
    write_checkpoint(random_checkpoint(model, config, seed=seed, vocabulary=vocabulary), str(folder), "native")
    return str(folder)


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of a classification task, a writing task and a corpus."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    files = {"split": folder}
    for split, count in (("train", 6), ("validation", 4), ("test", 8)):
        records = [{"text": f"{split} {i} word", "label": ("no", "yes")[i % 2], "same": "no"} for i in range(count)]
        files[split] = write_lines(folder / f"{split}.jsonl", records)
    documents = [{"text": " ".join(random.permutation(WORDS.split()))} for _ in range(5)]
    files["corpus"] = write_lines(folder / "corpus.jsonl", [*documents, {"text": "too short"}])
    return files


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [write_model(folder / name, seed) for seed, name in enumerate(("base", "adapted"))]


def make_task(data, name="claims", **more):
    return LabelledTask(name, {split: data[split] for split in ("train", "validation", "test")}, **more)


def make_corpus(data, name="rfc"):
    return Corpus(name, JsonlSource({"validation": data["corpus"]}))


def settings(data, out_dir, **more):
    arguments = {
        "tasks": [make_task(data), make_task(data, "writing", kind="text_to_text")],
        "templates": {"claims": ["Q: {text}\nA:"]},
        "shots": 1,
        "num_few_shot_draws": 2,
        "decoding": Decoding(max_tokens=3),
        "domain_corpora": [make_corpus(data)],
        "resamples": 200,
    }
    return HeadToHead(str(out_dir), **(arguments | more))


def read_kept(folder, name):
    return json.loads((folder / f"answers/{name}.json").read_text())["result"]


def test_both_models_are_asked_and_a_second_start_asks_nothing(data, models, tmp_path, monkeypatch):
    wanted = settings(data, tmp_path)
    report = head_to_head(wanted, *models)
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    claims, writing = verdict["tasks"]
    assert (claims["items"], claims["metric"], writing["metric"]) == (8, "accuracy", "exact_match")
    assert claims["prompts"]["base"]["tried"] == 4  # two templates, two draws
    assert writing["prompts"]["adapted"]["tried"] == 2
    (rfc,) = verdict["perplexity"]
    assert (rfc["documents"], rfc["measure"]) == (5, "nats_per_token")
    assert rfc["perplexity"]["base"] != rfc["perplexity"]["adapted"]
    assert report.read_text().startswith("<!DOCTYPE html>")
    for role in ("base", "adapted"):  # each model answers the test items with the prompt it did best with
        accuracy = [
            np.mean([said == target for said, target in zip(kept, ["no", "yes"] * 2, strict=True)])
            for kept in (read_kept(tmp_path, f"{role}/claims/validation-{number}") for number in range(4))
        ]
        assert [path.name for path in (tmp_path / f"answers/{role}/claims").glob("test-*")] == [
            f"test-{np.argmax(accuracy)}.json"
        ]

    def refuse(*args, **kwargs):
        raise AssertionError("a model was opened")

    monkeypatch.setattr(asking, "open_model", refuse)
    head_to_head(dataclasses.replace(wanted, resamples=300, confidence=0.9), *models)
    again = json.loads((tmp_path / "verdict.json").read_text())
    assert again["method"]["resamples"] == 300
    assert [entry["base"] for entry in again["tasks"]] == [entry["base"] for entry in verdict["tasks"]]
    with pytest.raises(UserError, match="another comparison: shots was 1, is 2"):
        head_to_head(dataclasses.replace(wanted, shots=2), *models)
    with pytest.raises(UserError, match="another comparison: base was"):
        head_to_head(wanted, *reversed(models))


def test_kept_answers_to_other_data_are_refused(tmp_path):
    kept = asking.Kept(tmp_path, {})
    assert kept.result("base/task/test-0", ["a"], lambda: ["yes"]) == ["yes"]
    assert kept.result("base/task/test-0", ["a"], lambda: ["no"]) == ["yes"]
    with pytest.raises(UserError, match="the data has changed"):
        kept.result("base/task/test-0", ["b"], lambda: ["no"])


def test_models_of_different_vocabularies_are_compared_in_bits_per_byte(data, models, tmp_path):
    train_sentencepiece([WORDS] * 5, str(tmp_path / "own.model"), 290)
    own = write_model(tmp_path / "own", 3, vocabulary=Vocabulary(str(tmp_path / "own.model"), extra_ids=20))
    head_to_head(settings(data, tmp_path / "out", tasks=[], templates={}), models[0], own)
    verdict = json.loads((tmp_path / "out/verdict.json").read_text())
    assert verdict["perplexity"][0]["measure"] == "bits_per_byte"
    assert verdict["perplexity"][0]["perplexity"] is None
    assert any("different vocabularies" in note for note in verdict["notes"])


def test_decoders_alone_write_the_documents_on(data, tmp_path):
    paths = [write_model(tmp_path / name, seed, model=DecoderOnly) for seed, name in enumerate("ab")]
    head_to_head(settings(data, tmp_path / "out", tasks=[], templates={}), *paths)
    (rfc,) = json.loads((tmp_path / "out/verdict.json").read_text())["perplexity"]
    assert rfc["measure"] == "nats_per_token"
    with pytest.raises(UserError, match="one fills blanks, the other writes on"):
        head_to_head(settings(data, tmp_path / "out2"), paths[0], write_model(tmp_path / "t5", 0))


def test_hidden_words_are_the_same_whatever_the_vocabulary(tmp_path):
    train_sentencepiece([WORDS] * 5, str(tmp_path / "own.model"), 290)
    own = Vocabulary(str(tmp_path / "own.model"), extra_ids=20)

    def hidden(vocabulary):
        asked = hidden_words(WORDS, vocabulary, [0, 1])
        parts = vocabulary.decode(asked.targets).split("<extra_id_")
        return [part.split(">")[1].split() for part in parts[1:]], asked.num_bytes

    (words, num_bytes), again = hidden(BYTES), hidden(own)
    assert (words, num_bytes) == again
    assert [len(span) for span in words] == [2, 2]  # of 21 words: blocks of 14 and 7
    assert num_bytes == sum(len(f" {' '.join(span)}") for span in words)
    assert all(f" {' '.join(span)}" in f" {WORDS}" for span in words)
    # With bytes nothing but the sentinels stands between what is shown: no word is joined to the next.
    shown = re.sub("<extra_id_.>", " HIDDEN", BYTES.decode(hidden_words(WORDS, BYTES, [0, 1]).inputs))
    assert len(shown.split()) == len(WORDS.split()) - 2 * 2 + 2


def test_corrupted_documents_depend_on_the_seed_alone_and_lose_nothing():
    first, same, other = (corrupted(WORDS, BYTES, [seed, 5]) for seed in (0, 0, 1))
    assert first.inputs.tolist() == same.inputs.tolist() != other.inputs.tolist()
    sentinels = BYTES.vocab_size - BYTES.num_sentinels
    ordinary = sum(int(np.sum((ids < sentinels) & (ids != BYTES.eos_id))) for ids in first[:2])
    assert ordinary == len(WORDS)
    assert first.num_bytes == round(0.15 * len(WORDS))
    assert len(written_on(WORDS, BYTES).inputs) == 0
    assert written_on("né", BYTES).num_bytes == 3


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"kind": "tagging", "target_field": "text"}, "of kind 'tagging' cannot be prompted"),
        ({"target_field": "same"}, "has 1 label to choose from"),
        ({"input_template": "{nothing}"}, "no field 'nothing'"),
    ],
)
def test_tasks_that_cannot_be_prompted_are_refused(data, tmp_path, more, said):
    with pytest.raises(UserError, match=said):
        prepare_task(settings(data, tmp_path), make_task(data, **more))


def test_a_task_without_enough_to_test_on_and_unknown_metrics_are_refused(data, tmp_path):
    part = LabelledTask("part", {"train": data["train"], "validation": data["validation"]})
    with pytest.raises(UserError, match="task 'part' has no split 'test'"):
        prepare_task(settings(data, tmp_path), part)
    one = write_lines(tmp_path / "one.jsonl", [{"text": "a", "label": "no"}])
    with pytest.raises(UserError, match="task 'part': 1 test item cannot tell two models apart"):
        prepare_task(settings(data, tmp_path), dataclasses.replace(part, files={**part.files, "test": one}))
    wanted = settings(data, tmp_path, metrics={"claims": ["beauty"]})
    with pytest.raises(UserError, match="metric 'beauty' cannot be resampled"):
        prepare_task(wanted, wanted.tasks[0])
    wanted = settings(data, tmp_path, templates={"claims": ["{inputs} is {label}"]})
    with pytest.raises(UserError, match="tells the answer"):
        prepare_task(wanted, wanted.tasks[0])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tasks": [], "templates": {}, "domain_corpora": []}, "nothing to compare"),
        ({"shots": -1}, "HeadToHead.shots = -1"),
        ({"templates": {"claimz": []}}, "names a task 'claimz'"),
    ],
)
def test_settings_nothing_can_be_compared_with_are_refused(data, tmp_path, more, said):
    with pytest.raises(UserError, match=said):
        settings(data, tmp_path, **more)
    with pytest.raises(UserError, match="two corpora have the same name"):
        settings(data, tmp_path, general_corpora=[make_corpus(data)])


def test_a_model_is_not_compared_with_itself(data, models, tmp_path):
    with pytest.raises(UserError, match="are the same model"):
        head_to_head(settings(data, tmp_path), models[0], models[0])


def write_fine_tuning(folder, seeds, prediction):
    for seed in seeds:
        lines = [{"id": f"i{i}", "target": "yes", "prediction": prediction} for i in range(6)]
        write_lines(folder / f"seed_{seed}" / "predictions-test.jsonl", lines)
        write_lines(
            folder / f"seed_{seed}" / "metrics.jsonl", [{"step": s, "loss": s + seed} for s in (1, 2, 3 + seed)]
        )
    return str(folder)


def test_fine_tuned_models_are_read_by_seed_and_curves_averaged(tmp_path):
    base = write_fine_tuning(tmp_path / "base", (0, 10), "no")
    one = FineTuned("claims", base, write_fine_tuning(tmp_path / "adapted", (0, 1), "yes"))
    targets, before, after = one.predictions()
    assert (targets, list(before), list(after)) == (["yes"] * 6, [0, 10], [0, 1])
    assert before[10] == ["no"] * 6
    assert one.curves() == {"claims: training loss": {"base": [(1, 6.0), (2, 7.0)], "adapted": [(1, 1.5), (2, 2.5)]}}


def test_settings_in_which_fine_tunings_differ_are_noted(tmp_path):
    one = FineTuned("claims", *(write_fine_tuning(tmp_path / name, (0, 1), "no") for name in ("base", "adapted")))
    assert one.differences() == []
    for name, steps in (("base", 10), ("adapted", 20)):
        said = {"FineTuning.steps": steps, "FineTuning.init_from": name, "FineTuning.batch_size": 4}
        (tmp_path / name / "finetune.json").write_text(json.dumps(said))
    assert one.differences() == ["FineTuning.steps"]


def test_predictions_may_hold_any_character(tmp_path):
    said = "one\u2028two\x85three"  # where str.splitlines would break the line
    one = FineTuned("t", *(write_fine_tuning(tmp_path / name, (0, 1), said) for name in ("base", "adapted")))
    for path in tmp_path.rglob("predictions-test.jsonl"):  # as `finetune` writes it
        lines = [json.dumps(json.loads(line), ensure_ascii=False) for line in path.read_bytes().splitlines()]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert one.predictions()[1][0] == [said] * 6


def test_fine_tunings_that_cannot_be_compared_are_refused(tmp_path):
    base = write_fine_tuning(tmp_path / "base", (0, 1), "no")
    with pytest.raises(UserError, match="no folder seed_K"):
        FineTuned("t", base, str(tmp_path)).predictions()
    other = write_fine_tuning(tmp_path / "other", (0, 1), "no")
    write_lines(tmp_path / "other/seed_1/predictions-test.jsonl", [{"id": "i0", "target": "a", "prediction": "a"}])
    with pytest.raises(UserError, match="seed_1/predictions-test.jsonl: its items or targets are not those"):
        FineTuned("t", base, other).predictions()
    (tmp_path / "other/seed_1/predictions-test.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(UserError, match="line 1: no object with id, target and prediction"):
        FineTuned("t", base, other).predictions()
    with pytest.raises(UserError, match="predictions-validation.jsonl is missing"):
        FineTuned("t", base, other, split="validation").predictions()


def test_verb_compares_as_the_gin_file_says(data, models, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(cli.VERBS, "compare", "whether an adapted model beats its base")
    files = {split: data[split] for split in ("train", "validation", "test")}

    def run(base, adapted):
        flags = [f"--base={base}", f"--adapted={adapted}", f"--out_dir={tmp_path}", "--gin_file=gin/runs/compare.gin"]
        task = [
            "--gin.TASKS=[@LabelledTask()]",
            "--gin.LabelledTask.name='claims'",
            f"--gin.LabelledTask.files={files!r}",
        ]
        with pytest.raises(SystemExit) as stopped:
            compare.main([*flags, *task, "--gin.HeadToHead.shots=0", "--gin.HeadToHead.resamples=200"])
        printed = capsys.readouterr()
        return stopped.value.code, printed.out, printed.err

    status, _, said = run(tmp_path / "none", models[1])
    assert status == 2
    assert "--base=" in said
    assert "Traceback" not in said
    status, said, _ = run(*models)
    assert status == 0
    assert "tied" in said
    assert (tmp_path / "verdict.json").exists()
