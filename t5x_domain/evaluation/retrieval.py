"""How well embeddings find the documents that a query asks for: recall@k, MRR and nDCG@10."""

from collections.abc import Collection, Sequence

import numpy as np

from t5x_domain.errors import UserError

# Similarities held at once; 2**24 float32 are 64 MB.
_CHUNK = 2**24


def retrieval_scores(
    queries: np.ndarray,
    documents: np.ndarray,
    relevant: Sequence[Collection[int]],
    *,
    recall_at: Sequence[int] = (1, 10, 100),
    ndcg_at: int = 10,
) -> dict[str, float]:
    """Means over queries of `retrieval_per_query`: {"recall@1": …, "mrr": …, "ndcg@10": …}.

    Raises:
      UserError: as `retrieval_per_query`.
    """
    per_query = retrieval_per_query(queries, documents, relevant, recall_at=recall_at, ndcg_at=ndcg_at)
    return {name: float(values.mean()) for name, values in per_query.items()}


def retrieval_per_query(
    queries: np.ndarray,
    documents: np.ndarray,
    relevant: Sequence[Collection[int]],
    *,
    recall_at: Sequence[int] = (1, 10, 100),
    ndcg_at: int = 10,
) -> dict[str, np.ndarray]:
    """Ranks all documents by cosine similarity for each query, and scores where the relevant ones stand.

    Args:
      queries: embeddings, float [n, d].
      documents: embeddings, float [m, d].
      relevant: for each query the indices of its relevant documents, at least one.
      recall_at: numbers k of documents shown: the share of the relevant ones that is among them.
      ndcg_at: discounted cumulative gain of relevance 1 over that of the ideal ranking (Järvelin and Kekäläinen
        2002), of this many documents shown.

    Returns:
      float64 [n] of each: `recall@k`, `mrr` (1 / rank of the first relevant document) and `ndcg@k`. Of documents that
      are equally similar the relevant one stands last, so that embeddings that collapse do not look good.

    Raises:
      UserError: no queries or documents, embeddings of another size, not finite or 0, or a query with no relevant
        document, or with an index that does not exist.
    """
    queries, documents = _unit(queries, "query"), _unit(documents, "document")
    if queries.shape[1] != documents.shape[1]:
        raise UserError(
            f"queries have {queries.shape[1]} dimensions, documents {documents.shape[1]}; embed both with one model."
        )
    if len(relevant) != len(queries):
        raise UserError(f"{len(relevant)} sets of relevant documents for {len(queries)} queries; give one for each.")
    scores = {name: np.empty(len(queries)) for name in [*(f"recall@{k}" for k in recall_at), "mrr", f"ndcg@{ndcg_at}"]}
    chunk = max(1, _CHUNK // len(documents))
    for start in range(0, len(queries), chunk):
        similarities = queries[start : start + chunk] @ documents.T
        for query, row in enumerate(similarities, start):
            ranks = _ranks(row, _indices(relevant[query], query, len(documents)))
            for k in recall_at:
                scores[f"recall@{k}"][query] = np.mean(ranks <= k)
            scores["mrr"][query] = 1 / ranks[0]
            scores[f"ndcg@{ndcg_at}"][query] = _gain(ranks, ndcg_at) / _gain(np.arange(1, len(ranks) + 1), ndcg_at)
    return scores


def _ranks(similarities: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Ranks from 1 of the relevant documents, ascending, int [r]; among equals they stand last."""
    own = np.sort(similarities[relevant])[::-1]
    others = np.delete(similarities, relevant)
    above = np.array([np.count_nonzero(others >= similarity) for similarity in own])
    return above + np.arange(1, len(own) + 1)


def _gain(ranks: np.ndarray, at: int) -> float:
    return float((1 / np.log2(1 + ranks[ranks <= at])).sum())


def _indices(relevant: Collection[int], query: int, documents: int) -> np.ndarray:
    indices = np.array(sorted(set(relevant)), np.int64)
    if not len(indices):
        raise UserError(f"query {query} has no relevant document; leave it out.")
    if indices[0] < 0 or indices[-1] >= documents:
        wrong = indices[0] if indices[0] < 0 else indices[-1]
        raise UserError(f"query {query} names document {wrong}; the {documents} documents count from 0.")
    return indices


def _unit(embeddings: np.ndarray, what: str) -> np.ndarray:
    embeddings = np.asarray(embeddings, np.float32)
    if embeddings.ndim != 2 or not len(embeddings):
        raise UserError(f"{what} embeddings have the shape {embeddings.shape}; give at least one row [n, d].")
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    bad = np.flatnonzero(~((norms > 0) & np.isfinite(norms)))
    if len(bad):
        raise UserError(f"{what} {bad[0]} has an embedding that is 0 or not finite; it has no direction to compare.")
    return embeddings / norms
