"""How fast raw tokens become UL2 examples: examples and raw tokens per second and core.

    python benchmarks/objectives.py [--fat5_path DIR --torch_python PATH] [--t5_path DIR]

The preset `ul2_442`, seven denoisers with a mode token of one id, 512 inputs and 512 targets. Three makers of examples
get the same token ids from memory, draw a denoiser for every example by the preset's weights, and give batches of 128
rows, one example a row, padded with zeros:

- ours: `SpanCorruption` and `PrefixLM`, functions in numpy;
- FAT5's collator, in numpy and torch: `DataCollatorForUL2MLM` of github.com/catie-aq/flashT5 (tried with 818f07c), of
  which DIR is a checkout and PATH a Python with torch and transformers;
- T5's preprocessors, in TensorFlow: `denoise` of the t5 package with `random_spans_noise_mask`, a dataset for every
  denoiser, `sample_from_datasets`. See data_pipeline.py for how to make DIR.

What differs:

- FAT5 takes a random stretch of a longer piece, and also gives an attention mask and labels with -100 for padding. Its
  tokenizer is replaced by a stand-in that knows the ids of mode tokens, sentinels, EOS and padding; it is asked in the
  constructor only. Its options have no length for a suffix of a quarter, so that is set after construction, to one
  token less than ours, for the inputs of its S-denoiser hold a sentinel.
- TensorFlow gets pieces that are cut to their lengths already, so that concatenating and splitting costs it nothing,
  and one `map` puts mode token and EOS. Its S-denoiser is a single span of a quarter, which T5's mask puts last,
  without sentinels; the uniform cut of T5's `prefix_lm` would take fewer raw tokens. It has a single thread and no
  autotuning, which is faster here on one core than its defaults.

Before anything is timed, the makers' mean lengths are compared, denoiser by denoiser. Two more rows measure all of our
host half, from the token cache to packed batches with segments and positions: `concat_and_split` has an example a row,
`first_fit` whole documents, which are short in the sample (a median of 42 and 25 tokens).

Every figure comes from a process of its own on the same core; what is compared takes turns, and the median round
counts. A second is one of processor time, of all threads of the process, so that other load on the machine counts less;
`core_share` is processor time over wall-clock time.
"""

import argparse
import hashlib
import importlib.metadata
import inspect
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import RESULTS, environment
from data_pipeline import count_segments, measure

from t5x_domain.data.cache import TokenCache
from t5x_domain.data.curriculum import Phase
from t5x_domain.data.loader import Batches
from t5x_domain.data.mixtures import mixture_of_denoisers
from t5x_domain.data.packing import EncoderDecoder
from t5x_domain.data.preparation import prepare
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Corpus
from t5x_domain.data.vocabulary import Vocabulary

ROOT = Path(__file__).parent.parent
PRESET = "ul2_442"
LENGTHS = {"inputs": 512, "targets": 512}
BATCH_SIZE = 128
# Longer than any denoiser's raw tokens.
PIECE = 1024
CORE = 0
OURS, FAT5, T5 = "ours", "FAT5 (numpy, torch)", "T5 (TensorFlow)"
FAT5_COLLATOR = "src/data/data_collator_ul2.py"
LOADER = {packing: f"our loader, {packing}" for packing in ("concat_and_split", "first_fit")}


def open_splits(setting):
    return [
        TokenCache.open(
            setting["cache_dir"],
            corpus.name,
            vocabulary_fingerprint=setting["vocabulary"].fingerprint,
            version=corpus.version,
        ).split("train")
        for corpus in setting["mixture"].corpora
    ]


def raw_tokens(splits):
    """All documents in random order, joined."""
    documents = [tokens for split in splits for tokens in split.documents(0, split.num_documents)]
    order = np.random.default_rng(0).permutation(len(documents))
    return np.concatenate([documents[i] for i in order])


def denoisers_of(setting):
    """What a maker needs to know of every denoiser, as JSON."""
    mixture, vocabulary = setting["mixture"], setting["vocabulary"]
    components = [component for component in mixture.components if component.corpus == mixture.corpora[0]]
    total = sum(component.rate for component in components)
    result = []
    for component in components:
        mode = component.mode.ids(vocabulary)
        room = {**LENGTHS, "inputs": LENGTHS["inputs"] - len(mode)}
        component.objective.check(room, vocabulary)
        result.append(
            {
                "name": component.objective.name,
                "weight": component.rate / total,
                "mode": mode.tolist(),
                "raw_length": component.objective.raw_length(room),
                # None for the S-denoiser, which predicts `suffix` of the text.
                "noise_density": getattr(component.objective, "noise_density", None),
                "mean_span_length": getattr(component.objective, "mean_span_length", None),
                "suffix": getattr(component.objective, "mean_suffix", None),
            }
        )
    return result


# The makers: functions that give a function of a denoiser's number, or None for a draw among them, which gives the next
# batch: (inputs, targets), both int [BATCH_SIZE, 512], padded.


def our_maker(setting):
    vocabulary, tokens, denoisers = setting["vocabulary"], np.load(setting["tokens"]), setting["denoisers"]
    mixture = setting["mixture"]
    objectives = [c.objective for c in mixture.components if c.corpus == mixture.corpora[0]]
    modes = [np.array(denoiser["mode"], np.int32) for denoiser in denoisers]
    raw_lengths = [denoiser["raw_length"] for denoiser in denoisers]
    weights = [denoiser["weight"] for denoiser in denoisers]
    rng = np.random.default_rng(0)

    def next_batch(only):
        drawn = rng.choice(len(weights), BATCH_SIZE, p=weights) if only is None else np.full(BATCH_SIZE, only)
        starts = rng.integers(0, len(tokens) - PIECE, BATCH_SIZE)
        inputs, targets = np.zeros((2, BATCH_SIZE, LENGTHS["inputs"]), np.int32)
        for row, (i, start) in enumerate(zip(drawn.tolist(), starts.tolist(), strict=True)):
            example = objectives[i](tokens[start : start + raw_lengths[i]], rng, vocabulary)
            example["inputs"] = np.concatenate([modes[i], example["inputs"]])
            inputs[row, : len(example["inputs"])] = example["inputs"]
            targets[row, : len(example["targets"])] = example["targets"]
        return inputs, targets

    return next_batch


def t5_maker(setting):
    sys.path.append(setting["t5_path"])
    import functools

    import seqio
    import tensorflow as tf
    from t5.data import preprocessors

    tokens, denoisers = np.load(setting["tokens"]), setting["denoisers"]
    feature = seqio.Feature(setting["vocabulary"].as_seqio(), add_eos=True)
    features = {"inputs": feature, "targets": feature}
    eos = [setting["vocabulary"].eos_id]

    def examples(denoiser):
        num_raw, mode = denoiser["raw_length"], tf.constant(denoiser["mode"], tf.int32)
        pieces = tokens[: len(tokens) // num_raw * num_raw].reshape(-1, num_raw)
        dataset = tf.data.Dataset.from_tensor_slices({"targets": pieces}).repeat()
        is_suffix = denoiser["suffix"] is not None
        density = denoiser["suffix"] if is_suffix else denoiser["noise_density"]
        dataset = preprocessors.denoise(
            dataset,
            features,
            noise_density=density,
            noise_mask_fn=functools.partial(
                preprocessors.random_spans_noise_mask,
                mean_noise_span_length=num_raw * density if is_suffix else denoiser["mean_span_length"],
            ),
            inputs_fn=preprocessors.drop_noise_tokens if is_suffix else preprocessors.noise_span_to_unique_sentinel,
            targets_fn=(
                preprocessors.drop_nonnoise_tokens if is_suffix else preprocessors.nonnoise_span_to_unique_sentinel
            ),
        )
        return dataset.map(
            lambda example: {
                "inputs": tf.concat([mode, example["inputs"], eos], 0),
                "targets": tf.concat([example["targets"], eos], 0),
            },
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    options = tf.data.Options()
    options.autotune.enabled = False
    options.threading.private_threadpool_size = options.threading.max_intra_op_parallelism = 1

    def batches(only):
        if only is None:
            weights = [denoiser["weight"] for denoiser in denoisers]
            dataset = tf.data.Dataset.sample_from_datasets([examples(d) for d in denoisers], weights, seed=0)
        else:
            dataset = examples(denoisers[only])
        return dataset.padded_batch(BATCH_SIZE, LENGTHS).with_options(options).as_numpy_iterator()

    iterators = {}

    def next_batch(only):
        if only not in iterators:
            iterators[only] = batches(only)
        batch = next(iterators[only])
        return batch["inputs"], batch["targets"]

    return next_batch


def fat5_maker(setting):
    """Runs in another Python, which has none of this file's imports but numpy."""
    sys.path.insert(0, setting["fat5_path"])
    import torch
    from src.data.data_collator_ul2 import DataCollatorForUL2MLM

    torch.set_num_threads(1)
    denoisers = setting["denoisers"]

    class Tokenizer:
        pad_token_id, eos_token_id = setting["pad_id"], setting["eos_id"]
        all_special_tokens = [f"<extra_id_{k}>" for k in range(len(setting["sentinels"]))]
        all_special_ids = setting["sentinels"]

        def encode(self, name, return_tensors):
            mode = next(denoiser["mode"] for denoiser in denoisers if denoiser["name"] == name)
            return np.array([[*mode, self.eos_token_id]])

    def options(denoiser):
        if denoiser["suffix"] is not None:
            # With a single span, 1 / mu is the share of the text that stays.
            return {"mu": 1 / (1 - denoiser["suffix"]), "r": denoiser["suffix"], "max_spans": 1}
        return {"mu": denoiser["mean_span_length"], "r": denoiser["noise_density"], "max_spans": 512}

    weights = [denoiser["weight"] for denoiser in denoisers]
    collator = DataCollatorForUL2MLM(
        tokenizer=Tokenizer(),
        max_length=setting["lengths"]["inputs"],
        max_labels_length=setting["lengths"]["targets"],
        batch_size=setting["batch_size"],
        denoiser_list=[{**options(denoiser), "prefix": denoiser["name"]} for denoiser in denoisers],
        denoiser_proportions=weights,
    )
    for i, denoiser in enumerate(denoisers):
        if denoiser["suffix"] is not None:
            collator.denoiser_optimal_len[i] = (denoiser["raw_length"] - 1, None)
    length = setting["piece"]
    tokens = np.load(setting["tokens"])
    pieces = tokens[: len(tokens) // length * length].reshape(-1, 1, length)
    drawn = np.random.default_rng(0)

    def next_batch(only):
        collator.denoiser_proportions = weights if only is None else np.eye(len(weights))[only]
        chosen = drawn.integers(0, len(pieces), setting["batch_size"]).tolist()
        batch = collator([{"input_ids": pieces[i], "length": length} for i in chosen])
        return batch["input_ids"].numpy(), batch["labels"].numpy()

    return next_batch


def mean_lengths(next_batch, setting, num_batches=2):
    """{denoiser: mean tokens of an example}; raw tokens are those of both sides that stand for text."""
    result = {}
    for number, denoiser in enumerate(setting["denoisers"]):
        batches = [next_batch(number) for _ in range(num_batches)]
        sides = [np.concatenate(side) for side in zip(*batches)]  # noqa: B905
        not_text = [setting["pad_id"], setting["eos_id"], -100, *denoiser["mode"], *setting["sentinels"]]
        lengths = [np.count_nonzero((side != setting["pad_id"]) & (side != -100)) for side in sides]
        raw = sum(np.count_nonzero(~np.isin(side, not_text)) for side in sides)
        values = dict(zip(("inputs", "targets", "raw"), (*lengths, raw)))  # noqa: B905
        result[denoiser["name"]] = {key: int(value) / len(sides[0]) for key, value in values.items()}
    return result


def examples_per_second(next_batch, setting):
    """Mean rates over at least `seconds`, after a quarter of that to warm up."""
    stop = time.perf_counter() + setting["seconds"] / 4
    while time.perf_counter() < stop:
        next_batch(None)
    examples, start, processor = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < setting["seconds"]:
        examples += len(next_batch(None)[0])
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return {"examples": examples / processor, "core_share": processor / seconds}


def measured_here(setting, job):
    """Figure of `job` = (maker, what to measure)."""
    os.sched_setaffinity(0, {CORE})
    maker, what = job
    return what(maker(setting), setting)


def measured_with_torch(setting, what):
    """The same of FAT5, in a Python that has torch and need not have this package."""
    names = ("tokens", "denoisers", "pad_id", "eos_id", "sentinels", "seconds", "fat5_path", "lengths", "batch_size")
    program = "\n".join(
        [
            "import json, os, sys, time",
            f"os.sched_setaffinity(0, {{{CORE}}})",
            "import numpy as np",
            inspect.getsource(fat5_maker),
            inspect.getsource(what),
            "setting = json.load(sys.stdin)",
            f"print(json.dumps({what.__name__}(fat5_maker(setting), setting)))",
        ]
    )
    done = subprocess.run(
        [setting["torch_python"], "-c", program],
        input=json.dumps({**{name: setting[name] for name in names}, "piece": PIECE}),
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measured_loader(setting, packing):
    """Figures per second of the whole host half, from the token cache to the batch."""
    os.sched_setaffinity(0, {CORE})
    batches = Batches(
        open_splits(setting),
        setting["mixture"],
        setting["vocabulary"],
        lengths=LENGTHS,
        layout=EncoderDecoder(),
        batch_size=BATCH_SIZE,
        seed=0,
        packing=packing,
    )
    step = warm_up = 4
    for i in range(warm_up):
        batches[i]
    examples = tokens = 0
    start, processor = time.perf_counter(), time.process_time()
    while time.perf_counter() - start < setting["seconds"]:
        batch = batches[step]
        examples += int(batch["encoder_segment_ids"].max(axis=1).sum())
        tokens += count_segments(batch)
        step += 1
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    raw = sum(sum(batches.raw_tokens(i).values()) for i in range(warm_up, step))
    return {
        "examples": examples / processor,
        "raw_tokens": raw / processor,
        "tokens": tokens / processor,
        "core_share": processor / seconds,
    }


def check_lengths(lengths):
    """Ends the benchmark if a maker's examples hold other amounts of text than ours: rates would say nothing."""
    for maker, denoisers in lengths.items():
        for name, values in denoisers.items():
            ours = lengths[OURS][name]
            if any(abs(value - ours[key]) > 0.01 * ours[key] + 2 for key, value in values.items()):
                raise SystemExit(f"{maker}: examples of {name} have {values} tokens, ours {ours}: not comparable.")


def run(setting, rounds):
    # Each maker with the function that measures it, and what that needs to know besides what is measured.
    makers = {OURS: lambda what: (measured_here, (our_maker, what))}
    if setting["fat5_path"]:
        makers[FAT5] = lambda what: (measured_with_torch, what)
    if setting["t5_path"]:
        makers[T5] = lambda what: (measured_here, (t5_maker, what))
    lengths = measure(setting, {name: job(mean_lengths) for name, job in makers.items()}, 1)
    lengths = {name: figures[0] for name, figures in lengths.items()}
    check_lengths(lengths)
    jobs = {name: job(examples_per_second) for name, job in makers.items()}
    figures = measure(setting, jobs | {name: (measured_loader, p) for p, name in LOADER.items()}, rounds)
    for name in makers:
        raw = sum(d["weight"] * lengths[name][d["name"]]["raw"] for d in setting["denoisers"])
        figures[name] = [{**figure, "raw_tokens": raw * figure["examples"]} for figure in figures[name]]
    rates = {name: {key: [f[key] for f in rounds] for key in rounds[0]} for name, rounds in figures.items()}
    return {
        "mean_lengths": lengths,
        "core_share": {name: rate.pop("core_share") for name, rate in rates.items()},
        "per_core_second": rates,
        "times_as_many_raw_tokens_as": {
            name: statistics.median(rates[OURS]["raw_tokens"]) / statistics.median(rates[name]["raw_tokens"])
            for name in makers
            if name != OURS
        },
    }


def torch_versions(torch_python):
    program = (
        "import importlib.metadata as m, json, platform; "
        "print(json.dumps({'python': platform.python_version()} "
        "| {p: m.version(p) for p in ('numpy', 'torch', 'transformers')}))"
    )
    return json.loads(subprocess.run([torch_python, "-c", program], stdout=subprocess.PIPE, check=True).stdout)


def peers(flags):
    """Versions of what is compared with."""
    versions = {}
    if flags.torch_python:
        versions[FAT5] = torch_versions(flags.torch_python)
        code = Path(flags.fat5_path, FAT5_COLLATOR).read_bytes()
        versions[FAT5]["sha256 of data_collator_ul2.py"] = hashlib.sha256(code).hexdigest()
    if flags.t5_path:
        found = importlib.metadata.distributions(name="t5", path=[flags.t5_path])
        versions[T5] = {"t5": next((package.version for package in found), None)}
    return versions


def differences():
    """The bullet points under 'What differs', a line each."""
    text = __doc__.partition("What differs:\n\n- ")[2].partition("\n\nBefore")[0]
    return [" ".join(point.split()) for point in text.split("\n- ")]


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sample = [str(ROOT / "data/sample" / f"{name}.jsonl.gz") for name in ("biomedical", "general")]
    parser.add_argument("--documents", nargs="+", default=sample, help="JSONL files, each a corpus at equal rate")
    parser.add_argument("--vocabulary_size", type=int, default=6000, help="pieces to train on the documents")
    parser.add_argument("--fat5_path", help="checkout of flashT5, to measure its collator too; needs --torch_python")
    parser.add_argument("--torch_python", help="a Python that has torch and transformers, for --fat5_path")
    parser.add_argument("--t5_path", help="folder with the t5 package, to measure it too")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default=str(RESULTS / "objectives.json"))
    flags = parser.parse_args()
    if bool(flags.fat5_path) != bool(flags.torch_python):
        parser.error("--fat5_path and --torch_python go together: give both or neither.")
    if flags.fat5_path and not Path(flags.fat5_path, FAT5_COLLATOR).exists():
        parser.error(f"--fat5_path={flags.fat5_path} has no {FAT5_COLLATOR}; give a checkout of flashT5.")
    if flags.torch_python and not shutil.which(flags.torch_python):
        parser.error(f"--torch_python={flags.torch_python} is no program; give a Python with torch and transformers.")
    if flags.t5_path and not Path(flags.t5_path, "t5/data/preprocessors.py").exists():
        parser.error(f"--t5_path={flags.t5_path} has no t5/data/preprocessors.py; see data_pipeline.py on making it.")
    return flags


def main():
    flags = parse_flags()
    corpora = [Corpus(Path(f).name.partition(".")[0], JsonlSource({"train": f})) for f in flags.documents]
    with tempfile.TemporaryDirectory() as cache_dir:
        vocabulary = Vocabulary(f"{cache_dir}/vocabulary.model", extra_ids=256)
        mixture = mixture_of_denoisers(corpora, denoisers=PRESET, mode_form="id")
        prepare([Phase(mixture)], vocabulary, cache_dir, vocabulary_size=flags.vocabulary_size)
        setting = {
            **{name: getattr(flags, name) for name in ("fat5_path", "torch_python", "t5_path", "seconds")},
            "cache_dir": cache_dir,
            "vocabulary": vocabulary,
            "mixture": mixture,
            "tokens": f"{cache_dir}/tokens.npy",
            "lengths": LENGTHS,
            "batch_size": BATCH_SIZE,
            "pad_id": vocabulary.pad_id,
            "eos_id": vocabulary.eos_id,
            "sentinels": vocabulary.sentinel_id(np.arange(vocabulary.num_sentinels)).tolist(),
        }
        setting["denoisers"] = denoisers_of(setting)
        splits = open_splits(setting)
        np.save(setting["tokens"], raw_tokens(splits))
        sizes = {split.corpus: {"documents": split.num_documents, "tokens": split.num_tokens} for split in splits}
        results = run(setting, flags.rounds)
    report = {
        "environment": environment("numpy", "grain", *(("seqio", "tensorflow") if flags.t5_path else ())),
        "peers": peers(flags),
        "corpora": sizes,
        "denoisers": setting["denoisers"],
        "preset": PRESET,
        "batch_size": BATCH_SIZE,
        "lengths": LENGTHS,
        "seconds": flags.seconds,
        "differences": differences(),
        **results,
    }
    Path(flags.output).parent.mkdir(parents=True, exist_ok=True)
    Path(flags.output).write_text(json.dumps(report, indent=1) + "\n")
    print_report(report)


def print_report(report):
    print("\n" + ", ".join(f"{name} {value}" for name, value in report["environment"].items()))
    for maker, denoisers in report["mean_lengths"].items():
        print(f"\n{maker}: mean tokens of an example")
        for name, values in denoisers.items():
            print(f"  {name:10} " + ", ".join(f"{key} {value:.2f}" for key, value in values.items()))
    print()
    for name, rates in report["per_core_second"].items():
        texts = [
            f"{statistics.median(figures):12,.0f} {key.replace('_', ' ')}/s ({min(figures):,.0f} … {max(figures):,.0f})"
            for key, figures in rates.items()
        ]
        print(f"{name:30}" + "".join(texts))
    for name, ratio in report["times_as_many_raw_tokens_as"].items():
        print(f"ours makes {ratio:.2f} times as many raw tokens per second as {name}")


if __name__ == "__main__":
    main()
