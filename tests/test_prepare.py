import json
from pathlib import Path

import pytest

from t5x_domain import prepare
from t5x_domain.data.cache import TokenCache
from t5x_domain.data.vocabulary import Vocabulary

SAMPLE = "gin/mixtures/sample.gin"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The sample mixture over two small corpora of its own, as an installed package would run it elsewhere."""
    monkeypatch.chdir(tmp_path)
    for name, word in (("biomedical", "heart"), ("general", "nation")):
        records = [
            {"text": f"{word} {i} of the {word}s.", "split": ("train", "validation", "test")[i % 3]} for i in range(60)
        ]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return [
        f"--gin_file={SAMPLE}",
        "--gin.BIOMEDICAL='biomedical.jsonl'",
        "--gin.GENERAL='general.jsonl'",
        "--gin.VOCABULARY_SIZE=285",
    ]


def fails(capsys, arguments):
    """Runs the program, which must fail, and returns its last line on stderr."""
    with pytest.raises(SystemExit) as exit_:
        prepare.main(arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def succeeds(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        prepare.main(arguments)
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_prepares_keeps_and_overwrites(small, capsys):
    out = succeeds(capsys, small)
    assert "cache/sample/biomedical: written\n  train                 20 documents" in out
    vocabulary = Vocabulary("cache/sample/vocabulary.model", extra_ids=256)
    assert vocabulary.vocab_size == 285 + 256
    cache = TokenCache.open("cache/sample", "general", vocabulary_fingerprint=vocabulary.fingerprint, version=1)
    documents = cache.split("validation").documents(0, 20)
    assert sorted(map(vocabulary.decode, documents)) == sorted(f"nation {i} of the nations." for i in range(1, 60, 3))
    manifest = Path("cache/sample/general/manifest.json")
    first = manifest.stat().st_mtime_ns, manifest.read_bytes()
    assert succeeds(capsys, small).count("kept, it is complete") == 2
    assert first == (manifest.stat().st_mtime_ns, manifest.read_bytes())
    assert "general: written" in succeeds(capsys, [*small, "--overwrite"])
    assert first[0] != manifest.stat().st_mtime_ns and first[1] == manifest.read_bytes()


def test_advice_looks_at_a_sample(small, capsys, monkeypatch):
    from t5x_domain.data import lengths, preparation

    read, batches = [], lengths.Batches
    monkeypatch.setattr(preparation, "_SAMPLED_DOCUMENTS", 7)
    monkeypatch.setattr(lengths, "Batches", lambda *_, **how: read.append(how["subset"]) or batches(*_, **how))
    assert "LENGTHS = {'inputs': 512, 'targets': " in succeeds(capsys, small)
    assert read and all(subset == {"biomedical": 7, "general": 7} for subset in read)


def test_changed_corpora_and_vocabularies_are_noticed(small, capsys):
    succeeds(capsys, small)
    error = fails(capsys, [*small, "--gin.general/Corpus.version=2"])
    assert "general: the token cache holds version 1" in error and "--overwrite" in error
    error = fails(capsys, [*small, "--gin.Vocabulary.extra_ids=50"])
    assert "biomedical: the token cache was made with another vocabulary" in error
    assert "has 285 pieces, but prepare.vocabulary_size is 290" in fails(capsys, [*small, "--gin.VOCABULARY_SIZE=290"])
    with open("general.jsonl", "a") as file:
        file.write('{"text": "one more", "split": "train"}\n')
    assert "general: the token cache was made from another source" in fails(capsys, small)
    assert "general: written\n  train                 21 documents" in succeeds(capsys, [*small, "--overwrite"])


def test_bad_corpus_leaves_nothing(small, capsys):
    with open("general.jsonl", "a") as file:
        file.write("{\n")
    assert fails(capsys, small).startswith("t5x-domain prepare: error: ")
    assert not Path("cache").exists()
    out = succeeds(capsys, [*small, "--gin.JsonlSource.skip_bad_records=True"])
    assert "1 skipped: not a JSON object" in out


def test_a_folder_of_something_else_is_left_alone(small, capsys):
    """As one's own documents, where CACHE_DIR is the folder above them."""
    Path("cache/sample/general").mkdir(parents=True)
    Path("general.jsonl").rename("cache/sample/general/all.jsonl")
    flags = [*small, "--gin.GENERAL='cache/sample/general/all.jsonl'"]
    for more in ([], ["--overwrite"]):
        assert "cache/sample/general: holds files that are no token cache; choose" in fails(capsys, [*flags, *more])
    assert Path("cache/sample/general/all.jsonl").exists()


def test_vocabulary_errors(small, capsys):
    assert "vocabulary_size=9999 is too large for the corpus: at most" in fails(
        capsys, [*small, "--gin.VOCABULARY_SIZE=9999"]
    )
    error = fails(capsys, [*small, "--gin.prepare.vocabulary_size=None"])
    assert "cache/sample/vocabulary.model: cannot read the SentencePiece model" in error
    error = fails(capsys, [*small, "--gin.VOCABULARY=@ByteVocabulary()"])
    assert "prepare.vocabulary_size is for SentencePiece" in error
    bytes_ = [*small, "--gin.VOCABULARY=@ByteVocabulary()", "--gin.VOCABULARY_SIZE=None"]
    assert "1.00 bytes per token" in succeeds(capsys, bytes_)
    assert "prepare.num_shards is 0" in fails(capsys, [*small, "--gin.prepare.num_shards=0"])


def test_flags(small, capsys):
    assert "--gin_file is needed" in fails(capsys, [])
    assert "go with --runner" in fails(capsys, [*small, "--num_workers=2"])
    out = succeeds(capsys, [*small, "--runner=DirectRunner"])
    assert "general: written" in out


def test_shipped_sample():
    """The figures that data/sample/ATTRIBUTION.md states, and held-out text enough for a stable perplexity."""
    import gin

    from t5x_domain import cli
    from t5x_domain.data import preparation  # noqa: F401  registers `prepare`

    cli.load_gin([SAMPLE], [])
    mixture = gin.query_parameter("Phase.mixture").scoped_configurable_fn()
    counts = {}
    for corpus in mixture.corpora:
        for split in corpus.source.splits:
            documents = list(corpus.source.documents(split))
            counts[corpus.name, split] = len(documents)
            assert all(document.metadata["id"] and document.metadata["source"] for document in documents)
            if split == "validation":
                assert sum(len(document.text.encode()) for document in documents) > 150_000
    assert counts == {
        ("biomedical", "train"): 13_012,
        ("biomedical", "validation"): 990,
        ("biomedical", "test"): 304,
        ("general", "train"): 7_788,
        ("general", "validation"): 568,
        ("general", "test"): 230,
    }
