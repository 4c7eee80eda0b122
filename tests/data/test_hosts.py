"""1,024 hosts and a corpus of 10⁹ tokens of which only the lengths are there: who gets which tokens."""

import functools

import numpy as np
import pytest

from t5x_domain.data.lanes import Lanes
from t5x_domain.data.loader import Batches
from t5x_domain.data.offsets import Offsets, ShardLengths
from t5x_domain.data.packing import EncoderDecoder
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Component, Corpus, Mixture
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.objectives.span_corruption import SpanCorruption

MIXTURE = Mixture("law", [Component(Corpus("law", JsonlSource({"train": "none.jsonl"})), SpanCorruption())])
BATCH_SIZE, SHARDS, DOCUMENTS = 1024, 1024, 1000
LENGTHS = np.random.default_rng(0).integers(1, 2000, DOCUMENTS).astype(np.uint32)  # of every shard: 10⁶ tokens


class Split:
    corpus, split, num_documents, metadata_fields = "law", "train", SHARDS * DOCUMENTS, frozenset()

    @functools.cached_property
    def offsets(self):
        return Offsets([ShardLengths(DOCUMENTS, int(LENGTHS.sum()), functools.partial(np.asarray, LENGTHS))] * SHARDS)


def host(number, num_hosts, packing, lanes):
    settings = {"lengths": {"inputs": 64, "targets": 17}, "layout": EncoderDecoder(), "seed": 3}
    settings |= {"packing": packing, "rows_per_window": 4}
    place = {"batch_size": BATCH_SIZE, "host": number, "num_hosts": num_hosts}
    if lanes is None:
        return Batches([Split()], MIXTURE, ByteVocabulary(extra_ids=100), **settings, **place)
    open_lane = functools.partial(Batches, [Split()], MIXTURE, ByteVocabulary(extra_ids=100), **settings)
    return Lanes(open_lane, lanes, **place)


@pytest.mark.parametrize(
    "packing, lanes", [("concat_and_split", None), ("concat_and_split", 1024), ("first_fit", 1024)]
)
def test_hosts_share_out_every_global_batch(packing, lanes):
    """Hosts 0, 1, 2, … joined are the global batch, in order: no overlap and no gap. Nor is there any between steps,
    also where the run goes on with a quarter of the hosts."""
    assert Split().offsets[-1] > 10**9
    whole = host(0, 1, packing, lanes)
    many, few = ([host(number, count, packing, lanes) for number in range(count)] for count in (1024, 256))
    seen = []
    for step, hosts in ((0, many), (1, few)):
        parts = [own.seen(step) for own in hosts]
        assert [piece for part in parts for piece in part] == whole.seen(step)
        seen += whole.seen(step)
        if lanes:  # and every host keeps to its part of the corpus, to a document of 2,000 tokens at most
            size = Split().offsets[-1] / len(hosts)
            for number, part in enumerate(parts):
                low, high = number * size, (number + 1) * size + 2000
                assert all(low <= piece.start_token and piece.stop_token < high for piece in part)
    starts, stops = np.array(sorted((piece.start_token, piece.stop_token) for piece in seen)).T
    assert (stops[:-1] <= starts[1:]).all()
    if packing == "concat_and_split" and not lanes:
        assert (stops - starts).sum() == 2 * BATCH_SIZE * 70
    far = [piece for own in many[:8] for piece in own.seen(10**9)]
    assert far == whole.seen(10**9)[: len(far)]
