"""How fast the token cache becomes batches: tokens per second and core, start-up, resuming, worker processes.

    python benchmarks/data_pipeline.py [--documents FILE.jsonl.gz …] [--t5_path DIR]

The T5 pretraining case: 568 raw tokens -> 512 inputs and 114 targets, batches of 128 rows. A token is a position of the
batch that is not padding. With --t5_path the same is measured of the TensorFlow pipeline that T5 was trained with, on
the same tokens and core: `t5.data.preprocessors.span_corruption`, then SeqIO's feature converter. Make DIR with

    pip install --no-deps --target DIR t5 babel rouge-score nltk editdistance sacrebleu portalocker tabulate colorama \\
        pandas scikit-learn threadpoolctl joblib narwhals lxml regex click

Every figure comes from a process of its own; the pipelines that are compared take turns, and the median round counts.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import environment

from t5x_domain.data.cache import TokenCache
from t5x_domain.data.curriculum import Phase
from t5x_domain.data.loader import Batches
from t5x_domain.data.packing import EncoderDecoder
from t5x_domain.data.prefetch import iterate
from t5x_domain.data.preparation import prepare
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Component, Corpus, Mixture
from t5x_domain.data.vocabulary import Vocabulary
from t5x_domain.objectives.span_corruption import SpanCorruption

ROOT = Path(__file__).parent.parent
LENGTHS = {"inputs": 512, "targets": 114}
BATCH_SIZE = 128
CORE = 0


def make_mixture(documents):
    components = [
        Component(Corpus(Path(file).name.partition(".")[0], JsonlSource({"train": file})), SpanCorruption())
        for file in documents
    ]
    return Mixture("benchmark", components)


def open_splits(setting):
    return [
        TokenCache.open(
            setting["cache_dir"],
            component.corpus.name,
            vocabulary_fingerprint=setting["vocabulary"].fingerprint,
            version=component.corpus.version,
        ).split("train")
        for component in setting["mixture"].components
    ]


def make_batches(setting, packing):
    return Batches(
        open_splits(setting),
        setting["mixture"],
        setting["vocabulary"],
        lengths=LENGTHS,
        layout=EncoderDecoder(),
        batch_size=BATCH_SIZE,
        seed=0,
        packing=packing,
    )


def tokens_per_second(batches, count_tokens, seconds, warm_up=4):
    """Mean rate over at least `seconds`, after `warm_up` batches."""
    for _ in range(warm_up):
        next(batches)
    tokens, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        tokens += count_tokens(next(batches))
    return tokens / (time.perf_counter() - start)


def count_segments(batch):
    return np.count_nonzero(batch["encoder_segment_ids"]) + np.count_nonzero(batch["decoder_segment_ids"])


def measure_ours(setting, packing):
    os.sched_setaffinity(0, {CORE})
    batches = make_batches(setting, packing)
    return tokens_per_second(map(batches.__getitem__, range(10**9)), count_segments, setting["seconds"])


def measure_t5(setting, _):
    """T5's own preprocessors, fed from memory, so that reading a cache costs it nothing."""
    os.sched_setaffinity(0, {CORE})
    sys.path.append(setting["t5_path"])
    import seqio
    import tensorflow as tf
    from t5.data.preprocessors import span_corruption

    documents = [tokens for split in open_splits(setting) for tokens in split.documents(0, split.num_documents)]
    order = np.random.default_rng(0).permutation(len(documents))
    ragged = tf.RaggedTensor.from_row_lengths(
        np.concatenate([documents[i] for i in order]), [len(documents[i]) for i in order]
    )
    dataset = tf.data.Dataset.from_tensor_slices(ragged).repeat().map(lambda tokens: {"targets": tokens})
    feature = seqio.Feature(setting["vocabulary"].as_seqio(), add_eos=True)
    features = {"inputs": feature, "targets": feature}
    dataset = span_corruption(dataset, LENGTHS, features)
    dataset = seqio.preprocessors.append_eos(dataset, features)
    dataset = seqio.EncDecFeatureConverter(pack=False)(dataset, LENGTHS).batch(BATCH_SIZE)

    def count_tokens(batch):
        return np.count_nonzero(batch["encoder_input_tokens"]) + np.count_nonzero(batch["decoder_target_tokens"])

    return tokens_per_second(dataset.as_numpy_iterator(), count_tokens, setting["seconds"])


def measure_first_batch(setting, step):
    """Seconds from opening the cache to the batch of `step`."""
    os.sched_setaffinity(0, {CORE})
    start = time.perf_counter()
    next(iterate(make_batches(setting, "first_fit"), step, prefetch=1))
    return time.perf_counter() - start


def measure_workers(setting, num_workers):
    batches = iterate(make_batches(setting, "first_fit"), num_workers=num_workers)
    return tokens_per_second((batch for _, batch, _ in batches), count_segments, setting["seconds"], warm_up=32)


def measure_packing(setting, packing):
    stats = make_batches(setting, packing).packing_stats(range(20))
    return {"encoder": stats.encoder, "decoder": stats.decoder, "dropped_share": stats.dropped_share}


def measure(setting, jobs, rounds):
    """{name: [figure of every round]} of `jobs` {name: (function, argument)}, interleaved, each in a fresh process."""
    figures = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, (function, argument) in jobs.items():
            spawn = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
                figures[name].append(process.submit(function, setting, argument).result())
    return figures


def run(setting, rounds):
    packings = ("concat_and_split", "first_fit")
    pipelines = {f"{packing}, 1 core": (measure_ours, packing) for packing in packings}
    if setting["t5_path"]:
        pipelines["t5 (TensorFlow), 1 core"] = (measure_t5, None)
    workers = {f"first_fit, {n} worker processes": (measure_workers, n) for n in (0, 1, 2, 4) if n <= os.cpu_count()}
    starts = {f"first batch at step {step:,}": (measure_first_batch, step) for step in (0, 1_000_000)}
    return {
        "tokens_per_second": measure(setting, pipelines, rounds) | measure(setting, workers, 1),
        "seconds": measure(setting, starts, rounds),
        "packing": {
            name: figures[0]
            for name, figures in measure(setting, {p: (measure_packing, p) for p in packings}, 1).items()
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sample = [str(ROOT / "data/sample" / f"{name}.jsonl.gz") for name in ("biomedical", "general")]
    parser.add_argument("--documents", nargs="+", default=sample, help="JSONL files, each a corpus at equal rate")
    parser.add_argument("--vocabulary_size", type=int, default=6000, help="pieces to train on the documents")
    parser.add_argument("--t5_path", help="folder with the t5 package, to measure it too")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/data_pipeline.json"))
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache_dir:
        setting = {
            "cache_dir": cache_dir,
            "vocabulary": Vocabulary(f"{cache_dir}/vocabulary.model"),
            "mixture": make_mixture(flags.documents),
            "t5_path": flags.t5_path,
            "seconds": flags.seconds,
        }
        prepare([Phase(setting["mixture"])], setting["vocabulary"], cache_dir, vocabulary_size=flags.vocabulary_size)
        corpora = {
            split.corpus: {"documents": split.num_documents, "tokens": split.num_tokens}
            for split in open_splits(setting)
        }
        results = run(setting, flags.rounds)
    versions = environment("numpy", "grain", "array_record", "seqio", "tensorflow")
    report = {"environment": versions, "corpora": corpora, "batch_size": BATCH_SIZE, "lengths": LENGTHS, **results}
    Path(flags.output).parent.mkdir(parents=True, exist_ok=True)
    Path(flags.output).write_text(json.dumps(report, indent=1) + "\n")
    print_report(report)


def print_report(report):
    print("\n" + ", ".join(f"{name} {value}" for name, value in report["environment"].items()))
    for name, figures in report["tokens_per_second"].items():
        spread = f"({min(figures) / 1e6:.2f} … {max(figures) / 1e6:.2f})"
        print(f"{name:32} {statistics.median(figures) / 1e6:8.2f} M tokens/s {spread}")
    for name, figures in report["seconds"].items():
        print(f"{name:32} {statistics.median(figures):8.3f} s")
    for name, stats in report["packing"].items():
        print(f"{name:32} " + ", ".join(f"{key} {value:.4f}" for key, value in stats.items()))


if __name__ == "__main__":
    main()
