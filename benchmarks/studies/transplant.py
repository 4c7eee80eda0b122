"""Is a domain's own vocabulary worth having in a finished model, and need its new rows be made of old ones?

    python benchmarks/studies/transplant.py --model FOLDER --corpus FILE.jsonl.gz     (two cores: half an hour)
    python benchmarks/studies/transplant.py --model FOLDER --corpus FILE.jsonl.gz --setting smoke
    python benchmarks/studies/transplant.py --model FOLDER --corpus FILE.jsonl.gz --report_only

FOLDER is an encoder-decoder as Hugging Face keeps it, e.g. flan-t5-small; every document of the corpus has a field
`split`, `train` or `validation`. Span corruption goes on from the model in three arms of equal steps, rows and lengths:

    old      the model's own vocabulary
    mean     a vocabulary learnt from the corpus; a new piece begins as the mean of the old pieces of its text
    random   the same vocabulary; a new piece begins at random, with the mean and deviation of the old rows

A loss by token says nothing across vocabularies. So all arms are scored on the same hidden words of the same held-out
documents, in bits for each UTF-8 byte that is hidden; what sentinels and EOS cost counts as well.
"""

import contextlib
import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
from study import claim, kept, parser, run_jobs
from transplant_report import ARMS, write_report

from t5x_domain.adaptation.transplant import Transplant, padded_size
from t5x_domain.conversion.formats import open_checkpoint
from t5x_domain.data.curriculum import Phase
from t5x_domain.data.mixtures import mixture_of_denoisers
from t5x_domain.data.packing import Example
from t5x_domain.data.preparation import prepare
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Corpus
from t5x_domain.data.vocabulary import Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import EncoderDecoder
from t5x_domain.objectives.span_corruption import SpanCorruption
from t5x_domain.training.checkpoint import Checkpoints, Retention
from t5x_domain.training.feed import LAYOUTS, Feed
from t5x_domain.training.initial import starting_state
from t5x_domain.training.loop import open_trained, train
from t5x_domain.training.optimizer import Adafactor, Updates
from t5x_domain.training.run import Run
from t5x_domain.training.schedule import constant
from t5x_domain.training.state import Blueprint
from t5x_domain.training.step import make_eval_step

BLOCK, SPAN = 14, 2  # of every 14 words 2 in a row are hidden
WORDS = (10, 60)  # of a held-out document


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes; `scored` are the steps after which held-out text is scored, the last ends the run."""

    scored: tuple[int, ...] = (0, 10, 30, 60, 120)
    rows: int = 4
    inputs: int = 128
    pieces: int = 8000
    held_out: int = 128
    seeds: int = 3
    learning_rate: float = 5e-3


SETTINGS = {"smoke": Setting(scored=(0, 2, 4), rows=2, inputs=64, pieces=2000, held_out=8, seeds=1), "full": Setting()}


@dataclasses.dataclass(frozen=True)
class Study:
    """What all jobs share; plain values, so that a job's process gets it whole."""

    setting: Setting
    model: str
    corpus_file: str
    work_dir: str

    @property
    def corpus(self):
        files = dict.fromkeys(("train", "validation"), self.corpus_file)
        return Corpus("corpus", JsonlSource(files, split_field="split"))

    @property
    def phases(self):
        return [Phase(mixture_of_denoisers([self.corpus], denoisers="t5"))]

    def vocabulary(self, arm):
        old = open_checkpoint(self.model).vocabulary
        return old if arm == "old" else Vocabulary(f"{self.work_dir}/new.model", extra_ids=old.extra_ids)

    def cache_dir(self, arm):
        return f"{self.work_dir}/cache_{'old' if arm == 'old' else 'new'}"

    @property
    def lengths(self):
        objective, inputs = SpanCorruption(), self.setting.inputs
        return {"inputs": inputs, "targets": objective.lengths(objective.raw_length({"inputs": inputs}))[1]}

    def run(self, arm, seed):
        setting, vocabulary, config = self.setting, self.vocabulary(arm), open_checkpoint(self.model).config
        rows = config.vocab_size if arm == "old" else padded_size(vocabulary.vocab_size, 128)
        return Run(
            run_dir=f"{self.work_dir}/runs/{arm}-seed{seed}",
            model=EncoderDecoder,
            config=dataclasses.replace(config, vocab_size=rows, dtype="float32", dropout_rate=0.0),
            phases=self.phases,
            vocabulary=vocabulary,
            cache_dir=self.cache_dir(arm),
            lengths=self.lengths,
            updates=Updates(Adafactor(), constant(setting.learning_rate, 10), clip_global_norm=1.0),
            total_steps=setting.scored[-1],
            batch_size=setting.rows,
            packing="first_fit",
            seed=seed,
            init_from=self.model,
            init_embedding="random" if arm == "random" else "mean",
            eval_batches=1,  # the study scores for itself
            checkpoint_every=setting.scored[-1],
            retention=Retention(last=1),
        )


def prepare_corpora(study):
    """Learns the new vocabulary, writes both caches, and chooses held-out documents that every arm can write."""
    for arm, pieces in (("old", None), ("mean", study.setting.pieces)):
        prepare(study.phases, study.vocabulary(arm), study.cache_dir(arm), vocabulary_size=pieces, inputs_length=None)
    old, new = study.vocabulary("old"), study.vocabulary("mean")
    texts = [" ".join(document.text.split()) for document in study.corpus.source.documents("validation")]
    fit = [
        text for text in texts if WORDS[0] <= len(text.split()) <= WORDS[1] and fits(text, (old, new), study.lengths)
    ]
    chosen = fit[: study.setting.held_out]
    plan = Transplant.plan(old, new)
    return {
        "held_out": chosen,
        "unknown": sum(old.unk_id in old.encode(text) for text in texts) / len(texts),
        "bytes_per_token": {
            arm: sum(len(text.encode()) for text in chosen) / sum(len(study.vocabulary(arm).encode(t)) for t in chosen)
            for arm in ("old", "mean")
        },
        "copied": plan.copied,
        "averaged": plan.averaged,
        "hidden": {"block": BLOCK, "span": SPAN, "words": WORDS},
    }


def fits(text, vocabularies, lengths):
    """Whether the old vocabulary can write the text and its example has room in a row of every arm."""
    for vocabulary in vocabularies:
        example, _ = hidden_words(text, vocabulary)
        if vocabulary.unk_id in vocabulary.encode(text) or any(len(example[key]) > lengths[key] for key in lengths):
            return False
    return True


def hidden_words(text, vocabulary):
    """({'inputs', 'targets'}, bytes that are hidden). Which words, depends on the text alone."""
    random, words, hidden_bytes = np.random.default_rng(len(text)), text.split(), 0
    inputs, targets = [], []
    for k, start in enumerate(range(0, len(words), BLOCK)):
        block = words[start : start + BLOCK]
        if len(block) <= SPAN:
            inputs.append(vocabulary.encode(" ".join(block)))
            continue
        cut = random.integers(1, len(block) - SPAN + 1)  # a clean word stands first, so spans keep apart
        span, sentinel = " ".join(block[cut : cut + SPAN]), [vocabulary.sentinel_id(k)]
        inputs += [vocabulary.encode(" ".join(block[:cut])), sentinel, vocabulary.encode(" ".join(block[cut + SPAN :]))]
        targets += [sentinel, vocabulary.encode(span)]
        hidden_bytes += len(f" {span}".encode())
    closed = {"inputs": [*inputs, [vocabulary.eos_id]], "targets": [*targets, [vocabulary.eos_id]]}
    return {key: np.concatenate(parts).astype(np.int32) for key, parts in closed.items()}, hidden_bytes


def train_arm(study, arm, seed, texts):
    """Bits per hidden byte after every step of `Setting.scored`."""
    run, curve = study.run(arm, seed), {}
    for step in study.setting.scored:
        if step == 0:
            blueprint = Blueprint(run.model, run.config, run.mesh.build())
            with contextlib.closing(Checkpoints(f"{study.work_dir}/none")) as none:
                params = starting_state(run, blueprint, run.updates.build(blueprint.axes), none)[0].params
            feed = Feed(run, run.mesh.build())
        else:
            if train(dataclasses.replace(run, total_steps=step)):
                raise SystemExit("stopped; start the same command again")
            feed, blueprint, params = open_trained(run)
        curve[step] = bits_per_byte(run, feed, make_eval_step(blueprint, feed.loss), params, texts)
    shutil.rmtree(f"{run.run_dir}/checkpoints")  # a third of a gigabyte for flan-t5-small
    return {"curve": curve, "parameters": blueprint.num_parameters}


def bits_per_byte(run, feed, eval_step, params, texts):
    """Cost of the hidden words of all texts."""
    rows, free, hidden_bytes = [], {"inputs": 0, "targets": 0}, 0
    for text in texts:
        example, count = hidden_words(text, run.vocabulary)
        if any(len(example[key]) > free[key] for key in free):
            rows.append([])
            free = dict(run.lengths)
        free = {key: free[key] - len(example[key]) for key in free}
        rows[-1].append(Example(example["inputs"], example["targets"], 0))
        hidden_bytes += count
    rows += [[]] * (-len(rows) % run.batch_size)
    batches = [rows[start : start + run.batch_size] for start in range(0, len(rows), run.batch_size)]
    layout = LAYOUTS[run.model]
    nats = sum(float(eval_step(params, feed.put(layout.batch(batch, run.lengths)))["nll"]) for batch in batches)
    return nats / math.log(2) / hidden_bytes


def main():
    flags = parser(__doc__, None)
    flags.add_argument("--model", required=True, metavar="FOLDER")
    flags.add_argument("--corpus", required=True, metavar="FILE")
    flags.add_argument("--setting", choices=SETTINGS, default="full")
    flags.add_argument("--seeds", type=int, help="default: of the setting; more may be added to kept ones later")
    flags = flags.parse_args()
    setting = SETTINGS[flags.setting]
    work_dir = str(Path(flags.work_dir or f"runs/studies/transplant_{flags.setting}").resolve())
    study = Study(setting, str(Path(flags.model).resolve()), str(Path(flags.corpus).resolve()), work_dir)
    pairs = [(arm, seed) for seed in range(flags.seeds or setting.seeds) for arm in ARMS]
    if not flags.report_only:
        said = {"model": Path(study.model).name, "corpus": Path(study.corpus_file).name}
        claim(work_dir, {"setting": dataclasses.asdict(setting), **said})
        how = {"workers": flags.workers, "gpu": flags.gpu}
        texts = run_jobs(prepare_corpora, {"prepare": {"study": study}}, work_dir, **how)["prepare"]["held_out"]
        jobs = {f"{a}-seed{seed}": {"study": study, "arm": a, "seed": seed, "texts": texts} for a, seed in pairs}
        run_jobs(train_arm, jobs, work_dir, **how)
    found = kept(work_dir, ["prepare", *(f"{arm}-seed{seed}" for arm, seed in pairs)])
    if "prepare" not in found:
        raise UserError(f"{work_dir} holds no results; run the study without --report_only first.")
    results = {(arm, seed): found[f"{arm}-seed{seed}"] for arm, seed in pairs if f"{arm}-seed{seed}" in found}
    write_report(study, flags.setting, found["prepare"], results)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
