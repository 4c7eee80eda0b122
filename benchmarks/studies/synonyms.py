"""Do embeddings find a term by its synonym? Before and after learning from pairs, against the letters alone.

    python benchmarks/studies/synonyms.py --domain biomed.jsonl.gz --model base=FOLDER --model adapted=FOLDER
                                                                      (two cores: a quarter of an hour a model)
    … --steps 4 --queries 50 --report FILE   (a minute, shows nothing)

Documents are JSON lines with `title`, `synonyms` and `split`. A synonym of a test document asks, all titles of test
documents are searched. Each model is asked as it is (mean-pooled encoder states) and after `finetune` on the training
split's pairs with in-batch negatives; the letters are TF-IDF of character n-grams. Finished models are kept.
"""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
from study import ROOT, claim, parser, run_jobs, write_json

# isort: split
from common import RESULTS, environment  # study makes it findable
from meco_report import table

from t5x_domain.data.labelled import LabelledTask
from t5x_domain.errors import UserError
from t5x_domain.evaluation.downstream import TaskEvaluation, found_pairs
from t5x_domain.inference.embedding import Embedder
from t5x_domain.inference.heads import open_head
from t5x_domain.inference.opened import open_model
from t5x_domain.training.finetune_config import FineTuning
from t5x_domain.training.finetuning import finetune
from t5x_domain.training.optimizer import AdamW, Updates
from t5x_domain.training.schedule import linear

SPLITS = ("train", "validation", "test")
BATCH, LENGTH, RATE = 64, 24, 5e-4
PACKAGES = ("jax", "flax", "optax", "numpy", "scikit-learn")


def write_pairs(domain, folder, queries):
    """{split}.jsonl of (synonym, title) pairs, of the test split so many at most; returns how many pairs and titles."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = {split: [] for split in SPLITS}
    with gzip.open(domain, "rt", encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            others = sorted({name for name in record["synonyms"] if name.lower() != record["title"].lower()})
            pairs[record["split"]] += [{"text": name, "label": record["title"]} for name in others]
    kept = sorted(np.random.default_rng(0).permutation(len(pairs["test"]))[:queries])
    pairs["test"] = [pairs["test"][i] for i in kept]
    for split, found in pairs.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in found), encoding="utf-8")
    return {split: {"pairs": len(found), "titles": len({p["label"] for p in found})} for split, found in pairs.items()}


def task(folder, *splits):
    return LabelledTask("synonyms", {split: f"{folder}/{split}.jsonl" for split in splits}, kind="pairs")


def letters(data):
    """TF-IDF of the letters of words, two to four in a row."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    known = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    examples = task(data, "test").examples("test")
    known.fit([text for example in examples for text in (example.inputs, example.target)])
    return {"scores": found_pairs(lambda texts: known.transform(texts).toarray(), examples)}


def as_it_is(data, model):
    evaluation = TaskEvaluation([task(data, "test")], split="test", batch_size=BATCH)
    return {"scores": evaluation.scores(open_model(model))["synonyms"]}


def after_learning(data, model, out, steps):
    learnt = FineTuning(
        task(data, "train"),
        init_from=model,
        out_dir=out,
        updates=Updates(AdamW(), linear(RATE, steps, warmup_steps=steps // 10), clip_global_norm=1.0),
        head="task",
        steps=steps,
        batch_size=BATCH,
        lengths={"inputs": LENGTH, "targets": LENGTH},
    )
    if finetune(learnt):
        raise SystemExit("stopped; start the same command again")
    tuned = f"{out}/seed_0/model"
    scores = found_pairs(Embedder(open_head(tuned).model, batch_size=BATCH), task(data, "test").examples("test"))
    shutil.rmtree(tuned)
    return {"scores": scores}


def page(report):
    names = [name for name in report["scores"]["letters"] if name != "examples"]
    rows = [[arm, *(f"{scores[name]:.3f}" for name in names)] for arm, scores in report["scores"].items()]
    counts, versions = report["counts"], report["environment"]
    return f"""# Finding a term by its synonym

*Written by `benchmarks/studies/synonyms.py` on {versions["date"]}; no figure is left out.*

{counts["test"]["pairs"]:,} synonyms of test documents of {report["domain"]} ask for their titles, among
{counts["test"]["titles"]:,}. Each model is asked as it is and after {report["steps"]} steps of {BATCH} pairs of the
training split ({counts["train"]["pairs"]:,} pairs), with in-batch negatives (multiple-negatives ranking loss).

{table(["", *names], rows)}

AdamW, peak {RATE:g} with a linear decay, rows of {LENGTH} tokens, one seed. *Letters* is TF-IDF of character n-grams:
many synonyms are spelt much like their title, so it is hard to beat.
{versions["cpu"]}, {versions["cores"]} cores; {", ".join(f"{name} {versions[name]}" for name in PACKAGES)}.
"""


def main():
    flags = parser(__doc__, "runs/studies/synonyms")
    flags.add_argument("--domain", required=True, metavar="FILE")
    flags.add_argument("--model", required=True, action="append", metavar="NAME=FOLDER")
    flags.add_argument("--steps", type=int, default=400, help="of learning (default: 400)")
    flags.add_argument("--queries", type=int, default=3000, help="synonyms that ask (default: 3000)")
    flags.add_argument("--report", default=str(ROOT / "docs/studies/synonyms.md"), metavar="FILE")
    flags = flags.parse_args()
    models = {}
    for given in flags.model:
        name, _, folder = given.partition("=")
        if not folder:
            raise UserError(f"--model={given}: write NAME=FOLDER, the name for the table.")
        models[name] = str(Path(folder).resolve())
    work_dir = str(Path(flags.work_dir).resolve())
    claim(work_dir, {"domain": Path(flags.domain).name, "steps": flags.steps, "queries": flags.queries})
    data = f"{work_dir}/data"
    counts = write_pairs(flags.domain, Path(data), flags.queries)
    found = run_jobs(letters, {"letters": {"data": data}}, work_dir)
    for name, model in models.items():
        found |= run_jobs(as_it_is, {name: {"data": data, "model": model}}, work_dir, gpu=True)
        learning = {"data": data, "model": model, "out": f"{work_dir}/{name}", "steps": flags.steps}
        found |= run_jobs(after_learning, {f"{name}, after learning": learning}, work_dir, gpu=True)
    report = {
        "environment": environment(*PACKAGES),
        "domain": Path(flags.domain).name,
        "steps": flags.steps,
        "counts": counts,
        "scores": {arm: result["scores"] for arm, result in found.items()},
    }
    documentation = Path(flags.report).resolve() == (ROOT / "docs/studies/synonyms.md").resolve()
    write_json(RESULTS / "synonyms.json" if documentation else Path(flags.report).with_suffix(".json"), report)
    Path(flags.report).write_text(page(report), encoding="utf-8")
    print(page(report))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
