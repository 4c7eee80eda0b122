import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.errors import UserError
from t5x_domain.evaluation import retrieval
from t5x_domain.evaluation.retrieval import retrieval_per_query, retrieval_scores

# Unit vectors at these angles from the query [1, 0]: the documents are ranked as listed.
DOCUMENTS = np.array([[math.cos(a), math.sin(a)] for a in np.radians([0, 10, 20, 30, 40])])
QUERY = np.array([[2.0, 0.0]])


def test_scores_by_hand():
    scores = retrieval_scores(QUERY, DOCUMENTS, [{1, 3}], recall_at=(1, 2, 4), ndcg_at=3)
    assert scores == {
        "recall@1": 0.0,
        "recall@2": 0.5,
        "recall@4": 1.0,
        "mrr": 0.5,
        # One relevant document at rank 2 within 3, against two at ranks 1 and 2 (Järvelin and Kekäläinen 2002).
        "ndcg@3": pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3))),
    }


def test_the_length_of_an_embedding_does_not_matter():
    lengths = np.array([[0.1], [5.0], [1.0], [100.0], [3.0]])
    one = retrieval_scores(QUERY, DOCUMENTS, [{2}])
    assert retrieval_scores(QUERY * 7, DOCUMENTS * lengths, [{2}]) == one
    assert one["mrr"] == pytest.approx(1 / 3)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 6))
def test_agrees_with_scikit_learn(seed, documents, queries):
    from sklearn.metrics import label_ranking_average_precision_score, ndcg_score

    rng = np.random.default_rng(seed)
    query, document = (rng.standard_normal((n, 8)).astype(np.float32) for n in (queries, documents))
    relevance = rng.random((queries, documents)) < 0.3
    relevance[:, 0] = True
    cosine = query @ document.T / np.linalg.norm(query, axis=1)[:, None] / np.linalg.norm(document, axis=1)
    relevant = [set(np.flatnonzero(row)) for row in relevance]
    assert retrieval_scores(query, document, relevant)["ndcg@10"] == pytest.approx(ndcg_score(relevance, cosine, k=10))
    # With one relevant document the average precision is the reciprocal rank.
    single = np.arange(documents)[None] == rng.integers(documents, size=queries)[:, None]
    mrr = retrieval_scores(query, document, [np.flatnonzero(row) for row in single])["mrr"]
    assert mrr == pytest.approx(label_ranking_average_precision_score(single, cosine))


def test_embeddings_that_collapsed_find_nothing():
    # All five documents alike: the relevant one stands last, and each of two relevant ones has a rank of its own.
    same = np.ones((5, 2))
    assert retrieval_scores(QUERY, same, [{0}], recall_at=(4, 5))["mrr"] == pytest.approx(1 / 5)
    assert retrieval_scores(QUERY, same, [{0, 1}], recall_at=(4,)) == {
        "recall@4": 0.5,
        "mrr": pytest.approx(1 / 4),
        "ndcg@10": pytest.approx((1 / math.log2(5) + 1 / math.log2(6)) / (1 + 1 / math.log2(3))),
    }


def test_random_embeddings_have_chance_recall():
    # Of 1,000 documents one is relevant: recall@10 is Bernoulli(1 %) over 2,000 queries: 0.01 +- 4 * 0.0022.
    rng = np.random.default_rng(0)
    query, document = rng.standard_normal((2000, 16)), rng.standard_normal((1000, 16))
    scores = retrieval_scores(query, document, [{int(i)} for i in rng.integers(1000, size=2000)])
    assert scores["recall@10"] == pytest.approx(0.01, abs=0.009)


def test_queries_in_chunks_score_the_same(monkeypatch):
    rng = np.random.default_rng(1)
    query, document = rng.standard_normal((2, 9, 4))
    relevant = [{i, (i + 3) % 9} for i in range(9)]
    whole = retrieval_per_query(query, document, relevant)
    assert all(values.shape == (9,) for values in whole.values())
    monkeypatch.setattr(retrieval, "_CHUNK", 2 * 9)
    for name, values in retrieval_per_query(query, document, relevant).items():
        np.testing.assert_array_equal(values, whole[name])


@pytest.mark.parametrize(
    ("queries", "documents", "relevant", "message"),
    [
        (QUERY, DOCUMENTS, [set()], "query 0 has no relevant document"),
        (QUERY, DOCUMENTS, [{1, 5}], "names document 5; the 5 documents count from 0"),
        (QUERY, DOCUMENTS, [{-1, 2}], "names document -1"),
        (QUERY, DOCUMENTS, [], "0 sets of relevant documents for 1 queries"),
        (QUERY, np.ones((3, 4)), [{0}], "queries have 2 dimensions, documents 4"),
        (np.empty((0, 2)), DOCUMENTS, [], "at least one row"),
        (QUERY, np.zeros((3, 2)), [{0}], "document 0 has an embedding that is 0"),
        (QUERY * math.nan, DOCUMENTS, [{0}], "query 0 has an embedding that is 0 or not finite"),
    ],
)
def test_what_cannot_be_ranked_is_refused(queries, documents, relevant, message):
    with pytest.raises(UserError, match=message):
        retrieval_scores(queries, documents, relevant)
