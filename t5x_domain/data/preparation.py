"""From a mixture's documents to a vocabulary and token caches: what `python -m t5x_domain.prepare` does."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import gin
import numpy as np

from t5x_domain.data.cache import CachedSplit, TokenCache
from t5x_domain.data.pipeline import write_cache
from t5x_domain.data.tasks import Corpus, Mixture
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary, train_sentencepiece
from t5x_domain.errors import UserError


@gin.configurable
def prepare(
    mixture: Mixture,
    vocabulary: Vocabulary | ByteVocabulary,
    cache_dir: str,
    *,
    num_shards: int = 4,
    vocabulary_size: int | None = None,
    vocabulary_split: str = "train",
    overwrite: bool = False,
    beam_flags: Sequence[str] | None = None,
) -> list[TokenCache]:
    """Trains the vocabulary if it is not there, writes the token cache of every corpus, and prints a summary.

    A complete cache made from the same source with the same vocabulary and version is kept.

    Args:
      mixture: its corpora are cached, whatever the objectives.
      vocabulary: how to tokenise.
      cache_dir: folder of the caches; each corpus has a folder of its own in it.
      num_shards: shards of each split.
      vocabulary_size: pieces to train if `vocabulary.model_file` does not exist, sentinels not included.
      vocabulary_split: the split of each corpus whose documents the vocabulary is trained on.
      overwrite: write the caches again instead of keeping them. The vocabulary is never overwritten.
      beam_flags: flags of a Beam pipeline that does the work, None for this process.

    Raises:
      UserError: bad documents, a cache made from something else without `overwrite`, an impossible vocabulary.
    """
    if num_shards < 1:
        raise UserError(f"prepare.num_shards is {num_shards}; it must be 1 or more.")
    if vocabulary_size is not None:
        _ensure_vocabulary(mixture.corpora, vocabulary, vocabulary_size, vocabulary_split)
    caches = []
    for corpus in mixture.corpora:
        if overwrite or not _is_complete(corpus, vocabulary, cache_dir):
            write_cache(corpus, vocabulary, cache_dir, num_shards=num_shards, beam_flags=beam_flags)
            state = "written"
        else:
            state = "kept, it is complete (--overwrite writes it again)"
        caches.append(TokenCache.open(cache_dir, corpus.name))
        print(f"{caches[-1].folder}: {state}")
        for split in caches[-1].splits:
            print(f"  {summary(caches[-1].split(split))}{_skipped(caches[-1], split)}")
    return caches


def summary(split: CachedSplit) -> str:
    """One line on a split: documents, tokens, bytes per token and percentiles of tokens per document."""
    low, median, high = np.percentile(np.diff(split.offsets), [5, 50, 95])
    return (
        f"{split.split:12} {split.num_documents:11,} documents {split.num_tokens:14,} tokens  "
        f"{split.num_bytes / split.num_tokens:.2f} bytes per token  "
        f"tokens per document: 5 % {low:,.0f}, median {median:,.0f}, 95 % {high:,.0f}"
    )


def _skipped(cache: TokenCache, split: str) -> str:
    skipped = cache.manifest["splits"][split]["skipped"]
    return "".join(f"\n  {'':12} {count:11,} skipped: {reason}" for reason, count in skipped.items())


def _ensure_vocabulary(corpora: Sequence[Corpus], vocabulary: Vocabulary, size: int, split: str) -> None:
    if not isinstance(vocabulary, Vocabulary):
        raise UserError("prepare.vocabulary_size is for SentencePiece vocabularies; set it to None for bytes.")
    if not Path(vocabulary.model_file).exists():
        print(f"{vocabulary.model_file}: training {size:,} pieces", file=sys.stderr)
        train_sentencepiece(_texts(corpora, split), vocabulary.model_file, size)
    pieces = vocabulary.vocab_size - vocabulary.extra_ids
    if pieces != size:
        raise UserError(
            f"{vocabulary.model_file}: has {pieces} pieces, but prepare.vocabulary_size is {size}; set that to None to "
            "use this vocabulary, or name another Vocabulary.model_file to train one."
        )


def _texts(corpora: Sequence[Corpus], split: str) -> Iterator[str]:
    for corpus in corpora:
        yield from (document.text for document in corpus.source.documents(split))


def _is_complete(corpus: Corpus, vocabulary: Vocabulary | ByteVocabulary, cache_dir: str) -> bool:
    if not Path(cache_dir, corpus.name).exists():
        return False
    cache = TokenCache.open(
        cache_dir, corpus.name, vocabulary_fingerprint=vocabulary.fingerprint, version=corpus.version
    )
    if cache.manifest["source"] != corpus.source.describe():
        raise UserError(
            f"{cache.folder}: the token cache was made from another source than gin names now (files, sizes or fields "
            "differ); write it again with --overwrite, or choose another CACHE_DIR."
        )
    return True
