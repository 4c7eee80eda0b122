"""Does metadata conditioning with a cooldown (MeCo) do at small size what its paper says? Three arms, several seeds.

    python benchmarks/studies/meco.py                               (two cores: about 35 minutes)
    python benchmarks/studies/meco.py --setting smoke               (under a minute)
    python benchmarks/studies/meco.py --model encoder_decoder       (the second model, into the same page)
    python benchmarks/studies/meco.py --report_only                 (the page again, from the results that are kept)
    python benchmarks/studies/meco.py --setting gpu --gpu --biomedical FILE.jsonl.gz --general FILE.jsonl.gz

Gao et al. 2025, "Metadata Conditioning Accelerates Language Model Pre-training" (arXiv:2501.01956), put a document's
source before it in the first 90 % of the steps and nothing in the last 10 %, the cooldown. Here the source is the field
`source` of a record: MONDO, GO, CHEBI, kjv, sotu, wordnet in the shipped sample. Arms of equal steps and equal text:

    plain        no metadata
    cooldown     metadata in the first 90 % of the steps
    no_cooldown  metadata in all steps

A tag takes room in a row, so the plain arm has fewer rows in a batch, as many as hold the same text.
"""

import dataclasses
import itertools
import json
import statistics
from pathlib import Path

import jax
import numpy as np
from meco_report import COOLDOWN, MODELS, jobs_of, write_report
from study import ROOT, claim, parser, run_jobs

from t5x_domain.data.cache import TokenCache
from t5x_domain.data.curriculum import Phase
from t5x_domain.data.mixtures import mixture_of_denoisers
from t5x_domain.data.packing import Example
from t5x_domain.data.preparation import prepare
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Corpus
from t5x_domain.data.vocabulary import Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder
from t5x_domain.models.config import ModelConfig
from t5x_domain.objectives.prefix import NO_TOKENS, Metadata
from t5x_domain.training.feed import LAYOUTS, Feed
from t5x_domain.training.loop import open_trained, train
from t5x_domain.training.metrics import read_json_lines
from t5x_domain.training.optimizer import Adafactor, Updates
from t5x_domain.training.run import Run
from t5x_domain.training.schedule import cosine
from t5x_domain.training.step import make_eval_step

METADATA = Metadata(templates=("Source: {source}\n\n",))
SHORTEST = 8  # held-out pieces of fewer tokens are left out
EXTRA_IDS = 128


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes. `rows` and `length` make a batch; `held_out` is tokens of each source that the tags are tried on;
    `evaluations` without tags make the curve, each of `eval_batches` of each corpus."""

    steps: int
    rows: int
    length: int
    vocabulary: int
    embed_dim: int
    layers: int
    seeds: int
    held_out: int
    evaluations: int = 10
    eval_batches: int | None = None
    peak: float = 0.03
    dtype: str = "float32"


SETTINGS = {
    "smoke": Setting(
        20, 8, 96, vocabulary=1000, embed_dim=32, layers=1, seeds=2, held_out=1500, evaluations=2, eval_batches=2
    ),
    "full": Setting(1000, 16, 128, vocabulary=2000, embed_dim=128, layers=4, seeds=3, held_out=12_000),
    "gpu": Setting(
        4000, 64, 512, vocabulary=8000, embed_dim=512, layers=8, seeds=3, held_out=20_000, peak=0.02, dtype="bfloat16"
    ),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """What all jobs share; plain values, so that a job's process gets it whole."""

    setting: Setting
    files: dict[str, str]
    work_dir: str

    @property
    def corpora(self):
        return [
            Corpus(name, JsonlSource(dict.fromkeys(("train", "validation"), file), split_field="split"))
            for name, file in self.files.items()
        ]

    @property
    def file_names(self):
        return [Path(file).name for file in self.files.values()]

    @property
    def cache_dir(self):
        return f"{self.work_dir}/cache"

    @property
    def vocabulary(self):
        return Vocabulary(f"{self.cache_dir}/vocabulary.model", extra_ids=EXTRA_IDS)

    def mixture(self, model, metadata):
        denoisers = {"decoder_only": "causal_lm", "encoder_decoder": "t5"}[model]
        return mixture_of_denoisers(self.corpora, denoisers=denoisers, metadata=metadata)

    def phases(self, model, arm):
        mixture = self.mixture(model, None if arm == "plain" else METADATA)
        if arm != "cooldown":
            return [Phase(mixture, name="all steps")]
        return [
            Phase(mixture, share=1 - COOLDOWN, name="with metadata"),
            Phase(mixture, share=COOLDOWN, metadata_rate=0.0, name="cooldown"),
        ]

    def run(self, model, arm, seed, rows):
        setting = self.setting
        decoder_only = model == "decoder_only"
        half = setting.layers // 2 or 1
        config = ModelConfig(
            vocab_size=-(-(setting.vocabulary + EXTRA_IDS) // 128) * 128,
            embed_dim=setting.embed_dim,
            mlp_dim=3 * setting.embed_dim,
            num_heads=max(1, setting.embed_dim // 32),
            head_dim=32,
            num_encoder_layers=0 if decoder_only else half,
            num_decoder_layers=setting.layers if decoder_only else half,
            dtype=setting.dtype,
        )
        # Span corruption of a full row of inputs has targets of less than a quarter of its length.
        targets = setting.length // (2 if decoder_only else 4)
        updates = Updates(
            optimizer=Adafactor(),
            # A tenth is left at the end: the cooldown has to learn something.
            schedule=cosine(setting.peak, setting.steps, setting.steps // 20, setting.peak / 10),
            clip_global_norm=1.0,
        )
        return Run(
            run_dir=f"{self.work_dir}/runs/{model}-{arm}-seed{seed}",
            model=DecoderOnly if decoder_only else EncoderDecoder,
            config=config,
            phases=self.phases(model, arm),
            vocabulary=self.vocabulary,
            cache_dir=self.cache_dir,
            lengths={"inputs": setting.length - (targets if decoder_only else 0), "targets": targets},
            updates=updates,
            total_steps=setting.steps,
            batch_size=rows,
            packing="first_fit",
            seed=seed,
            eval_every=setting.steps // setting.evaluations,
            log_every=max(1, setting.steps // 60),
            eval_batches=setting.eval_batches,
            # With metadata in all arms, so that tags can be tried on the plain arm too.
            eval_mixture=self.mixture(model, METADATA),
            checkpoint_every=setting.steps // 5,
        )


def prepare_corpora(study, models):
    """Vocabulary and token cache; for each model the rows of a batch, by arm, that hold equal text."""
    prepare(
        [Phase(study.mixture(models[0], None))],
        study.vocabulary,
        study.cache_dir,
        vocabulary_size=study.setting.vocabulary,
    )
    return {"rows": {model: rows_by_arm(study, model) for model in models}}


def rows_by_arm(study, model):
    """Of the numbers of rows from the setting's on, those that match best; a batch is whole rows."""
    rows, steps = study.setting.rows, min(study.setting.steps, 200)
    text = {}
    for arm in ("plain", "no_cooldown"):
        run = dataclasses.replace(study.run(model, arm, 0, rows), total_steps=steps)
        feed = Feed(run, run.mesh.build())
        text[arm] = sum(sum(counts.values()) for counts in feed.batches.raw_tokens(0, steps).values())
    ratio = (1 - COOLDOWN) * text["no_cooldown"] / text["plain"] + COOLDOWN
    tagged = min(range(rows, rows + 6), key=lambda n: abs(round(n * ratio) / n - ratio))
    return {"plain": round(tagged * ratio), "cooldown": tagged, "no_cooldown": tagged}


def train_arm(study, model, arm, seed, rows):
    """Trains one arm and scores held-out text behind no tag and behind every tag."""
    run = study.run(model, arm, seed, rows)
    if train(run):
        raise SystemExit("stopped; start the same command again")
    feed, blueprint, params = open_trained(run)
    eval_step = make_eval_step(blueprint, feed.loss)
    examples = held_out_examples(study, run, model)
    folder = Path(run.run_dir)
    phases = read_phases(folder)
    return {
        "device": jax.devices()[0].device_kind,
        "parameters": blueprint.num_parameters,
        "text_tokens": sum(phases.values()),
        "phases": phases,
        "curve": {
            line["step"]: statistics.fmean(score["loss"] for score in line["corpora"].values())
            for line in read_json_lines(folder / "evaluations.jsonl")
        },
        # The library's own figures on all held-out text, beside those on the chosen examples.
        "feed": {
            "none": corpus_losses(feed.held_out(eval_step, params)),
            "right": corpus_losses(feed.held_out(eval_step, params, metadata="own")),
        },
        "corpus_of": {source: corpus for source, (corpus, _) in examples.items()},
        **score_tags(run, feed, eval_step, params, {source: rows for source, (_, rows) in examples.items()}),
    }


def read_phases(folder):
    return {phase["name"]: phase["raw_tokens"] for phase in json.loads((folder / "phases.json").read_text())}


def corpus_losses(scores):
    return {corpus: score["loss"] for corpus, score in scores.items()}


def held_out_examples(study, run, model):
    """{source: (corpus, rows of (inputs, targets))}: pieces that fit their rows behind the longest tag.

    Every tag is tried on the very same examples in the same rows, so that nothing but the tag differs.
    """
    layout, found = LAYOUTS[run.model], {}
    for component in study.mixture(model, None).components:
        cache = TokenCache.open(study.cache_dir, component.corpus.name)
        split = cache.split(run.eval_split)
        fields = split.metadata(0, split.num_documents)
        for tokens, document in zip(split.documents(0, split.num_documents), fields, strict=True):
            corpus, documents = found.setdefault(document["source"], (component, []))
            if sum(map(len, documents)) < study.setting.held_out:
                documents.append(tokens)
    longest = max(len(tag_ids(source, run.vocabulary)) for source in found)
    room = {**run.lengths, "inputs": run.lengths["inputs"] - longest}
    result = {}
    for source, (component, documents) in found.items():
        cut = layout.raw_length(component.objective, room)
        pieces = [tokens[i : i + cut] for tokens in documents for i in range(0, len(tokens), cut)]
        pieces = [piece for piece in pieces if len(piece) >= SHORTEST]
        capacity, reserved = np.array(layout.capacity(run.lengths)), longest * np.array(layout.prefix_cost)
        rows, free = [], np.zeros(2)
        for number, piece in enumerate(pieces):
            need = np.array(layout.cost(component.objective, len(piece))) + reserved
            if (need > free).any():
                rows.append([])
                free = capacity.copy()
            free = free - need
            features = component.objective(piece, np.random.default_rng(number), run.vocabulary)
            rows[-1].append((features["inputs"], features["targets"]))
        result[source] = component.corpus.name, rows
    return result


def tag_ids(source, vocabulary):
    return METADATA.ids({"source": source}, vocabulary)


def score_tags(run, feed, eval_step, params, rows_of):
    """`targets` {source: number} and `loss` {tag or 'none': {source: nats per target}}."""
    layout, targets, loss = LAYOUTS[run.model], {}, {}
    tags = {"none": NO_TOKENS, **{source: tag_ids(source, run.vocabulary) for source in rows_of}}
    for (tag, prefix), (source, rows) in itertools.product(tags.items(), rows_of.items()):
        results = []
        for start in range(0, len(rows), run.batch_size):
            batch = [[Example(*pair, 0, prefix) for pair in row] for row in rows[start : start + run.batch_size]]
            batch += [[]] * (run.batch_size - len(batch))
            results.append(eval_step(params, feed.put(layout.batch(batch, run.lengths))))
        sums = {key: float(sum(np.float64(result[key]) for result in results)) for key in ("nll", "weight")}
        loss.setdefault(tag, {})[source] = sums["nll"] / sums["weight"]
        assert targets.setdefault(source, int(sums["weight"])) == int(sums["weight"])
    return {"targets": targets, "loss": loss}


def main():
    flags = parser(__doc__, None)
    flags.add_argument("--setting", choices=SETTINGS, default="full")
    flags.add_argument("--model", choices=[*MODELS, "both"], default="decoder_only")
    flags.add_argument("--seeds", type=int, help="default: of the setting; more may be added to kept ones later")
    for name in ("biomedical", "general"):
        flags.add_argument(f"--{name}", default=str(ROOT / f"data/sample/{name}.jsonl.gz"), metavar="FILE")
    flags = flags.parse_args()
    setting = SETTINGS[flags.setting]
    files = {name: str(Path(getattr(flags, name)).resolve()) for name in ("biomedical", "general")}
    work_dir = str(Path(flags.work_dir or f"runs/studies/meco_{flags.setting}").resolve())
    study, seeds = Study(setting, files, work_dir), flags.seeds or setting.seeds
    models = list(MODELS) if flags.model == "both" else [flags.model]
    if not flags.report_only:
        claim(work_dir, {"setting": dataclasses.asdict(setting), "files": study.file_names})
        how = {"workers": flags.workers, "gpu": flags.gpu}
        prepared = run_jobs(prepare_corpora, {"prepare": {"study": study, "models": list(MODELS)}}, work_dir, **how)
        for model in models:
            jobs = jobs_of(model, prepared["prepare"]["rows"][model], seeds)
            run_jobs(train_arm, {name: {"study": study, **job} for name, job in jobs.items()}, work_dir, **how)
    write_report(study, flags.setting, seeds)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
