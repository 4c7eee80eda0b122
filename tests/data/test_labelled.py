"""Labelled files: what is read, what is refused and where, and the same as SeqIO tasks."""

import csv
import gzip
import io
import json
import sys
import types

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.data.labelled import Labelled, LabelledTask, SeqioTask, register_labelled
from t5x_domain.data.labelled_files import read_records
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError

VOCABULARY = ByteVocabulary(extra_ids=0)


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def in_files(write, **contents):
    """{split: file} with these contents, JSONL."""
    return {split: write(f"{split}.jsonl", jsonl(*records)) for split, records in contents.items()}


# --- reading ---


def test_csv_with_quoted_line_breaks_has_the_right_lines(write):
    path = write("a.csv", 'text,label\r\n"one\r\ntwo, ""2""",x\r\n\r\nthree,y\r\n"a\n\nb",z\nlast,w')
    records = [(line, fields["text"], fields["label"]) for line, fields in read_records(path)]
    assert records == [(2, 'one\ntwo, "2"', "x"), (5, "three", "y"), (6, "a\n\nb", "z"), (9, "last", "w")]


def test_tsv_has_no_quotes(write):
    records = list(read_records(write("a.tsv", 'text\tlabel\n"Oat" cells\tx\n"\ty\n')))
    assert [fields["text"] for _, fields in records] == ['"Oat" cells', '"']


def test_byte_order_mark_is_no_part_of_the_first_field(write):
    assert next(read_records(write("a.csv", b"\xef\xbb\xbftext,label\na,b\n"))).fields == {"text": "a", "label": "b"}


@pytest.mark.parametrize("suffix, compress", [(".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)])
@pytest.mark.parametrize("name, content", [("a.csv", "text,n\nhé,1\n"), ("a.jsonl", '{"text": "hé", "n": "1"}\n')])
def test_compressed_files(write, suffix, compress, name, content):
    assert [fields for _, fields in read_records(write(name + suffix, compress(content.encode())))] == [
        {"text": "hé", "n": "1"}
    ]


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00"), max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=6))
def test_csv_reads_what_python_writes(tmp_path_factory, rows):
    """Also the line numbers: a record begins after all line ends of what stands before it."""
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    buffer, lines = io.StringIO(newline=""), []
    writer = csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(["a", "b"])
    for row in rows:
        lines.append(buffer.getvalue().count("\n") + 1)
        writer.writerow(row)
    path.write_bytes(buffer.getvalue().encode())
    assert [(line, (fields["a"], fields["b"])) for line, fields in read_records(str(path))] == list(
        zip(lines, rows, strict=True)
    )


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.csv", 'text,label\n"a\nb",x\nc\n', r"a\.csv, line 4: 1 columns, but the header names 2"),
        ("a.csv", 'text,label\na,x\n"b,y\nc,z\n', r"a\.csv, line 3: unexpected end of data; mend the quoting"),
        ("a.csv", "text,text\na,x\n", r"a\.csv, line 1: the header names 'text' twice"),
        ("a.tsv", b"text\tlabel\n\xff\tx\n", r"a\.tsv, line 2: not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', r"a\.jsonl, line 3: not JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl, line 1: not a JSON object"),
        ("a.txt", "a\n", r"a\.txt: cannot tell the format"),
        ("a.csv", "", r"a\.csv: the file is empty"),
    ],
)
def test_refuses_damaged_files(write, name, content, said):
    with pytest.raises(UserError, match=said):
        list(read_records(write(name, content)))


# --- tasks ---


def test_one_file_for_all_splits_and_a_template(write):
    path = write("all.tsv", "id\tsplit\tlabel\ttitle\ttext\n1\ttrain\tb\tT\tx\n2\ttest\tc\tU\ty\n3\ttrain\ta\tV\tz\n")
    task = LabelledTask("t", {"train": path, "test": path}, input_template="{title}: {text}", split_field="split")
    assert [(e.id, e.inputs, e.target) for e in task.examples("train")] == [("1", "T: x", "b"), ("3", "V: z", "a")]
    assert task.labels == ("a", "b") and task.metrics == ("accuracy", "macro_f1")
    assert task.unseen_labels("test") == ["c"] and task.absent_labels("test") == ["a", "b"]
    assert task.score(task.examples("train"), ["b", "b"])["accuracy"] == 0.5


def test_declared_labels_keep_their_order_and_bind_training_only(write):
    files = in_files(write, train=[{"text": "t", "label": 1}], test=[{"text": "t", "label": "new"}])
    assert LabelledTask("t", files, labels=["2", "1"]).labels == ("2", "1")
    assert LabelledTask("t", files, labels=["2", "1"]).unseen_labels("test") == ["new"]
    with pytest.raises(UserError, match=r"train\.jsonl, line 1: label '1' is not declared"):
        LabelledTask("t", files, labels=["0"]).examples("train")


def test_targets_of_the_kinds(write):
    tags = in_files(write, train=[{"text": ["In", "Paris"], "label": "O B-loc"}, {"text": "a  b", "label": ["O", "O"]}])
    task = LabelledTask("t", tags, kind="tagging")
    assert [(e.inputs, e.target) for e in task.examples("train")] == [("In Paris", ["O", "B-loc"]), ("a  b", ["O"] * 2)]
    assert task.labels == ("B-loc", "O")
    spans = in_files(write, test=[{"text": "a b", "label": v} for v in ("a", "", [], ["a", "b"])])
    task = LabelledTask("t", spans, kind="spans")
    assert [e.target for e in task.examples("test")] == [["a"], [], [], ["a", "b"]] and task.labels == ()


def test_examples_without_id_are_named_by_file_and_line(write):
    files = {"train": write("a.csv", "text,label\n\nx,y\n")}
    assert LabelledTask("t", files).examples("train") == [Labelled("a.csv:3", "x", "y", {"text": "x", "label": "y"})]


@pytest.mark.parametrize(
    "records, settings, said",
    [
        ([{"text": "a"}], {}, "line 1: there is no field 'label', only text"),
        ([{"label": "a", "text": None}], {}, "line 1: there is no field 'text'"),
        ([{"text": "a", "label": " "}], {}, "line 1: the target, field 'label', is empty"),
        ([{"text": "a", "label": {}}], {}, "line 1: field 'label' is no text but dict"),
        ([{"text": "\ud800", "label": "a"}], {}, "line 1: field 'text' holds half of a surrogate"),
        ([{"text": "a b", "label": "O"}], {"kind": "tagging"}, "line 1: 1 tags for 2 words"),
        ([{"text": "a", "label": 3}], {"kind": "spans"}, "line 1: field 'label' is no answer"),
        ([{"id": 1, "text": "a", "label": "b"}] * 2, {}, "line 2: its id '1' is that of .*line 1"),
        ([{"text": "a", "label": "b"}], {"id_field": "key"}, "line 1: there is no field 'key'"),
        ([{"text": "a", "label": "b", "split": "x"}], {"split_field": "split"}, "no record of split 'train'"),
        ([{"text": "a", "label": "b"}], {"split_field": "split"}, "line 1: there is no field 'split'"),
    ],
)
def test_refuses_bad_records(write, records, settings, said):
    with pytest.raises(UserError, match=said):
        LabelledTask("t", in_files(write, train=records), **settings).examples("train")


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"name": "a-b"}, "LabelledTask.name"),
        ({"kind": "regression"}, "LabelledTask.kind = 'regression'"),
        ({"files": "a.csv"}, "LabelledTask.files = 'a.csv'"),
        ({"input_template": "{text"}, "LabelledTask.input_template"),
        ({"input_template": "{}"}, "write one or more fields"),
        ({"metrics": ["f2"]}, "LabelledTask.metrics has 'f2'"),
        ({"labels": ["a", "a"]}, "each label once"),
    ],
)
def test_refuses_bad_settings(settings, said):
    with pytest.raises(UserError, match=said):
        LabelledTask(**{"name": "t", "files": {"test": "none.csv"}, **settings})


def test_refuses_an_unknown_split(write):
    task = LabelledTask("t", in_files(write, test=[{"text": "a", "label": "b"}]))
    with pytest.raises(UserError, match="no split 'train', only test"):
        task.unseen_labels("test")


# --- SeqIO ---


def evaluated(name, predict):
    """SeqIO's evaluator over the test split, with the texts that `predict` makes of each example as predictions."""
    import seqio

    def predictions(dataset):
        rows = [np.pad(VOCABULARY.encode(text), (0, 16))[:16] for text in predict]
        return list(enumerate(rows))

    evaluator = seqio.Evaluator(name, seqio.EncDecFeatureConverter(pack=False), eval_split="test")
    metrics, _ = evaluator.evaluate(compute_metrics=True, step=0, predict_fn=predictions, score_fn=lambda dataset: None)
    return metrics.result()[name]


def test_seqio_gives_the_same_examples_and_its_evaluator_our_metrics(write):
    import seqio

    records = [{"text": "né", "label": "yes"}, {"text": "b", "label": "no"}, {"text": "c", "label": "no"}]
    files = in_files(write, train=records, test=records)
    task = LabelledTask("labelled_parity", files)
    assert register_labelled(task, VOCABULARY) is register_labelled(LabelledTask("labelled_parity", files), VOCABULARY)
    for lengths, cut in ((None, 99), ({"inputs": 8, "targets": 3}, 2)):
        dataset = seqio.get_mixture_or_task("labelled_parity").get_dataset(lengths, "train", shuffle=False)
        for features, record in zip(dataset.as_numpy_iterator(), records, strict=True):
            np.testing.assert_array_equal(features["inputs"], [*VOCABULARY.encode(record["text"]), 1])
            np.testing.assert_array_equal(features["targets"], [*VOCABULARY.encode(record["label"])[:cut], 1])
    values = evaluated("labelled_parity", ["yes", "no", "yes"])
    assert values == pytest.approx(task.score(task.examples("test"), ["yes", "no", "yes"]))
    assert values["accuracy"] == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="'labelled_parity' already"):
        register_labelled(LabelledTask("labelled_parity", files, metrics=["accuracy"]), VOCABULARY)


def test_seqio_evaluator_of_tags_and_answers(write):
    tags = [{"text": "in Paris", "label": "O B-loc"}, {"text": "Rome", "label": "B-loc"}]
    register_labelled(LabelledTask("tag_parity", in_files(write, train=tags, test=tags), kind="tagging"), VOCABULARY)
    # One of two entities found and none invented: precision 1, recall 1/2. A word too few, an unknown tag.
    assert evaluated("tag_parity", ["O B-loc O", "X"])["entity_f1"] == pytest.approx(2 / 3)
    spans = [{"text": "a b", "label": ["a", "b"]}, {"text": "c", "label": []}]
    register_labelled(LabelledTask("span_parity", in_files(write, test=spans), kind="spans"), VOCABULARY)
    assert evaluated("span_parity", ["b", "c"])["span_exact_match"] == 0.5


def test_a_registered_seqio_task(write):
    import seqio

    dataset = {"inputs": ["q one", "q two"], "targets": ["Yes", "no"]}

    def accuracy(targets, predictions):
        return {"own_accuracy": np.mean([t == p for t, p in zip(targets, predictions, strict=True)])}

    def source(split, shuffle_files, seed=None):
        import tensorflow as tf

        return tf.data.Dataset.from_tensor_slices(dataset)

    feature = seqio.Feature(VOCABULARY.as_seqio(), add_eos=True)
    for name, keep in (("own_task", True), ("own_task_without_text", False)):
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(source, splits=["test"]),
            preprocessors=[
                lambda d, output_features, keep=keep: seqio.preprocessors.tokenize(
                    d, output_features, copy_pretokenized=keep
                ),
                seqio.preprocessors.append_eos,
            ],
            output_features={"inputs": feature, "targets": feature},
            postprocess_fn=lambda text, example, is_target: text.lower(),
            metric_fns=[accuracy],
        )
        task = SeqioTask(name)
        examples = task.examples("test")
        assert [e.id for e in examples] == ["test:1", "test:2"]
        assert [e.inputs for e in examples] == dataset["inputs"] and [e.target for e in examples] == dataset["targets"]
        assert task.score(examples, ["yes", "yes"]) == {"own_accuracy": 0.5}
        assert (task.name, task.kind, task.splits, task.metrics) == (name, "text_to_text", ["test"], ["accuracy"])
    with pytest.raises(UserError, match="no split 'train', only test"):
        SeqioTask("own_task").examples("train")


def test_seqio_task_that_is_not():
    sys.modules["registers_nothing"] = types.ModuleType("registers_nothing")
    with pytest.raises(UserError, match="SeqIO has no task 'nobody'; set SeqioTask.module"):
        SeqioTask("nobody", module="registers_nothing").examples("test")
    with pytest.raises(UserError, match="SeqioTask.module 'not_there' cannot be imported"):
        SeqioTask("nobody", module="not_there").examples("test")
