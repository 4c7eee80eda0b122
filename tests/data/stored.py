"""A small token cache, for tests of what writes and reads caches."""

import numpy as np

from t5x_domain.data import cache_writer
from t5x_domain.data.cache import TokenCache, token_dtype

DOCUMENTS = [np.random.default_rng(i).integers(3, 60_000, 1 + i % 7, np.int32) for i in range(150)]
FINGERPRINT = "f" * 64


def write(cache_dir, documents=DOCUMENTS, num_shards=4, vocab_size=1 << 16, version=1):
    dtype = token_dtype(vocab_size)
    records = [
        cache_writer.encode_record(
            "law", "train", (0, i), tokens=tokens, num_bytes=10 + i, metadata={"id": i, "title": "§é"}, dtype=dtype
        )
        for i, tokens in enumerate(documents)
    ]
    with cache_writer.writing(cache_dir, "law") as folder:
        shards = []
        for shard in range(num_shards):
            mine = [record for record in records if cache_writer.shard_of(record, num_shards) == shard]
            shards.append(cache_writer.write_shard(folder, "train", shard, num_shards, mine))
        totals = {count: sum(shard[count] for shard in shards) for count in ("documents", "tokens", "bytes")}
        manifest = {
            "corpus": "law",
            "version": version,
            "vocabulary": {"kind": "test", "fingerprint": FINGERPRINT},
            "token_dtype": dtype.str,
            "splits": {"train": {**totals, "metadata_fields": ["id", "title"], "shards": shards}},
        }
        cache_writer.write_manifest(folder, manifest)
    return TokenCache.open(cache_dir, "law", vocabulary_fingerprint=FINGERPRINT, version=version)
