import json
import multiprocessing
import os
import signal

import pytest

from t5x_domain import files
from t5x_domain.data import cache_writer, pipeline, spill
from t5x_domain.data.cache import TokenCache
from t5x_domain.data.pipeline import CacheWriter, add_work, beam_pipeline, write_cache
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Corpus
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary, train_sentencepiece
from t5x_domain.errors import UserError

BEAM = ["--runner=DirectRunner", "--direct_num_workers=1", "--direct_running_mode=in_memory"]
ENGINES = pytest.mark.parametrize("beam_flags", [None, BEAM], ids=["in_process", "beam"])


def corpus(tmp_path, *texts, **knobs):
    """A corpus of two files; records 0, 5, 10, … are of split test."""
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for number, path in enumerate(paths):
        records = [{"text": t, "id": i, "split": "train" if i % 5 else "test"} for i, t in enumerate(texts)][number::2]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    files = {split: [str(path) for path in paths] for split in ("train", "test")}
    return Corpus("law", JsonlSource(files, split_field="split", **knobs))


TEXTS = [f"Section {i}: nobody shall {'§' * (i % 4)} act {i}." for i in range(60)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@ENGINES
def test_documents_reach_the_cache(tmp_path, beam_flags):
    vocabulary = ByteVocabulary()
    write_cache(corpus(tmp_path, *TEXTS), vocabulary, tmp_path / "cache", num_shards=3, beam_flags=beam_flags)
    opened = TokenCache.open(tmp_path / "cache", "law", vocabulary_fingerprint=vocabulary.fingerprint, version=1)
    opened.verify()
    seen = {}
    for name in ("train", "test"):
        split = opened.split(name)
        fields, documents = (read(0, split.num_documents) for read in (split.metadata, split.documents))
        seen[name] = {f["id"]: vocabulary.decode(tokens) for f, tokens in zip(fields, documents, strict=True)}
        assert split.num_bytes == sum(len(text.encode()) for text in seen[name].values()) == split.num_tokens
    assert seen["test"] == {i: TEXTS[i] for i in range(0, 60, 5)}
    assert seen["train"] == {i: TEXTS[i] for i in range(60) if i % 5}
    assert opened.manifest["splits"]["train"]["metadata_fields"] == ["id"]
    assert opened.manifest["source"]["kind"] == "JsonlSource"
    assert opened.manifest["token_dtype"] == "<u2"


def test_engines_workers_and_turns_give_the_same_bytes(tmp_path, monkeypatch):
    """In this process, with Beam, with Beam in two worker processes, and with files that are read in several turns."""
    train_sentencepiece(TEXTS, str(tmp_path / "law.model"), 295)
    vocabulary = Vocabulary(str(tmp_path / "law.model"))
    law = corpus(tmp_path, *TEXTS, "", skip_bad_records=True)  # 20 shards for 12 test documents: some are empty
    workers = ["--runner=DirectRunner", "--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    for name, flags in (("one", None), ("beam", BEAM), ("workers", workers)):
        write_cache(law, vocabulary, tmp_path / name, num_shards=20, beam_flags=flags)
    monkeypatch.setattr(pipeline, "_TURN_BYTES", 700)
    assert max(task.turns for task in pipeline._tasks(law)) > 2
    monkeypatch.setattr(spill, "_BUFFER", 100)
    write_cache(law, vocabulary, tmp_path / "turns", num_shards=20)
    one, *others = (contents(tmp_path / name / "law") for name in ("one", "beam", "workers", "turns"))
    assert len(one) == 1 + 2 * 2 * 20
    for other in others:
        assert one == other


def stops_at(monkeypatch, method, nth, stop):
    """The n-th call of a method of CacheWriter stops instead; returns what the calls have done."""
    done, original = [], getattr(CacheWriter, method)

    def patched(self, *arguments):
        if len(done) == nth:
            stop()
        original(self, *arguments)
        done.append(arguments)

    monkeypatch.setattr(CacheWriter, method, patched)
    return done


def fail():
    raise RuntimeError("the machine is gone")


@ENGINES
@pytest.mark.parametrize("method, left", [("spill", 3), ("write", 7)])
def test_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, capsys, beam_flags, method, left):
    """Four tasks (two files for each of two splits) and eight shards; one is done when all stops."""
    law, settings = corpus(tmp_path, *TEXTS), {"num_shards": 4, "beam_flags": beam_flags}
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="the machine is gone"):
        stops_at(patched, method, 1, fail)
        write_cache(law, ByteVocabulary(), tmp_path / "cache", **settings)
    with pytest.raises(UserError, match="was interrupted while it was written"):
        TokenCache.open(tmp_path / "cache", "law")
    done = stops_at(monkeypatch, method, 100, fail)
    write_cache(law, ByteVocabulary(), tmp_path / "cache", **settings)
    assert len(done) == left
    tasks, shards = (3, 8) if method == "spill" else (0, 7)
    assert f"with {tasks} of 4 tasks and {shards} of 8 shards to do" in capsys.readouterr().err
    write_cache(law, ByteVocabulary(), tmp_path / "straight", **settings)
    assert contents(tmp_path / "cache" / "law") == contents(tmp_path / "straight" / "law")


def killed_in_the_third_shard(law, folder):
    def killed(folder, split, shard, *rest):
        if shard == 2:
            (folder / f".{split}-00002-of-00004.arrayrecord.0123").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return cache_writer.write_shard(folder, split, shard, *rest)

    pipeline.write_shard = killed
    write_cache(law, ByteVocabulary(), folder, num_shards=4)


def test_killed_while_it_writes_a_file(tmp_path, monkeypatch):
    """SIGKILL in the middle of the third shard: its lock is gone with it, and its half file is not taken for whole."""
    law = corpus(tmp_path, *TEXTS)
    child = multiprocessing.get_context("spawn").Process(
        target=killed_in_the_third_shard, args=(law, tmp_path / "cache")
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    done = stops_at(monkeypatch, "write", 100, fail)
    for folder in ("cache", "straight"):
        write_cache(law, ByteVocabulary(), tmp_path / folder, num_shards=4)
    assert len(done) == 6 + 8
    assert contents(tmp_path / "cache" / "law") == contents(tmp_path / "straight" / "law")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["law"]


def test_starts_afresh_for_another_source_or_vocabulary(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        stops_at(patched, "write", 3, fail)
        write_cache(corpus(tmp_path, *TEXTS), ByteVocabulary(), tmp_path / "cache", num_shards=4)
    done = stops_at(monkeypatch, "spill", 100, fail)
    law = corpus(tmp_path, *TEXTS, "one more")
    write_cache(law, ByteVocabulary(extra_ids=7), tmp_path / "cache", num_shards=4)
    assert len(done) == 4
    assert "was begun with another vocabulary, another source; starts afresh" in capsys.readouterr().err


def test_an_error_that_passes_costs_nothing(tmp_path, monkeypatch, capsys):
    def no_disk(self, *_):
        raise UserError("b.jsonl: cannot be read after line 3 ([Errno 5] Input/output error); fetch the file again.")

    with monkeypatch.context() as patched, pytest.raises(UserError):
        stops_at(patched, "spill", 2, lambda: no_disk(None))
        write_cache(corpus(tmp_path, *TEXTS), ByteVocabulary(), tmp_path / "cache", num_shards=4)
    write_cache(corpus(tmp_path, *TEXTS), ByteVocabulary(), tmp_path / "cache", num_shards=4)
    assert "goes on where it was interrupted, with 2 of 4 tasks" in capsys.readouterr().err


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    law = corpus(tmp_path, *TEXTS)
    before = law.source.describe()

    def grows():
        with open(tmp_path / "b.jsonl", "a") as file:
            file.write(json.dumps({"text": "one more", "split": "train"}) + "\n")

    with monkeypatch.context() as patched:
        stops_at(patched, "spill", 3, grows)
        with pytest.raises(UserError, match="corpus law: b.jsonl has changed since this was begun; .* start the same"):
            write_cache(law, ByteVocabulary(), tmp_path / "cache", num_shards=4)
    write_cache(law, ByteVocabulary(), tmp_path / "cache", num_shards=4)
    described = TokenCache.open(tmp_path / "cache", "law").manifest["source"]
    assert described == law.source.describe() != before


DATAFLOW = [
    "--runner=DataflowRunner",
    "--project=p",
    "--region=europe-west4",
    "--temp_location=gs://b/tmp",
    "--sdk_container_image=europe-docker.pkg.dev/p/r/t5x-domain",
    "--sdk_location=container",
    "--max_num_workers=100",
    "--number_of_worker_harness_threads=1",
    "--machine_type=n2-standard-4",
]
FLINK = [
    "--runner=FlinkRunner",
    "--flink_master=localhost:8081",
    "--environment_type=DOCKER",
    "--environment_config=europe-docker.pkg.dev/p/r/t5x-domain",
    "--parallelism=64",
]


@pytest.mark.parametrize("flags", [DATAFLOW, FLINK], ids=["dataflow", "flink"])
def test_runners_of_clusters(tmp_path, flags):
    """The options that docs/large_corpora.md names are Beam's own, and what such a runner is sent, the pipeline as a
    message with the pickled steps in it, is all that is needed to run it."""
    from apache_beam.options.pipeline_options import PipelineOptions

    options = PipelineOptions(flags).get_all_options(drop_default=True, retain_unknown_options=False)
    assert set(options) == {flag[2:].partition("=")[0] for flag in flags}
    law = corpus(tmp_path, *TEXTS)
    writer = CacheWriter(law, ByteVocabulary(), files.path(tmp_path), files.path(tmp_path), 4, pipeline._tasks(law))
    sent = beam_pipeline(BEAM)
    add_work(sent, writer, *writer.waiting())
    portable = sent.to_runner_api()
    received = type(portable).FromString(portable.SerializeToString())
    type(sent).from_runner_api(received, sent.runner, PipelineOptions(BEAM)).run().wait_until_finish()
    assert writer.waiting() == ([], [])


@ENGINES
@pytest.mark.parametrize(
    "text, reason", [(" \n", "the text is empty or blank"), ("an <extra_id_0> in text", "the text contains a sentinel")]
)
def test_documents_without_usable_tokens(tmp_path, beam_flags, text, reason):
    train_sentencepiece(TEXTS, str(tmp_path / "law.model"), 295)
    vocabulary = Vocabulary(str(tmp_path / "law.model"))
    texts = [*TEXTS[:6], text]
    with pytest.raises(UserError, match=rf"^\S+a.jsonl, line 4: {reason}.* JsonlSource.skip_bad_records = True\.$"):
        write_cache(corpus(tmp_path, *texts), vocabulary, tmp_path / "cache", num_shards=2, beam_flags=beam_flags)
    assert not (tmp_path / "cache" / "law").exists()
    law = corpus(tmp_path, *texts, skip_bad_records=True)
    write_cache(law, vocabulary, tmp_path / "cache", num_shards=2, beam_flags=beam_flags)
    train = TokenCache.open(tmp_path / "cache", "law").manifest["splits"]["train"]
    ((skipped, count),) = train["skipped"].items()
    assert reason in skipped and count == 1 and train["documents"] == 4


@ENGINES
def test_split_without_documents(tmp_path, beam_flags):
    law = corpus(tmp_path, "a test document", "", "", skip_bad_records=True)
    with pytest.raises(UserError, match="no document in split 'train'"):
        write_cache(law, ByteVocabulary(), tmp_path / "cache", num_shards=2, beam_flags=beam_flags)
    assert not (tmp_path / "cache" / "law").exists()


def test_beam_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install 't5x_domain\[beam\]'"):
        write_cache(corpus(tmp_path, *TEXTS), ByteVocabulary(), tmp_path / "cache", num_shards=2, beam_flags=BEAM)


def test_shards_must_be_visible_under_their_path(tmp_path, monkeypatch):
    """A relative cache folder is made absolute, since a Beam worker may run elsewhere."""
    monkeypatch.chdir(tmp_path)
    write_cache(corpus(tmp_path, *TEXTS), ByteVocabulary(), "cache", num_shards=2)
    assert TokenCache.open(tmp_path / "cache", "law").split("test").num_documents == 12
