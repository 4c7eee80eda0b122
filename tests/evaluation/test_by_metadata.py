import math

import numpy as np
import pytest

from t5x_domain.data import cache, cache_writer
from t5x_domain.data.cache import TokenCache
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.evaluation.by_metadata import documents_by_value, scores_by_value

VOCABULARY = ByteVocabulary()
# 40 documents: 20 of 2019, 12 of "patents", 3 + 3 rare ones, 2 without the field.
SOURCES = [2019] * 20 + ["patents"] * 12 + ["blog"] * 3 + [["a", "é"]] * 3 + [None, ""]
TEXTS = [f"§ {number} " + "x" * (number % 5) for number in range(len(SOURCES))]


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    dtype = cache.token_dtype(VOCABULARY.vocab_size)
    records = [
        cache_writer.encode_record(
            "law",
            "validation",
            (0, number),
            tokens=VOCABULARY.encode(text),
            num_bytes=len(text.encode()),
            metadata={"number": number} | ({} if source is None else {"source": source}),
            dtype=dtype,
        )
        for number, (text, source) in enumerate(zip(TEXTS, SOURCES, strict=True))
    ]
    folder = tmp_path_factory.mktemp("cache")
    with cache_writer.writing(folder, "law") as partial:
        shards = [
            cache_writer.write_shard(
                partial, "validation", i, 2, [r for r in records if cache_writer.shard_of(r, 2) == i]
            )
            for i in range(2)
        ]
        totals = {count: sum(shard[count] for shard in shards) for count in ("documents", "tokens", "bytes")}
        entry = {**totals, "metadata_fields": ["number", "source"], "shards": shards}
        manifest = {"corpus": "law", "version": 1, "vocabulary": {"fingerprint": "f"}, "token_dtype": dtype.str}
        cache_writer.write_manifest(partial, {**manifest, "splits": {"validation": entry}})
    return TokenCache.open(folder, "law").split("validation")


def numbers(documents):
    return [fields["number"] for fields in documents.metadata(0, documents.num_documents)]


def test_documents_are_grouped_by_value_and_rare_values_are_pooled(split):
    groups = documents_by_value(split, "source", min_documents=12)
    assert {value: documents.num_documents for value, documents in groups.items()} == {
        "2019": 20,
        "patents": 12,
        "(other)": 8,
    }
    assert list(groups) == ["2019", "patents", "(other)"]
    assert sorted(numbers(groups["patents"])) == list(range(20, 32))
    assert sorted(numbers(groups["(other)"])) == list(range(32, 40))


def test_values_that_are_no_text_and_absent_ones_have_a_name(split):
    groups = documents_by_value(split, "source", min_documents=1)
    assert {value: sorted(numbers(documents)) for value, documents in groups.items()} == {
        "2019": list(range(20)),
        "patents": list(range(20, 32)),
        '["a", "é"]': [35, 36, 37],
        "blog": [32, 33, 34],
        "(none)": [38, 39],
    }


def test_a_group_is_a_split_of_its_own(split):
    for documents in documents_by_value(split, "source").values():
        texts = [TEXTS[number] for number in numbers(documents)]
        assert [VOCABULARY.decode(ids) for ids in documents.documents(0, documents.num_documents)] == texts
        lengths = [len(text.encode()) for text in texts]
        np.testing.assert_array_equal(documents.offsets, np.cumsum([0, *lengths]))
        assert [VOCABULARY.decode(ids) for ids in documents.documents(2, 4)] == texts[2:4]
        # In the order of the split, so that a group of all documents is the split.
        stored = numbers(split)
        assert [stored.index(number) for number in numbers(documents)] == sorted(map(stored.index, numbers(documents)))


def test_a_field_that_no_document_has_is_refused(split):
    with pytest.raises(
        UserError, match="--by=year: no document of law/validation has this field; it has number, source"
    ):
        documents_by_value(split, "year")


def test_scores_by_hand(split):
    # Every document costs its number in bits over 2 targets; a byte vocabulary has one byte a token.
    groups = documents_by_value(split, "source", min_documents=10)

    def batches(documents):
        return [{"nll": n * math.log(2), "correct": 1.0, "weight": 2.0} for n in numbers(documents)]

    scores = scores_by_value(groups, lambda _, batch: batch, None, batches, VOCABULARY)
    mean = {"2019": 9.5 / 2, "patents": 25.5 / 2, "(other)": 35.5 / 2}  # of 0…19, 20…31, 32…39, over 2 targets
    for value, bits in mean.items():
        assert scores[value]["bits_per_byte"] == pytest.approx(bits)
        assert scores[value]["perplexity"] == pytest.approx(2**bits)
        assert scores[value]["documents"] == groups[value].num_documents
        assert scores[value]["targets"] == 2 * groups[value].num_documents


def test_bytes_are_those_of_the_text_and_not_of_the_tokens(split):
    class Words:
        @staticmethod
        def decode(ids):
            return "é" * len(ids)  # two bytes a token

    group = documents_by_value(split, "source")["patents"]
    assert group.bytes_per_token(Words()) == 2.0
