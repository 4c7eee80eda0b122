"""From the start of the program to the first update of a run that goes on, with and without kept compilations.

    python benchmarks/restart.py [--model gin/models/t5_1_1_small.gin] [--rounds 5]

T5 1.1 small in float32, batch 8, 128 inputs and 32 targets, from a checkpoint. Each start is a process of its own that
is killed after its first update, so that the next finds what this one found. The two arms take turns; ratios are taken
within rounds, and the median round counts. The figures are what the runs say of themselves in goodput.jsonl.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import RESULTS, environment

from t5x_domain.training.metrics import read_json_lines

ARMS = ("without", "with")
PARTS = ("start_up", "compile", "data_wait", "step")


def command(verb, model, folder, *flags):
    """A verb on the run that is measured, for 1,000 updates unless `flags` say otherwise."""
    bindings = {
        "RUN_DIR": repr(f"{folder}/run"),
        "CACHE_DIR": repr(f"{folder}/cache"),
        "VOCABULARY_FILE": repr(f"{folder}/cache/vocabulary.model"),
        "ModelConfig.dtype": "'float32'",
        "BATCH_SIZE": 8,
        "LENGTHS": {"inputs": 128, "targets": 32},
        "Run.eval_batches": 1,
        "TRAIN_STEPS": 1000,
    }
    files = [model, "gin/mixtures/sample.gin", "gin/runs/pretrain.gin"]
    return [
        *(sys.executable, "-m", f"t5x_domain.{verb}"),
        *(f"--gin_file={file}" for file in files),
        *(f"--gin.{name}={value}" for name, value in bindings.items()),
        *flags,
    ]


def first_update(model, folder, arm):
    """Seconds by cause of a start until its first update, and in all."""
    keep = {"JAX_ENABLE_COMPILATION_CACHE": str(arm == "with").lower()}
    start = subprocess.Popen(
        command("train", model, folder), env={**os.environ, **keep}, stdout=subprocess.PIPE, text=True
    )
    for line in start.stdout:
        if line.startswith("first update"):
            break
    start.kill()
    start.communicate()
    last = read_json_lines(folder / "run" / "goodput.jsonl")[-1]
    return {"first_update": last["first_step_seconds"], **{part: last["seconds"][part] for part in PARTS}}


def median(rounds, arm, part):
    """Of the rounds."""
    return statistics.median(each[arm][part] for each in rounds)


def main():
    """Measures, prints and writes results/restart.json."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="gin/models/t5_1_1_small.gin")
    arguments.add_argument("--rounds", type=int, default=5)
    flags = arguments.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        quiet = {"check": True, "stdout": subprocess.DEVNULL}
        subprocess.run(command("prepare", flags.model, folder), **quiet)
        subprocess.run(command("train", flags.model, folder, "--gin.TRAIN_STEPS=1"), **quiet)
        first_update(flags.model, folder, "with")  # what a start from a checkpoint alone compiles is kept as well
        rounds = [{arm: first_update(flags.model, folder, arm) for arm in ARMS} for _ in range(flags.rounds)]
        kept = sum(file.stat().st_size for file in (folder / "run" / "compilation_cache").iterdir())
    finally:
        shutil.rmtree(folder)
    report = {
        "environment": environment("jax", "jaxlib", "orbax-checkpoint"),
        "model": flags.model,
        "seconds": {arm: {part: median(rounds, arm, part) for part in ("first_update", *PARTS)} for arm in ARMS},
        "times_faster": statistics.median(
            each["without"]["first_update"] / each["with"]["first_update"] for each in rounds
        ),
        "kept_bytes": kept,
        "rounds": rounds,
    }
    (RESULTS / "restart.json").write_text(json.dumps(report, indent=1) + "\n")
    for arm, seconds in report["seconds"].items():
        print(f"{arm} kept compilations: " + ", ".join(f"{part} {value:.1f} s" for part, value in seconds.items()))
    print(f"{report['times_faster']:.2f} times faster; {kept / 1e6:.1f} MB kept")


if __name__ == "__main__":
    main()
