"""From documents to a vocabulary and token caches: what `python -m t5x_domain.prepare` does."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence

import gin
import numpy as np

from t5x_domain import files
from t5x_domain.data.cache import MANIFEST, CachedSplit, TokenCache
from t5x_domain.data.cache_writer import clear_up
from t5x_domain.data.curriculum import Phase
from t5x_domain.data.pipeline import write_cache
from t5x_domain.data.tasks import Corpus, Mixture
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary, train_sentencepiece
from t5x_domain.errors import UserError

_SAMPLED_DOCUMENTS = 1_000_000  # the first of a corpus, which are a random sample


@gin.configurable
def prepare(
    phases: Sequence[Phase],
    vocabulary: Vocabulary | ByteVocabulary,
    cache_dir: str,
    *,
    num_shards: int = 4,
    vocabulary_size: int | None = None,
    vocabulary_split: str = "train",
    eval_mixture: Mixture | None = None,
    inputs_length: int | None = 512,
    overwrite: bool = False,
    beam_flags: Sequence[str] | None = None,
) -> list[TokenCache]:
    """Trains the vocabulary if it is not there, writes the token cache of every corpus, and prints a summary.

    A complete cache made from the same source with the same vocabulary and version is kept.

    Args:
      phases: the corpora of their mixtures are cached, whatever the objectives; mode tokens that want an id of their
        own are trained into the vocabulary.
      vocabulary: how to tokenise.
      cache_dir: folder of the caches; each corpus has a folder of its own in it.
      num_shards: shards of each split.
      vocabulary_size: pieces to train if `vocabulary.model_file` does not exist, sentinels not included.
      vocabulary_split: the split of each corpus whose documents the vocabulary is trained on.
      eval_mixture: what held-out text will be scored with; its corpora are cached, too.
      inputs_length: tokens in a row's inputs, for which the best targets length is worked out; None for no advice.
      overwrite: write the caches again instead of keeping them. The vocabulary is never overwritten.
      beam_flags: flags of a Beam pipeline that does the work, None for this process.

    Raises:
      UserError: bad documents, a cache made from something else without `overwrite`, an impossible vocabulary.
    """
    if num_shards < 1:
        raise UserError(f"prepare.num_shards is {num_shards}; it must be 1 or more.")
    mixtures = [phase.mixture for phase in phases] + ([] if eval_mixture is None else [eval_mixture])
    corpora = _corpora(mixtures)
    if vocabulary_size is not None:
        special_tokens = list(dict.fromkeys(token for mixture in mixtures for token in mixture.special_tokens))
        _ensure_vocabulary(corpora, vocabulary, vocabulary_size, vocabulary_split, special_tokens)
    for component in (component for mixture in mixtures for component in mixture.components):
        if component.mode:
            component.mode.ids(vocabulary)
    caches = []
    for corpus in corpora:
        if overwrite or not _is_complete(corpus, vocabulary, cache_dir):
            write_cache(
                corpus, vocabulary, cache_dir, num_shards=num_shards, beam_flags=beam_flags, overwrite=overwrite
            )
            state = "written"
        else:
            state = "kept, it is complete (--overwrite writes it again)"
        caches.append(TokenCache.open(cache_dir, corpus.name))
        print(f"{caches[-1].folder}: {state}")
        for split in caches[-1].splits:
            print(f"  {summary(caches[-1].split(split))}{_skipped(caches[-1], split)}")
    if inputs_length is not None:
        for number, phase in enumerate(phases, 1):
            print(_advice(phase, f"phase {number}", caches, vocabulary, vocabulary_split, inputs_length))
    return caches


def _advice(
    phase: Phase,
    name: str,
    caches: Sequence[TokenCache],
    vocabulary: Vocabulary | ByteVocabulary,
    split: str,
    inputs: int,
) -> str:
    """Which lengths of an encoder-decoder waste least on a phase's mixture."""
    from t5x_domain.data.lengths import recommend  # reads batches, hence imports Grain and JAX

    mixture = dataclasses.replace(phase.mixture, components=phase.components)
    head = f"{phase.name or name}, encoder-decoder, Run.packing = 'first_fit', {inputs} inputs:"
    names = [corpus.name for corpus in mixture.corpora]
    try:
        splits = [cache.split(split) for cache in caches if cache.manifest["corpus"] in names]
        subset = {split.corpus: min(split.num_documents, _SAMPLED_DOCUMENTS) for split in splits}
        best, equal = recommend(mixture, splits, vocabulary, inputs, subset)
    except UserError as error:
        said = str(error).partition("\n  In call to configurable")[0]  # what gin adds is of no use here
        return f"{head} none can be recommended, because {said}"
    return (
        f"{head} LENGTHS = {{'inputs': {inputs}, 'targets': {best.targets}}}\n"
        f"  {best.both:.1%} of the positions hold tokens (encoder {best.encoder:.1%}, decoder {best.decoder:.1%}), "
        f"{best.dropped:.1%} of the text finds no room; with {inputs} targets {equal.both:.1%}"
    )


def summary(split: CachedSplit) -> str:
    """One line on a split: documents, tokens, bytes per token and percentiles of tokens per document.

    The percentiles are those of the first documents, which are a random sample.
    """
    low, median, high = np.percentile(np.diff(split.offsets[: _SAMPLED_DOCUMENTS + 1]), [5, 50, 95])
    return (
        f"{split.split:12} {split.num_documents:11,} documents {split.num_tokens:14,} tokens  "
        f"{split.num_bytes / split.num_tokens:.2f} bytes per token  "
        f"tokens per document: 5 % {low:,.0f}, median {median:,.0f}, 95 % {high:,.0f}"
    )


def _skipped(cache: TokenCache, split: str) -> str:
    skipped = cache.manifest["splits"][split]["skipped"]
    return "".join(f"\n  {'':12} {count:11,} skipped: {reason}" for reason, count in skipped.items())


def _corpora(mixtures: Sequence[Mixture]) -> list[Corpus]:
    """Each corpus once."""
    found: dict[str, Corpus] = {}
    for corpus in (corpus for mixture in mixtures for corpus in mixture.corpora):
        if found.setdefault(corpus.name, corpus) != corpus:
            raise UserError(f"two mixtures have different corpora named '{corpus.name}'; rename one.")
    return list(found.values())


def _ensure_vocabulary(
    corpora: Sequence[Corpus], vocabulary: Vocabulary, size: int, split: str, special_tokens: Sequence[str]
) -> None:
    if not isinstance(vocabulary, Vocabulary):
        raise UserError("prepare.vocabulary_size is for SentencePiece vocabularies; set it to None for bytes.")
    if not files.path(vocabulary.model_file).exists():
        print(f"{vocabulary.model_file}: training {size:,} pieces", file=sys.stderr)
        train_sentencepiece(_texts(corpora, split), vocabulary.model_file, size, special_tokens=special_tokens)
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
    folder = files.path(cache_dir) / corpus.name
    if not (folder / MANIFEST).exists():  # `write_cache` refuses a folder of other things
        return False
    cache = TokenCache.open(
        cache_dir, corpus.name, vocabulary_fingerprint=vocabulary.fingerprint, version=corpus.version
    )
    if cache.manifest["source"] != corpus.source.describe():
        raise UserError(
            f"{cache.folder}: the token cache was made from another source than gin names now (files, sizes or fields "
            "differ); write it again with --overwrite, or choose another CACHE_DIR."
        )
    clear_up(folder)
    return True
