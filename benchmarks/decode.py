"""Tokens per second that a real model writes, ours against transformers on torch, in the same run.

    python benchmarks/decode.py --model FOLDER --torch_python PATH

FOLDER is a T5 as Hugging Face keeps it, e.g. flan-t5-small; PATH a Python with torch and transformers. Both read the
same definitions of the shipped sample, in float32, and write the same number of tokens (the end of a sequence is left
to nobody, so that no row stops early). Rounds interleave the two; ratios are taken within rounds, and the tokens that
both wrote are compared.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import time
from types import SimpleNamespace

import jax
import numpy as np
from common import RESULTS, environment

from t5x_domain.data.sources import JsonlSource
from t5x_domain.inference.decoding import Decoding
from t5x_domain.inference.generator import Generator
from t5x_domain.inference.opened import open_model

MAX_TOKENS = 64
SAMPLE = "data/sample/biomedical.jsonl.gz"
SETTINGS = {
    "greedy, batch 8": {"batch_size": 8, "num_beams": 1},
    "greedy, batch 1": {"batch_size": 1, "num_beams": 1},
    "greedy, batch 32": {"batch_size": 32, "num_beams": 1},
    "4 beams, batch 8": {"batch_size": 8, "num_beams": 4},
}


def definitions(vocabulary, count):
    """The first test documents, asked for a summary, at most 128 tokens each."""
    source = JsonlSource(files={"test": SAMPLE}, split_field="split")
    texts = (document.text for document in source.documents("test"))
    eos = np.array([vocabulary.eos_id], np.int32)
    return [
        np.append(vocabulary.encode(f"summarize: {text}")[:127], eos)
        for text, _ in zip(texts, range(count), strict=False)
    ]


def ours(model, inputs, setting, repeats):
    """Seconds of each call after the first, and the tokens written."""
    endless = SimpleNamespace(eos_id=-1, vocab_size=model.blueprint.config.vocab_size, decode=lambda ids: "")
    decoding = Decoding(max_tokens=MAX_TOKENS, num_beams=setting["num_beams"])
    model = dataclasses.replace(model, vocabulary=endless)
    generator = Generator(model, decoding, batch_size=setting["batch_size"])
    tokens, seconds = [o[0].tokens.tolist() for o in generator(inputs)], []
    for _ in range(repeats):
        began = time.perf_counter()
        generator(inputs)
        seconds.append(time.perf_counter() - began)
    return seconds, tokens


def theirs(python, folder, inputs, setting, repeats):
    """The same of transformers."""
    asked = {
        "folder": folder,
        "inputs": [row.tolist() for row in inputs],
        "max_tokens": MAX_TOKENS,
        "num_beams": setting["num_beams"],
        "repeats": repeats,
        "threads": environment()["cores"],
    }
    command = [python, "benchmarks/torch_decode.py"]
    done = subprocess.run(command, input=json.dumps(asked) + "\n", capture_output=True, text=True, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    return report["seconds"], report["tokens"], report["versions"]


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", required=True, help="folder of a T5")
    arguments.add_argument("--torch_python", required=True, help="interpreter with torch and transformers")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--repeats", type=int, default=3, help="timed calls in a round")
    arguments.add_argument("--output", default=str(RESULTS / "decode.json"))
    flags = arguments.parse_args()

    model = open_model(flags.model, dtype="float32")
    rows, versions = [], {}
    for name, setting in SETTINGS.items():
        inputs = definitions(model.vocabulary, setting["batch_size"])
        ratios, rates, same = [], [], []
        for _ in range(flags.rounds):
            our_seconds, our_tokens = ours(model, inputs, setting, flags.repeats)
            their_seconds, their_tokens, versions = theirs(
                flags.torch_python, flags.model, inputs, setting, flags.repeats
            )
            ratios.append(statistics.median(their_seconds) / statistics.median(our_seconds))
            rates.append(MAX_TOKENS * len(inputs) / statistics.median(our_seconds))
            same.append(float(np.mean(np.array(our_tokens) == np.array(their_tokens))))
        row = {
            "setting": name,
            "times_transformers": statistics.median(ratios),
            "rounds": ratios,
            "tokens_per_second": statistics.median(rates),
            "same_tokens": min(same),
        }
        print(
            f"{name}: {row['tokens_per_second']:,.0f} tokens/s, {row['times_transformers']:.2f} times transformers "
            f"({min(ratios):.2f} to {max(ratios):.2f}), {row['same_tokens']:.1%} of tokens the same",
            flush=True,
        )
        rows.append(row)
    result = {
        "environment": environment("jax", "flax") | versions | {"device": jax.devices()[0].device_kind},
        "max_tokens": MAX_TOKENS,
        "rows": rows,
    }
    with open(flags.output, "w", encoding="utf-8") as file:
        file.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
