"""What one of 1,024 hosts does to find its rows: time a step, memory, and which shards of the corpus it reads.

    python benchmarks/hosts.py

The corpora are simulated: their manifests and the lengths of their documents are there, their tokens are not, and no
host reads any. Documents have lognormal lengths, 1,000 tokens on average; all shards have the same. A batch has 4,096
rows of 568 raw tokens (T5's 512 inputs and 114 targets). Some of the hosts are looked at, each by itself. Times are CPU
seconds of the process; memory is what Python and NumPy have allocated, to which mapped files do not count.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
from common import RESULTS, environment

from t5x_domain.data.lanes import Lanes
from t5x_domain.data.loader import Batches
from t5x_domain.data.offsets import Offsets, ShardLengths
from t5x_domain.data.packing import EncoderDecoder
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Component, Corpus, Mixture
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.objectives.span_corruption import SpanCorruption

HOSTS, BATCH_SIZE, LENGTHS = 1024, 4096, {"inputs": 512, "targets": 114}
MIXTURE = Mixture("law", [Component(Corpus("law", JsonlSource({"train": "none.jsonl"})), SpanCorruption())])
# A record is read with the 31 others that it is compressed with.
GROUP, BYTES_PER_TOKEN = 32, 2


@dataclasses.dataclass(frozen=True)
class SimulatedSplit:
    """What the loader asks of a `CachedSplit` before it reads tokens."""

    lengths_file: str  # of every shard
    num_shards: int
    documents_per_shard: int
    corpus: str = "law"
    split: str = "train"
    metadata_fields: frozenset = frozenset()

    @property
    def num_documents(self):
        return self.num_shards * self.documents_per_shard

    @functools.cached_property
    def offsets(self):
        load = functools.partial(np.load, self.lengths_file, mmap_mode="r")
        shard = ShardLengths(self.documents_per_shard, int(load().sum(dtype=np.int64)), load)
        return Offsets([shard] * self.num_shards)


def simulate(folder, num_shards, documents):
    lengths = np.random.default_rng(0).lognormal(np.log(1000) - 0.5, 1.0, documents)
    np.save(f"{folder}/{documents}.npy", np.maximum(lengths, 1).astype(np.uint32))
    return SimulatedSplit(f"{folder}/{documents}.npy", num_shards, documents)


def batches_of(split, packing, lanes, host, num_hosts=HOSTS):
    place = {"host": host, "num_hosts": num_hosts}
    settings = {"lengths": LENGTHS, "layout": EncoderDecoder(), "seed": 0, "packing": packing}
    if lanes is None:
        return Batches([split], MIXTURE, ByteVocabulary(), batch_size=BATCH_SIZE, **settings, **place)
    open_lane = functools.partial(Batches, [split], MIXTURE, ByteVocabulary(), **settings)
    return Lanes(open_lane, lanes, batch_size=BATCH_SIZE, **place)


def reading(split, batches, steps):
    """Shards that a host reads in some steps, and the bytes of its own tokens and of the groups around them."""
    offsets = split.offsets
    shards, groups, tokens = set(), 0, 0
    for step in steps:
        touched = set()
        for seen in batches.seen(step):
            first, last = offsets.searchsorted(seen.start_token, "right") - 1, offsets.searchsorted(seen.stop_token)
            shards |= {first // split.documents_per_shard, (last - 1) // split.documents_per_shard}
            touched |= set(range(first // GROUP, -(-last // GROUP)))
            tokens += seen.stop_token - seen.start_token
        groups += len(touched)
    mean = offsets[-1] / split.num_documents
    return {
        "shards": len(shards),
        "own_megabytes": round(tokens * BYTES_PER_TOKEN / 1e6, 1),
        "read_megabytes": round(groups * GROUP * mean * BYTES_PER_TOKEN / 1e6, 1),
    }


def measure(split, packing, lanes, hosts, steps):
    """Medians over some of the hosts, each from a start of its own."""
    opening, stepping, memory, reads = [], [], [], []
    for host in hosts:
        own = dataclasses.replace(split)  # with nothing looked up yet
        tracemalloc.start()
        begin = time.process_time()
        batches = batches_of(own, packing, lanes, host)
        opening.append(time.process_time() - begin)
        times = []
        for step in steps:
            begin = time.process_time()
            batches.raw_tokens(step)
            times.append(time.process_time() - begin)
        stepping.append(statistics.mean(times))
        reads.append(reading(own, batches, steps))
        memory.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    return {
        "seconds_to_open": round(statistics.median(opening), 3),
        "microseconds_per_step": round(statistics.median(stepping) * 1e6),
        "megabytes_in_memory": round(statistics.median(memory) / 1e6, 1),
        **{name: statistics.median(read[name] for read in reads) for name in reads[0]},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=256, help="steps that are timed from step 1,000,000 on")
    parser.add_argument("--hosts", type=int, default=3, help="hosts that are timed")
    parser.add_argument("--output", default=str(RESULTS / "hosts.json"))
    flags = parser.parse_args()
    report = {
        "environment": environment("numpy", "grain"),
        "setting": {"hosts": HOSTS, "batch_size": BATCH_SIZE, "lengths": LENGTHS, "steps": flags.steps},
        "corpora": {},
        "figures": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, size in {"1e9 tokens": (1024, 1_000), "1e12 tokens": (4096, 250_000)}.items():
            split = simulate(folder, *size)
            report["corpora"][name] = {
                "documents": split.num_documents,
                "tokens": split.offsets[-1],
                "shards": split.num_shards,
            }
            for packing, lanes in itertools.product(("concat_and_split", "first_fit"), (None, HOSTS)):
                hosts = np.linspace(0, HOSTS - 1, flags.hosts).astype(int).tolist()
                if lanes is None and packing == "first_fit":
                    hosts = hosts[:1]  # reads the lengths of all documents first
                figures = measure(split, packing, lanes, hosts, range(10**6, 10**6 + flags.steps))
                report["figures"].append({"corpus": name, "packing": packing, "lanes": lanes, **figures})
                print(report["figures"][-1], flush=True)
    Path(flags.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
