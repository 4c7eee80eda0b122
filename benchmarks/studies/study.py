"""What the studies share: jobs in processes of their own whose results are kept, and statistics over seeds.

A study is a list of jobs, e.g. one for each objective and seed. Every result is kept in the work folder as soon as it
is there, so the same command goes on where an interrupted one stopped.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import queue
import statistics
import sys
import time
import traceback
from pathlib import Path

from scipy import stats

from t5x_domain.errors import UserError
from t5x_domain.files import changed_keys

ROOT = Path(__file__).parent.parent.parent
SPLITS = ("train", "validation", "test")
sys.path.append(str(ROOT / "benchmarks"))  # for `common`
# One core each: XLA's thread pools cost small models more than they give.
_ONE_CORE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def parser(description, work_dir):
    """The flags of every study; a study adds its own."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--work_dir", default=work_dir, help="caches, runs and kept results (default: %(default)s)")
    result.add_argument("--workers", type=int, help="jobs at once (default: one for each core; with --gpu one)")
    result.add_argument("--gpu", action="store_true", help="leave the device and the cores to JAX")
    result.add_argument("--report_only", action="store_true", help="write the report of the results that are kept")
    return result


def write_json(path, value):
    """Whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def write_records(path, records, most):
    """Records as JSONL, of each split that `most` {split: number} limits the first so many; {split: how many}."""
    counts, path = dict.fromkeys(SPLITS, 0), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            split = record["split"]
            if most.get(split) is None or counts[split] < most[split]:
                counts[split] += 1
                file.write(json.dumps(record) + "\n")
    return {split: count for split, count in counts.items() if count}


def claim(work_dir, setting):
    """Makes the work folder, or checks that what is kept there is of the same setting (plain JSON)."""
    record = Path(work_dir, "setting.json")
    setting = json.loads(json.dumps(setting))
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        if changed := changed_keys(before, setting):
            raise UserError(
                f"{work_dir} holds results of another setting ({changed[0]} was {before.get(changed[0])!r}, is "
                f"{setting.get(changed[0])!r}); set another --work_dir."
            )
    write_json(record, setting)


def kept(work_dir, names):
    """{name: result} of the jobs that are done."""
    files = {name: Path(work_dir, "results", f"{name}.json") for name in names}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def run_jobs(function, jobs, work_dir, *, workers=None, gpu=False):
    """Calls function(**arguments), which must be importable, for every job that is not done yet.

    Args:
      function: returns plain JSON. It runs in a process of its own, on a core of its own unless `gpu`; what it prints
        goes to work_dir/logs/.
      jobs: {name: arguments}, done in this order.
      work_dir: where results are kept.
      workers: jobs at once.
      gpu: whether jobs share a device and all cores.

    Returns:
      {name: result}.

    Raises:
      RuntimeError: some jobs failed; their logs are named.
    """
    work_dir = Path(work_dir).resolve()
    for folder in ("logs", "results"):
        (work_dir / folder).mkdir(parents=True, exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(work_dir / "compiled")
    if not gpu:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_ONE_CORE}".strip()
        os.environ["JAX_PLATFORMS"] = "cpu"
    cores = sorted(os.sched_getaffinity(0))
    slots = queue.Queue()
    for number in range(workers or (1 if gpu else len(cores))):
        slots.put(set(cores) if gpu else {cores[number % len(cores)]})
    todo = [name for name in jobs if name not in kept(work_dir, jobs)]
    start, done = time.monotonic(), []

    def one(name):
        slot = slots.get()
        os.sched_setaffinity(0, slot)  # of this thread; its child begins with the same
        began = time.monotonic()
        process = multiprocessing.get_context("spawn").Process(
            target=_in_process, args=(function, jobs[name], work_dir, name)
        )
        process.start()
        process.join()
        slots.put(slot)
        done.append(name)
        print(
            f"{len(done)}/{len(todo)} {name}: {'done' if process.exitcode == 0 else 'FAILED'} in "
            f"{time.monotonic() - began:.0f} s, {(time.monotonic() - start) / 60:.1f} min in all",
            flush=True,
        )
        return process.exitcode

    with concurrent.futures.ThreadPoolExecutor(slots.qsize()) as threads:
        codes = dict(zip(todo, threads.map(one, todo), strict=True))
    if failed := [name for name, code in codes.items() if code]:
        raise RuntimeError(f"failed: {', '.join(failed)}; see {work_dir / 'logs'}/{failed[0]}.log")
    return kept(work_dir, jobs)


def _in_process(function, arguments, work_dir, name):
    with open(work_dir / "logs" / f"{name}.log", "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            start = time.monotonic()
            result = function(**arguments)
            write_json(work_dir / "results" / f"{name}.json", {**result, "seconds": round(time.monotonic() - start, 1)})
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)


def interval(values):
    """Mean of independent values and its 95 % confidence interval after Student; None where there is just one value."""
    values = [float(value) for value in values]
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None, "n": len(values)}
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(values)}


def paired(ours, theirs):
    """`interval` of the differences ours - theirs, {seed: value} each, over the seeds that both have."""
    return interval([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def verdict(difference, *, expected_sign):
    """'holds' or 'reversed' if the interval excludes 0 on the expected or the other side, else 'not resolved'."""
    if difference["low"] is None or difference["low"] <= 0 <= difference["high"]:
        return "not resolved"
    return "holds" if math.copysign(1, difference["mean"]) == expected_sign else "reversed"


def shown(value, digits=3, *, signed=False):
    """'0.512 ± 0.014', or the mean alone."""
    mean = f"{value['mean']:{'+' if signed else ''}.{digits}f}".replace("-", "−")
    return mean if value["low"] is None else f"{mean} ± {value['high'] - value['mean']:.{digits}f}"


def tf_idf_baseline(task):
    """TF-IDF of words and pairs of words with logistic regression; its strength is chosen on validation items.

    Returns `C`, and `scores` and `predictions` {id: label} of the test split of a classification task.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    data = {split: task.examples(split) for split in SPLITS}
    texts = {split: [example.inputs for example in examples] for split, examples in data.items()}
    best = None
    for strength in (1.0, 10.0, 100.0):
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        model = make_pipeline(vectorizer, LogisticRegression(C=strength, max_iter=2000))
        model.fit(texts["train"], [example.target for example in data["train"]])
        value = task.score(data["validation"], model.predict(texts["validation"]).tolist())["macro_f1"]
        if best is None or value > best[0]:
            best = value, strength, model.predict(texts["test"]).tolist()
    ids = [example.id for example in data["test"]]
    return {
        "C": best[1],
        "scores": task.score(data["test"], best[2]),
        "predictions": dict(zip(ids, best[2], strict=True)),
    }
