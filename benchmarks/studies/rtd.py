"""Does detection of replaced tokens teach an encoder more than masked language modelling at equal compute, and is it
because every token is learnt from?

    python benchmarks/studies/rtd.py --corpus biomed.jsonl.gz --task mondo_body_system.tsv.gz    (two cores: an hour)
    … --setting smoke   (a few minutes, shows nothing)        … --setting gpu --gpu        … --report_only

Clark et al. 2020, "ELECTRA" (arXiv:2003.10555), section 3.4, trace the gain to the loss over all tokens: with the loss
at the masked ones alone ("ELECTRA 15%") most of it is gone. Encoders of one shape learn from scratch:

    none        nothing: they are fine-tuned as they are drawn
    mlm         masked language modelling
    rtd_masked  replaced-token detection, detecting at the masked positions only
    rtd_tied    replaced-token detection over all tokens; the generator's embedding is the discriminator's
    rtd_gdes    the same with gradient-disentangled embedding sharing (DeBERTaV3)

The arms compute alike: updates cost what they cost by formula, generator, sampling and output layer included, and each
arm has as many as fit into the same sum. Then all are fine-tuned alike on a labelled task of the domain. What is
finished is kept, so the same command goes on where it was stopped.
"""

import csv
import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import jax
import numpy as np
from rtd_arms import ARMS, NO_PRETRAINING, SETTINGS, Study
from rtd_report import write_report
from study import claim, kept, parser, run_jobs, tf_idf_baseline, write_records

from t5x_domain.adaptation.finetuning import finetune
from t5x_domain.conversion.checkpoint import Checkpoint
from t5x_domain.conversion.formats import write_checkpoint
from t5x_domain.conversion.layout import leaves
from t5x_domain.conversion.tensors import Tensor
from t5x_domain.data.preparation import prepare
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import EncoderOnly
from t5x_domain.models.names import path_name
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.training.loop import train
from t5x_domain.training.metrics import read_json_lines
from t5x_domain.training.state import Blueprint


def prepare_data(study):
    """Corpus and task as JSONL, vocabulary and token cache, and the lexical baseline of the task."""
    setting = study.setting
    with gzip.open(study.corpus_file, "rt", encoding="utf-8") as lines:
        most = dict.fromkeys(("train", "validation"), setting.documents)
        documents = write_records(study.path("data", "corpus.jsonl"), map(json.loads, lines), {**most, "test": 0})
    with gzip.open(study.task_file, "rt", encoding="utf-8", newline="") as lines:
        records = list(csv.DictReader(lines, delimiter="\t"))  # `text` is the definition without its term
    # In the file's order, that of ids, the first ones lack a class.
    drawn = (records[i] for i in np.random.default_rng(0).permutation(len(records)))
    examples = write_records(study.path("data", "task.jsonl"), drawn, {"train": setting.examples})
    (cache,) = prepare(
        study.phases("mlm"),
        study.vocabulary,
        study.path("cache"),
        vocabulary_size=setting.vocabulary,
        inputs_length=None,
    )
    return {
        "documents": documents,
        "tokens": cache.split("train").num_tokens,
        "examples": examples,
        "tf_idf": tf_idf_baseline(study.task),
    }


def pretrain(study, arm, seed):
    """Trains an encoder, or writes one that is not trained; returns what was learnt when, of held-out text."""
    if arm == NO_PRETRAINING:
        return write_untrained(study, seed)
    run = study.run(arm, seed)
    if train(run):
        raise SystemExit("stopped; start the same command again")
    folder = Path(run.run_dir)
    logged = [line for line in read_json_lines(folder / "metrics.jsonl") if "tokens_per_second" in line]
    blueprint = Blueprint(run.model, run.config, run.mesh.build())
    return {
        "steps": run.total_steps,
        "flops": run.total_steps * study.step_flops(arm),
        "text_tokens": json.loads((folder / "phases.json").read_text())[0]["raw_tokens"],
        "tokens_per_second": float(np.median([line["tokens_per_second"] for line in logged])),
        "parameters": blueprint.num_parameters,
        "device": jax.devices()[0].device_kind,
        "held_out": {
            line["step"]: line["corpora"]["biomedical"] for line in read_json_lines(folder / "evaluations.jsonl")
        },
    }


def write_untrained(study, seed):
    """The encoder as it is drawn with a seed, for fine-tuning to start from."""
    config = dataclasses.replace(study.config(NO_PRETRAINING), scan_layers=False)
    blueprint = Blueprint(EncoderOnly, config, MeshShape().build())
    drawn = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(blueprint.init(seed))}
    tensors = {leaf.parts[0]: Tensor.of(np.asarray(drawn[leaf.name])) for leaf in leaves(EncoderOnly, config)}
    folder = study.model(NO_PRETRAINING, seed)
    write_checkpoint(Checkpoint(folder, EncoderOnly, config, tensors, study.vocabulary), folder, "native")
    return {"steps": 0, "flops": 0, "parameters": blueprint.num_parameters}


def fine_tune(study, arm, seed):
    """Test scores of each seed of fine-tuning; the fine-tuned models are not kept."""
    tuning = study.tuning(arm, seed)
    if finetune(tuning):
        raise SystemExit("stopped; start the same command again")
    for model in Path(tuning.out_dir).glob("seed_*/model"):
        shutil.rmtree(model)
    scores = json.loads(Path(tuning.out_dir, "summary.json").read_text(encoding="utf-8"))["scores"]["test"]
    return {"scores": {metric: of_metric["values"] for metric, of_metric in scores.items()}}


def stages(study, seeds):
    """(function, {job: arguments}) in the order in which they need one another; seeds outside, arms inside, so that an
    interrupted study has whole seeds."""
    yield prepare_data, {"prepare": {"study": study}}
    pairs = [(arm, seed) for seed in range(seeds) for arm in ARMS]
    for name, function in (("pretrain", pretrain), ("tune", fine_tune)):
        yield function, {f"{name}-{arm}-{seed}": {"study": study, "arm": arm, "seed": seed} for arm, seed in pairs}


def main():
    flags = parser(__doc__, None)
    for name in ("corpus", "task"):
        flags.add_argument(f"--{name}", required=True, metavar="FILE")
    flags.add_argument("--setting", choices=SETTINGS, default="small")
    flags.add_argument("--seeds", type=int, help="default: of the setting; more may be added to kept ones later")
    flags = flags.parse_args()
    setting = SETTINGS[flags.setting]
    work_dir = str(Path(flags.work_dir or f"runs/studies/rtd_{flags.setting}").resolve())
    study = Study(setting, *(str(Path(path).resolve()) for path in (flags.corpus, flags.task)), work_dir)
    jobs = list(stages(study, flags.seeds or setting.seeds))
    if not flags.report_only:
        files = {name: Path(getattr(flags, name)).name for name in ("corpus", "task")}
        fixed = {key: value for key, value in dataclasses.asdict(setting).items() if key != "seeds"}
        claim(work_dir, {"setting": fixed, **files})
        for function, named in jobs:
            run_jobs(function, named, work_dir, workers=flags.workers, gpu=flags.gpu)
    write_report(study, flags.setting, kept(work_dir, [name for _, named in jobs for name in named]))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
