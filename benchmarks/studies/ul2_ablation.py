"""Miniature of UL2's ablation: which pretraining objective is good at what, at equal tokens of real text?

    python benchmarks/studies/ul2_ablation.py                       two cores: about three quarters of an hour
    python benchmarks/studies/ul2_ablation.py --setting smoke       about a minute, to see that everything works
    python benchmarks/studies/ul2_ablation.py --setting gpu --gpu --documents FILE.jsonl.gz …
                                                                    larger models, encoder-decoder and decoder-only

After Tay et al. 2022 (arXiv:2205.05131), sections 3.1 and 4: the same model learns the same text with each objective,
and is then asked for what the paper distinguishes: fine-tuned classification, language modelling, filling in spans. The
orderings that the paper reports are looked for, with a confidence interval each; nothing is tuned to make them hold.
What is finished is kept in --work_dir, so the same command goes on where it was stopped; --report_only writes the
report of what is there.
"""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import study
from common import RESULTS, environment
from ul2_arms import MODELS, NO_PRETRAINING, OBJECTIVES, SETTINGS, Place, equal_lengths, make_run
from ul2_measures import SAMPLE_LABELS, Examiner, fine_tune, labelled_task, measure, sample_task
from ul2_report import job_name, summarise, write_report

from t5x_domain.data.curriculum import Phase
from t5x_domain.data.preparation import prepare
from t5x_domain.errors import UserError
from t5x_domain.training.loop import open_trained, train
from t5x_domain.training.state import Blueprint

DOCS = study.ROOT / "docs/studies"


def job(place, objective, architecture, seed, lengths):
    """One arm with one seed: pretraining, then everything that is measured of it."""
    run = make_run(place, objective, architecture, seed, lengths)
    if objective == NO_PRETRAINING:
        blueprint = Blueprint(run.model, run.config, run.mesh.build())
        params, learnt = blueprint.init(seed), {"raw_tokens": 0, "tokens_per_second": None}
    else:
        if train(run):
            raise RuntimeError("told to stop")
        _, blueprint, params = open_trained(run)
        lines = [json.loads(line) for line in Path(run.run_dir, "metrics.jsonl").read_text().splitlines()]
        learnt = {
            "raw_tokens": json.loads(Path(run.run_dir, "phases.json").read_text())[0]["raw_tokens"],
            "tokens_per_second": float(np.median([line["tokens_per_second"] for line in lines])),
        }
    examiner = Examiner(place, architecture, blueprint)
    learnt["num_parameters"] = blueprint.num_parameters
    learnt["environment"] = {"device": jax.devices()[0].device_kind, **environment("jax", "jaxlib", "flax", "numpy")}
    learnt |= measure(place, examiner, objective, params)
    return learnt | fine_tune(place, examiner, objective, params, seed)


def make_place(flags):
    given = {"steps": flags.steps, "seeds": flags.seeds and range(flags.seeds)}
    given |= {"objectives": flags.objectives, "architectures": flags.architectures}
    overrides = {key: value if key == "steps" else tuple(value) for key, value in given.items() if value}
    setting = dataclasses.replace(SETTINGS[flags.setting], **overrides)
    work_dir = flags.work_dir.format(setting=flags.setting)
    return Place(str(Path(work_dir).resolve()), tuple(flags.documents), setting)


def prepare_place(place, labelled):
    """Cache, vocabulary with mode tokens, labelled task, row lengths. Returns what the report says of them."""
    # Arms and seeds may be added to what is there.
    fixed = {
        k: v for k, v in dataclasses.asdict(place.setting).items() if k not in ("objectives", "architectures", "seeds")
    }
    study.claim(place.work_dir, {"documents": place.documents, "labelled": labelled, **fixed})
    prepare(
        [Phase(place.mixture("ul2", "encoder_decoder"))],
        place.vocabulary,
        place.cache_dir,
        vocabulary_size=place.setting.vocabulary_size,
    )
    task = labelled_task(labelled, place.setting) if labelled else sample_task(place.setting)
    study.write_json(Path(place.work_dir, "task.json"), task)
    record = Path(place.work_dir, "packing.json")
    packing = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    for pair in itertools.product(place.setting.objectives, place.setting.architectures):
        if "-".join(pair) not in packing and pair[0] != NO_PRETRAINING:
            packing["-".join(pair)] = equal_lengths(place, *pair)
    study.write_json(record, packing)
    corpora = {
        split.corpus: {"documents": split.num_documents, "tokens": split.num_tokens} for split in place.splits("train")
    }
    return {"packing": packing, "corpora": corpora}


def main():
    parser = study.parser(__doc__, "runs/studies/ul2_ablation_{setting}")
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument("--steps", type=int, help="updates of pretraining, instead of the setting's")
    parser.add_argument("--seeds", type=int, help="number of seeds, instead of the setting's")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, help="arms, instead of the setting's")
    parser.add_argument("--architectures", nargs="+", choices=MODELS, help="instead of the setting's")
    sample = [f"data/sample/{name}.jsonl.gz" for name in ("biomedical", "general")]
    parser.add_argument(
        "--documents", nargs="+", default=sample, help="JSONL files, each a corpus; records name a split"
    )
    parser.add_argument("--labelled", help="gzipped table (split, label, text) to classify instead of the sample")
    flags = parser.parse_args()
    try:
        run(flags)
    except UserError as error:
        sys.exit(f"ul2_ablation: error: {error}")


def run(flags):
    place = make_place(flags)
    setting = place.setting
    plan = prepare_place(place, flags.labelled)
    jobs = {}
    for seed, architecture, objective in itertools.product(
        setting.seeds, setting.architectures, setting.objectives
    ):  # seed by seed, so that what is there of an interrupted study is balanced
        lengths = plan["packing"].get(f"{objective}-{architecture}", {}).get("lengths", {"inputs": 8, "targets": 8})
        jobs[job_name(objective, architecture, seed)] = {
            "place": place,
            "objective": objective,
            "architecture": architecture,
            "seed": seed,
            "lengths": lengths,
        }
    if not flags.report_only:
        study.run_jobs(job, jobs, place.work_dir, workers=flags.workers, gpu=flags.gpu)
    results = study.kept(place.work_dir, jobs)
    if not results:
        raise UserError(f"{place.work_dir} holds no result yet; start without --report_only.")
    one = next(iter(results.values()))
    report = {
        "environment": max((result.pop("environment") for result in results.values()), key=lambda e: e["date"]),
        "setting_name": flags.setting,
        "setting": dataclasses.asdict(setting),
        "task": f"labels of {Path(flags.labelled).name}"
        if flags.labelled
        else (
            f"{len(set(SAMPLE_LABELS.values()))} labels in the shipped sample ("
            f"{', '.join(SAMPLE_LABELS.values())}), from definitions and glosses without their titles"
        ),
        **plan,
        "parameters": {
            a: next(r["num_parameters"] for n, r in results.items() if f"-{a}-" in n)
            for a in setting.architectures
            if any(f"-{a}-" in n for n in results)
        },
        **{key: one[key] for key in ("lm_targets", "span_targets", "fine_tuning_examples", "tested")},
        "complete": len(results) == len(jobs),
        "job_hours": sum(r["seconds"] for r in results.values()) / 3600,
        **summarise(results, setting),
        "results": results,
    }
    smoke = flags.setting == "smoke"  # its figures mean nothing
    write_report(report, place.work_dir if smoke else RESULTS, place.work_dir if smoke else DOCS)


if __name__ == "__main__":
    main()
