"""Does a real model become better in a real domain, better than any continued training would make it?

    python benchmarks/studies/case_study.py --model FOLDER --domain biomed.jsonl.gz --general general.jsonl.gz \\
        --task mondo_body_system.tsv.gz                              (two cores: about two hours)
    … --setting smoke   (minutes, shows nothing)        … --setting gpu        … --report_only

FOLDER is an encoder-decoder as Hugging Face keeps it with its spiece.model, here flan-t5-small. Three arms:

    base      the model as it is
    control   goes on with UL2's denoisers on general text alone
    adapted   goes on for as many steps on the domain, with a tenth of general text against forgetting

The control matters: a model that has lost denoising gains by any continued training. What control and adapted share is
no merit of the domain. All arms are compared on held-out text of both kinds, a labelled task against TF-IDF with
logistic regression, and on writing the term that a definition defines. Every stage is kept and an interrupted one goes
on, so the same command may be given again.
"""

import csv
import dataclasses
import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
from case_study_report import ARMS, PAIRS, write_report
from study import ROOT, SPLITS, claim, kept, parser, run_jobs, tf_idf_baseline, write_records

from t5x_domain.adaptation.finetune_config import FineTuning
from t5x_domain.adaptation.finetuning import finetune
from t5x_domain.conversion.formats import open_checkpoint
from t5x_domain.data.curriculum import Phase
from t5x_domain.data.labelled import LabelledTask
from t5x_domain.data.mixtures import mixture_of_denoisers
from t5x_domain.data.preparation import prepare
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Corpus
from t5x_domain.errors import UserError
from t5x_domain.evaluation import metrics
from t5x_domain.evaluation.fine_tuned import FineTuned
from t5x_domain.evaluation.head_to_head import HeadToHead, head_to_head
from t5x_domain.inference.decoding import Decoding
from t5x_domain.training.checkpoint import Retention
from t5x_domain.training.loop import train
from t5x_domain.training.metrics import read_json_lines
from t5x_domain.training.optimizer import Adafactor, AdamW, Updates
from t5x_domain.training.run import Run
from t5x_domain.training.schedule import constant, linear

RATES = {"adapted": {"domain": 0.9, "general": 0.1}, "control": {"general": 1.0}}
CLASSIFIED = ("accuracy", "macro_f1")
WRITTEN = ("exact_match", "token_f1", "rougeL")


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes. `documents` and `items` are the most of a split of each corpus and of the labelled task, None for all."""

    documents: int | None = None
    items: int | None = None
    steps: int = 265
    rows: int = 8
    lengths: tuple[int, int] = (512, 160)
    denoisers: str = "ul2_442"
    learning_rate: float = 2e-3
    dtype: str = "float32"
    scored: int = 300  # held-out documents of each corpus
    seeds: int = 3
    task_epochs: float = 2
    task_inputs: int = 64
    task_rows: int = 16
    task_learning_rate: float = 5e-4
    term_examples: int = 2000
    term_items: int = 300
    term_epochs: float = 1
    resamples: int = 10_000


SETTINGS = {
    "smoke": Setting(
        documents=200,
        items=24,
        steps=2,
        rows=2,
        lengths=(128, 64),
        scored=8,
        seeds=2,
        task_epochs=1,
        task_rows=8,
        term_examples=16,
        term_items=8,
        resamples=200,
    ),
    "full": Setting(),
    "gpu": Setting(
        steps=3000,
        rows=32,
        dtype="bfloat16",
        seeds=5,
        task_epochs=5,
        task_inputs=128,
        term_examples=4000,
        term_epochs=3,
    ),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """What all stages share; plain values, so that a stage's process gets it whole."""

    setting: Setting
    model: str
    domain: str
    general: str
    task: str
    work_dir: str

    def path(self, *names):
        return str(Path(self.work_dir, *names))

    def corpus(self, name):
        return Corpus(name, JsonlSource(dict.fromkeys(SPLITS, self.path("data", f"{name}.jsonl")), split_field="split"))

    def phases(self, arm):
        corpora, rates = [self.corpus(name) for name in RATES[arm]], list(RATES[arm].values())
        return [Phase(mixture_of_denoisers(corpora, denoisers=self.setting.denoisers, rates=rates))]

    def arm(self, arm):
        """Where the model of an arm is."""
        return self.model if arm == "base" else self.path("runs", arm)

    def run(self, arm):
        setting, checkpoint = self.setting, open_checkpoint(self.model)
        return Run(
            run_dir=self.arm(arm),
            model=checkpoint.model,
            config=dataclasses.replace(checkpoint.config, dtype=setting.dtype, dropout_rate=0.0),
            phases=self.phases(arm),
            vocabulary=checkpoint.vocabulary,
            cache_dir=self.path("cache"),
            lengths=dict(zip(("inputs", "targets"), setting.lengths, strict=True)),
            updates=Updates(Adafactor(), constant(setting.learning_rate, setting.steps // 10), clip_global_norm=1.0),
            total_steps=setting.steps,
            batch_size=setting.rows,
            packing="first_fit",
            init_from=self.model,
            eval_batches=1,  # the study scores for itself
            checkpoint_every=min(100, setting.steps),
            retention=Retention(last=1),
        )

    def tuning(self, task, arm):
        """The fine-tuning of an arm on "body_system" or "terms"."""
        setting, classifies = self.setting, task == "body_system"
        file = self.path("data", f"{task}.jsonl")
        peak, epochs = setting.task_learning_rate, setting.task_epochs if classifies else setting.term_epochs
        if classifies:
            labels = sorted({record["label"] for record in read_json_lines(Path(file))})
            labelled = LabelledTask(task, dict.fromkeys(SPLITS, file), labels=labels, split_field="split")
        else:
            labelled = LabelledTask(
                task,
                dict.fromkeys(("train", "test"), file),
                kind="text_to_text",
                input_template="Which term is defined? {text}",
                metrics=WRITTEN,
                split_field="split",
            )
        steps = max(1, int(epochs * len(labelled.examples("train")) / setting.task_rows))
        return FineTuning(
            labelled,
            init_from=self.arm(arm),
            out_dir=self.path(task, arm),
            updates=Updates(AdamW(), linear(peak, steps, warmup_steps=steps // 10), clip_global_norm=1.0),
            head="task" if classifies else "text",
            steps=steps,
            batch_size=setting.task_rows,
            lengths={"inputs": setting.task_inputs if classifies else 96, "targets": 24},
            seeds=range(setting.seeds) if classifies else (0,),
            decoding=Decoding(max_tokens=24),
        )


def write_data(study):
    """Corpora and tasks as JSONL, each split cut to the setting's size; returns how much there is of each."""
    setting, counts = study.setting, {}
    for name, file in (("domain", study.domain), ("general", study.general)):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            counts[name] = _write(study, name, map(json.loads, lines), setting.documents)
    with gzip.open(study.task, "rt", encoding="utf-8", newline="") as lines:
        records = csv.DictReader(lines, delimiter="\t")  # `text` is the definition without its term
        counts["body_system"] = _write(study, "body_system", records, setting.items)
    counts["terms"] = _write(study, "terms", _terms(study), None)
    if set(counts["terms"]) != {"train", "test"}:
        raise UserError(f"{study.domain}: its test split has too few documents 'title. definition' to write terms of.")
    return counts


def _write(study, name, records, most):
    return write_records(study.path("data", f"{name}.jsonl"), records, dict.fromkeys(SPLITS, most))


def _terms(study):
    """Definitions of documents that no arm has learnt from, in two parts, each definition and each term once."""
    found, terms = {}, set()
    for document in study.corpus("domain").source.documents("test"):
        title = document.metadata["title"]
        definition = document.text.removeprefix(f"{title}. ")
        if definition != document.text and title.lower() not in terms:
            terms.add(title.lower())
            found.setdefault(definition, title)
    items, setting = sorted(found.items()), study.setting
    wanted = setting.term_items + setting.term_examples
    chosen = [items[i] for i in np.random.default_rng(0).permutation(len(items))[:wanted]]
    for number, (definition, title) in enumerate(chosen):
        split = "test" if number < setting.term_items else "train"
        yield {"id": f"term{number}", "split": split, "text": definition, "label": title}


def prepare_corpora(study):
    """Token caches with the model's own vocabulary; its advice on lengths stands in the log."""
    phases = [phase for arm in RATES for phase in study.phases(arm)]
    vocabulary = open_checkpoint(study.model).vocabulary
    caches = prepare(phases, vocabulary, study.path("cache"), inputs_length=study.setting.lengths[0])
    return {cache.manifest["corpus"]: cache.split("train").num_tokens for cache in caches}


def train_arm(study, arm):
    """Continued training; returns the first and last loss that was logged."""
    if train(study.run(arm)):
        raise SystemExit("stopped; start the same command again")
    losses = [line["loss"] for line in read_json_lines(Path(study.arm(arm), "metrics.jsonl")) if "loss" in line]
    return {"first_loss": losses[0], "last_loss": losses[-1]}


def fine_tune(study, task, arm):
    """Scores over seeds. The fine-tuned models, a third of a gigabyte each, are not kept."""
    if finetune(study.tuning(task, arm)):
        raise SystemExit("stopped; start the same command again")
    for model in Path(study.path(task, arm)).glob("seed_*/model"):
        shutil.rmtree(model)
    summary = json.loads(Path(study.path(task, arm, "summary.json")).read_text(encoding="utf-8"))
    return {"scores": summary["scores"]["test"]}


def tf_idf(study):
    return tf_idf_baseline(study.tuning("body_system", "base").task)


def compare_arms(study, base, adapted):
    """Held-out text and the labelled task through `compare`, the terms by a paired bootstrap of their items."""
    tuned = [
        FineTuned(f"body_system {metric}", study.path("body_system", base), study.path("body_system", adapted), metric)
        for metric in CLASSIFIED
    ]
    settings = HeadToHead(
        study.path("verdicts", f"{adapted}_vs_{base}"),
        domain_corpora=[study.corpus("domain")],
        general_corpora=[study.corpus("general")],
        max_documents=study.setting.scored,
        fine_tuned=tuned,
        training_runs={arm: study.arm(arm) for arm in (base, adapted) if arm != "base"},
        resamples=study.setting.resamples,
    )
    report = head_to_head(settings, study.arm(base), study.arm(adapted))
    targets, theirs = _written(study, base)
    same, ours = _written(study, adapted)
    assert targets == same
    terms = {
        metric: dataclasses.asdict(metrics.compare(metric, targets, theirs, ours, resamples=study.setting.resamples))
        for metric in WRITTEN
    }
    return {"verdict": json.loads(report.with_name("verdict.json").read_text(encoding="utf-8")), "terms": terms}


def _written(study, arm):
    lines = read_json_lines(Path(study.path("terms", arm, "seed_0", "predictions-test.jsonl")))
    return [line["target"] for line in lines], [line["prediction"] for line in lines]


def stages(study):
    """(function, {job: arguments}) in the order in which they need one another."""
    yield write_data, {"data": {"study": study}}
    yield prepare_corpora, {"prepare": {"study": study}}
    yield tf_idf, {"tf_idf": {"study": study}}
    yield train_arm, {f"train-{arm}": {"study": study, "arm": arm} for arm in RATES}
    for task in ("body_system", "terms"):
        yield fine_tune, {f"{task}-{arm}": {"study": study, "task": task, "arm": arm} for arm in ARMS}
    yield (
        compare_arms,
        {f"{ours}_vs_{theirs}": {"study": study, "base": theirs, "adapted": ours} for ours, theirs in PAIRS},
    )


def main():
    flags = parser(__doc__, None)
    flags.add_argument("--model", required=True, metavar="FOLDER")
    for name in ("domain", "general", "task"):
        flags.add_argument(f"--{name}", required=True, metavar="FILE")
    flags.add_argument("--setting", choices=SETTINGS, default="full")
    flags.add_argument("--report", metavar="FILE", help="default: docs/case_study.md; of a smoke test in --work_dir")
    flags = flags.parse_args()
    smoke, ours = flags.setting == "smoke", ROOT / "docs/case_study.md"
    work_dir = str(Path(flags.work_dir or f"runs/studies/case_study_{flags.setting}").resolve())
    report = Path(flags.report or (f"{work_dir}/case_study.md" if smoke else ours)).resolve()
    if smoke and report == ours.resolve():
        raise UserError(f"--report={flags.report}: a smoke test shows nothing; name another file.")
    paths = [str(Path(path).resolve()) for path in (flags.model, flags.domain, flags.general, flags.task)]
    study = Study(SETTINGS[flags.setting], *paths, work_dir)
    if not flags.report_only:
        names = {name: Path(getattr(study, name)).name for name in ("model", "domain", "general", "task")}
        claim(work_dir, {"setting": dataclasses.asdict(study.setting), **names})
        if flags.setting != "gpu":
            os.environ["JAX_PLATFORMS"] = "cpu"
        for function, jobs in stages(study):  # one job at a time with every core, on a processor as well
            run_jobs(function, jobs, work_dir, workers=flags.workers, gpu=True)
    names = [name for _, jobs in stages(study) for name in jobs]
    found = kept(work_dir, names)
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{work_dir} has no result of '{missing[0]}' yet; run the study without --report_only.")
    write_report(study, flags.setting, found, report)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
