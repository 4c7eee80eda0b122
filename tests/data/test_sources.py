import gzip
import json
import tracemalloc

import pytest
from bucket import in_memory

from t5x_domain import files
from t5x_domain.data.sources import BadRecord, JsonlSource, ParquetSource, TextSource, TfdsSource, TFRecordSource
from t5x_domain.errors import UserError

bucket = pytest.fixture(in_memory)


def jsonl(path, *records):
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def texts(source, split="train"):
    return [document.text for document in source.documents(split)]


def test_jsonl_documents(tmp_path):
    first = jsonl(
        tmp_path / "a.jsonl", {"text": "one", "id": 1, "tags": ["x"], "nested": {}, "date": None}, b"", {"text": "two"}
    )
    second = jsonl(tmp_path / "b.jsonl", {"text": "three", "score": 0.5})
    documents = list(JsonlSource({"train": [first, second]}).documents("train"))
    assert [document.text for document in documents] == ["one", "two", "three"]
    assert [document.metadata for document in documents] == [{"id": 1, "tags": ["x"]}, {}, {"score": 0.5}]
    assert [document.position for document in documents] == [(0, 1), (0, 3), (1, 1)]
    assert documents[1].place == f"{first}, line 3"


def test_fields_can_be_chosen(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"body": "one", "id": 1, "title": "t"})
    source = JsonlSource({"train": path}, text_field="body", metadata_fields=["title", "missing"])
    (document,) = source.documents("train")
    assert (document.text, document.metadata) == ("one", {"title": "t"})


def test_one_file_with_several_splits(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *({"text": f"{i}", "split": ["train", "test"][i % 3 == 0]} for i in range(6)))
    source = JsonlSource({"train": path, "test": path}, split_field="split")
    assert texts(source) == ["1", "2", "4", "5"]
    assert texts(source, "test") == ["0", "3"]
    assert next(source.documents("test")).metadata == {}
    with pytest.raises(UserError, match="no document in split 'validation'"):
        texts(JsonlSource({"validation": path}, split_field="split"), "validation")


BAD_RECORDS = {
    b'{"text": "a"': "not a JSON object",
    b"[1]": "not a JSON object",
    b'{"text": "\xff"}': "not UTF-8",
    b'{"id": 1}': "there is no field 'text'",
    b'{"text": 3}': "field 'text' is no string but int",
    b'{"text": "\\ud800"}': "field 'text' holds half of a surrogate pair",
    b"[" * 100_000: "not a JSON object",
}


@pytest.mark.parametrize("line, reason", BAD_RECORDS.items(), ids=[str(number) for number in range(len(BAD_RECORDS))])
def test_bad_records_are_named_with_file_and_line(tmp_path, line, reason):
    path = jsonl(tmp_path / "a.jsonl", {"text": "good"}, line, {"text": "last"})
    with pytest.raises(UserError, match=rf"a.jsonl, line 2: {reason}\. .*JsonlSource.skip_bad_records = True"):
        texts(JsonlSource({"train": path}))


def test_bad_records_can_be_skipped_and_are_counted(tmp_path, caplog):
    path = jsonl(tmp_path / "a.jsonl", {"text": "good"}, *BAD_RECORDS, {"text": "last"})
    source = JsonlSource({"train": path}, skip_bad_records=True)
    assert texts(source) == ["good", "last"]
    assert "'not a JSON object': 3" in caplog.text
    bad = [record.reason for record in source.read("train", 0, path) if isinstance(record, BadRecord)]
    assert bad == list(BAD_RECORDS.values())


def test_truncated_files_are_never_skipped(tmp_path):
    whole = gzip.compress("".join(json.dumps({"text": str(i)}) + "\n" for i in range(9999)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="a.jsonl.gz: truncated after line"):
        texts(JsonlSource({"train": str(tmp_path / "a.jsonl.gz")}, skip_bad_records=True))


def test_missing_files_and_splits(tmp_path):
    with pytest.raises(UserError, match="nowhere.*: no such file"):
        texts(JsonlSource({"train": str(tmp_path / "nowhere*.jsonl")}))
    with pytest.raises(UserError, match="JsonlSource.files has no split 'test', only train"):
        texts(JsonlSource({"train": "a"}), "test")


def test_globs_and_relative_paths(tmp_path, monkeypatch):
    for name in ("b", "a"):
        jsonl(tmp_path / f"{name}[1].jsonl", {"text": name})
    monkeypatch.chdir(tmp_path)
    assert texts(JsonlSource({"train": "*.jsonl"})) == ["a", "b"]


def test_shipped_data_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = JsonlSource({"test": "data/sample/general.jsonl.gz"}, split_field="split")
    assert len(texts(source, "test")) > 100


def test_description_does_not_depend_on_the_folder(tmp_path):
    descriptions = []
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        descriptions.append(JsonlSource({"train": jsonl(tmp_path / name / "a.jsonl", {"text": "one"})}).describe())
    assert descriptions[0] == descriptions[1]
    jsonl(tmp_path / "y" / "a.jsonl", {"text": "longer"})
    assert JsonlSource({"train": str(tmp_path / "y" / "a.jsonl")}).describe() != descriptions[0]


def test_constant_memory(tmp_path):
    """20 MB of text go through in less than 6 MB: a few blocks of 1 MiB and their lines."""
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.writelines(json.dumps({"text": "x" * 1000}) + "\n" for _ in range(20_000))
    documents = JsonlSource({"train": str(path)}).documents("train")
    next(documents)
    tracemalloc.start()
    count = sum(1 for _ in documents)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 19_999 and peak < 6e6


@pytest.mark.parametrize(
    "document, expected",
    [
        ("line", ["One.", "Two.", "Three."]),
        ("paragraph", ["One.\nTwo.", "Three."]),
        ("file", ["One.\nTwo.\n \n\nThree."]),
    ],
)
def test_text(tmp_path, document, expected):
    (tmp_path / "a.txt").write_bytes("\ufeff\nOne.\r\nTwo.\n \n\nThree.\n".encode())
    source = TextSource({"train": str(tmp_path / "a.txt")}, document=document)
    documents = list(source.documents("train"))
    assert [document.text for document in documents] == expected
    assert documents[0].metadata == {"file": "a.txt"}
    if document != "file":
        assert [documents[0].position, documents[-1].position] == [(0, 2), (0, 6)]


def test_bad_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\nbad \xff\nline\n\nlast")
    path = str(tmp_path / "a.txt")
    for document in ("line", "paragraph", "file"):
        with pytest.raises(UserError, match="a.txt, line 3: not UTF-8"):
            texts(TextSource({"train": path}, document=document))
    assert texts(TextSource({"train": path}, skip_bad_records=True)) == ["good", "last"]
    with pytest.raises(UserError, match="TextSource.document is 'page'"):
        texts(TextSource({"train": path}, document="page"))


def test_parquet(tmp_path):
    import datetime

    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    path = str(file)
    columns = {"text": ["one", None], "day": [datetime.date(2020, 2, 3)] * 2, "tags": [["x"], []], "raw": [b"\xff"] * 2}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    (document,) = ParquetSource({"train": path}, skip_bad_records=True).documents("train")
    assert document.text == "one" and document.metadata == {"day": "2020-02-03", "tags": ["x"]}
    with pytest.raises(UserError, match="a.parquet, row 2: there is no field 'text'"):
        texts(ParquetSource({"train": path}))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="a.parquet: damaged after row 0"):
        texts(ParquetSource({"train": path}, skip_bad_records=True))


def test_tfrecord(tmp_path, bucket):
    import tensorflow as tf

    def example(text):
        strings = tf.train.Feature(bytes_list=tf.train.BytesList(value=[text]))
        years = tf.train.Feature(int64_list=tf.train.Int64List(value=[2020]))
        scores = tf.train.Feature(float_list=tf.train.FloatList(value=[0.5, 1.5]))
        features = {"text": strings, "year": years, "scores": scores}
        return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()

    file = tmp_path / "a.tfrecord"
    path = str(file)
    with tf.io.TFRecordWriter(path) as writer:
        writer.write(example("hé".encode()))
        writer.write(example(b"\xff"))
    (document,) = TFRecordSource({"train": path}, skip_bad_records=True).documents("train")
    assert document.text == "hé" and document.metadata == {"year": 2020, "scores": [0.5, 1.5]}
    with pytest.raises(UserError, match="a.tfrecord, record 2: field 'text' is not UTF-8"):
        texts(TFRecordSource({"train": path}))
    files.path("gs://b/a.tfrecord").write_bytes(file.read_bytes())
    (document,) = TFRecordSource({"train": "gs://b/*"}, skip_bad_records=True).documents("train")
    assert document.text == "hé" and not list(files.scratch_folder().parent.rglob("a.tfrecord"))
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match="a.tfrecord: damaged after record 1"):
        texts(TFRecordSource({"train": path}, skip_bad_records=True))


def test_tfds(tmp_path):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    expected = [f"text {i}" for i in range(5)]
    folder = tmp_path / "mine" / "1.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "year": tf.int64})
    with tf.io.TFRecordWriter(str(folder / "mine-train.tfrecord-00000-of-00001")) as writer:
        for text in expected:
            writer.write(features.serialize_example({"text": text, "year": 2000}))
    tfds.folder_dataset.write_metadata(data_dir=str(folder), features=features, split_infos=None)
    splits = {"train": "train[:4]", "validation": "train[4:]"}
    source = TfdsSource("mine", splits, data_dir=str(tmp_path))
    assert sorted([*texts(source), *texts(source, "validation")]) == expected
    assert next(source.documents("validation")).metadata == {"year": 2000}
    with pytest.raises(UserError, match="TfdsSource.name 'other' is not below data_dir"):
        texts(TfdsSource("other", splits, data_dir=str(tmp_path)))
