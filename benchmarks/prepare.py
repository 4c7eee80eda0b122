"""How long a token cache takes: in one process, and with Beam's workers side by side. All must give the same bytes.

    python benchmarks/prepare.py

Every file holds the shipped sample's documents (10 MB); the vocabulary has 6,000 SentencePiece pieces. The ways take
turns; the fastest round counts, since what else the machine does can only slow them down.
"""

import argparse
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import RESULTS, environment

from t5x_domain.data.vocabulary import train_sentencepiece

ROOT = Path(__file__).parent.parent
GIN = """
include 'gin/mixtures/sample.gin'
CORPORA = [@law/Corpus()]
law/Corpus.name = 'law'
law/Corpus.source = @law/JsonlSource()
law/JsonlSource.files = {{'train': '{folder}/law-*.jsonl'}}
JsonlSource.split_field = None
VOCABULARY_FILE = '{folder}/law.model'
VOCABULARY_SIZE = 6000
prepare.num_shards = 16
prepare.inputs_length = None
"""
WAYS = {"one process": []} | {
    f"Beam, {number} workers": ["--runner=DirectRunner", f"--num_workers={number}"] for number in (1, 2, 4)
}


def write_corpus(folder, files):
    lines = []
    for name in ("biomedical", "general"):
        with gzip.open(ROOT / f"data/sample/{name}.jsonl.gz", "rt") as file:
            lines += file.readlines()
    train_sentencepiece((json.loads(line)["text"] for line in lines), f"{folder}/law.model", 6000)
    for number in range(files):
        Path(folder, f"law-{number:02d}.jsonl").write_text("".join(lines))
    return files * sum(len(line.encode()) for line in lines)


def prepare(folder, out, flags):
    """Seconds of a whole `prepare`, its start included, and a digest of what it wrote."""
    program = [sys.executable, "-m", "t5x_domain.prepare", f"--gin_file={folder}/law.gin", f"--gin.CACHE_DIR='{out}'"]
    begin = time.perf_counter()
    subprocess.run([*program, *flags], check=True, capture_output=True, cwd=ROOT)
    seconds = time.perf_counter() - begin
    digest = hashlib.sha256()
    for path in sorted(Path(out, "law").iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return seconds, digest.hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default=str(RESULTS / "prepare.json"))
    flags = parser.parse_args()
    ways = {name: way for name, way in WAYS.items() if not way or int(way[1].partition("=")[2]) <= os.cpu_count()}
    seconds, digests = {name: [] for name in ways}, set()
    with tempfile.TemporaryDirectory() as folder:
        size = write_corpus(folder, flags.files)
        Path(folder, "law.gin").write_text(GIN.format(folder=folder))
        for number in range(flags.rounds):
            for name, way in ways.items():
                taken, digest = prepare(folder, f"{folder}/{number}{''.join(way)}", way)
                seconds[name].append(round(taken, 1))
                digests.add(digest)
                print(f"{name:20} {taken:7.1f} s", flush=True)
    assert len(digests) == 1, "the ways differ in what they write"
    best = {name: min(taken) for name, taken in seconds.items()}
    report = {
        "environment": environment("apache-beam", "sentencepiece", "array_record"),
        "corpus": {"files": flags.files, "megabytes": round(size / 1e6, 1)},
        "seconds": seconds,
        "speed_up": {name: round(best["one process"] / taken, 2) for name, taken in best.items()},
        "load_average_at_the_end": os.getloadavg()[0],
    }
    Path(flags.output).write_text(json.dumps(report, indent=1) + "\n")
    print(report["speed_up"])


if __name__ == "__main__":
    main()
