"""Long documents: what does a longer row cost with window attention, and what does it bring?

    python benchmarks/studies/long.py --software FILE.jsonl.gz --general FILE.jsonl.gz
    python benchmarks/studies/long.py --software FILE.jsonl.gz --general FILE.jsonl.gz --setting smoke
    python benchmarks/studies/long.py --software FILE.jsonl.gz --general FILE.jsonl.gz --setting gpu --gpu
    python benchmarks/studies/long.py --software FILE.jsonl.gz --general FILE.jsonl.gz --report_only

The first takes about a quarter of an hour on two cores. Records have `text`, `source`, `title` and a number in `id`.

Cost: seconds of a train step on one row, and the memory it is compiled for, by length, with attention in a window of
128 on either side ("window"), in a window with global tokens, the first and LongT5's transient ones of each 16 tokens
("blocks"), and to all ("full"). Kinds take turns in each round, ratios are taken within rounds.

Loss: encoders of one shape learn masked language modeling from the same long documents, with rows of 512, 2,048 or
8,192 tokens and as many tokens in every step. All are asked for the same masked tokens of the same held-out documents:
those of the last 511 before an end that has 8,191 tokens before it, each model with as many of them as its rows held.
What is masked is drawn once, so a longer context adds text on the left and changes nothing else.
"""

import dataclasses
import itertools
import time
from pathlib import Path

import jax
import numpy as np
from long_documents import write_documents
from long_report import KINDS, arm_name, write_report
from study import claim, kept, parser, run_jobs

from t5x_domain.data.cache import TokenCache
from t5x_domain.data.curriculum import Phase
from t5x_domain.data.packing import Example
from t5x_domain.data.preparation import prepare
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Component, Corpus, Mixture
from t5x_domain.data.vocabulary import Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.models.assemblies import EncoderOnly
from t5x_domain.models.config import ModelConfig
from t5x_domain.objectives.masked_lm import MaskedLM
from t5x_domain.training.checkpoint import Retention
from t5x_domain.training.feed import LAYOUTS
from t5x_domain.training.loop import open_trained, train
from t5x_domain.training.optimizer import Adafactor, Updates
from t5x_domain.training.run import Run
from t5x_domain.training.schedule import linear
from t5x_domain.training.state import Blueprint
from t5x_domain.training.step import make_eval_step, make_train_step

SCORED = 511  # tokens, before EOS


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes; `tokens` of a step are rows x length, `documents` at most are taken of a corpus, `stretches` at most are
    scored of a held-out one."""

    steps: int = 160
    tokens: int = 8192
    lengths: tuple[int, ...] = (512, 2048, 8192)
    kinds: tuple[str, ...] = ("blocks",)
    seeds: int = 1
    documents: int = 400
    stretches: int = 2
    cost_lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    rounds: int = 3
    vocabulary: int = 4000
    embed_dim: int = 128
    heads: int = 2
    layers: int = 3
    peak: float = 0.02
    dtype: str = "float32"


SETTINGS = {
    "smoke": Setting(
        steps=4,
        tokens=1024,
        lengths=(512, 1024),
        documents=20,
        cost_lengths=(512, 1024),
        rounds=2,
        vocabulary=1000,
        embed_dim=32,
        heads=1,
    ),
    "small": Setting(),
    "gpu": Setting(
        steps=4000,
        tokens=65536,
        kinds=("window", "blocks", "full"),
        seeds=3,
        documents=4000,
        stretches=4,
        vocabulary=8000,
        embed_dim=512,
        heads=8,
        layers=12,
        dtype="bfloat16",
    ),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """What all jobs share; plain values, so that a job's process gets it whole."""

    setting: Setting
    software: str
    general: str
    work_dir: str

    @property
    def cache_dir(self):
        return f"{self.work_dir}/cache"

    @property
    def vocabulary(self):
        return Vocabulary(f"{self.cache_dir}/vocabulary.model", extra_ids=100)

    @property
    def files(self):
        return {name: f"{self.work_dir}/{name}.jsonl.gz" for name in ("software", "books")}

    @property
    def phases(self):
        corpora = [
            Corpus(name, JsonlSource(dict.fromkeys(("train", "validation"), file), split_field="split"))
            for name, file in self.files.items()
        ]
        return [Phase(Mixture("long", [Component(corpus, MaskedLM()) for corpus in corpora]))]

    def config(self, kind):
        setting = self.setting
        return ModelConfig(
            vocab_size=-(-self.vocabulary.vocab_size // 128) * 128,
            embed_dim=setting.embed_dim,
            mlp_dim=2 * setting.embed_dim,
            num_heads=setting.heads,
            head_dim=setting.embed_dim // setting.heads,
            num_encoder_layers=setting.layers,
            num_decoder_layers=0,
            dtype=setting.dtype,
            **KINDS[kind],
        )

    def run(self, kind, length, seed, rows):
        steps = self.setting.steps
        return Run(
            run_dir=f"{self.work_dir}/runs/{arm_name(kind, length, seed)}",
            model=EncoderOnly,
            config=self.config(kind),
            phases=self.phases,
            vocabulary=self.vocabulary,
            cache_dir=self.cache_dir,
            lengths={"inputs": length, "targets": 8},
            updates=Updates(Adafactor(), linear(self.setting.peak, steps, max(steps // 10, 1)), clip_global_norm=1.0),
            total_steps=steps,
            batch_size=rows,
            packing="first_fit",
            seed=seed,
            log_every=max(steps // 10, 1),
            eval_every=steps,
            eval_batches=1,  # the study scores for itself
            checkpoint_every=steps,
            retention=Retention(last=1),
        )


def prepare_corpora(study):
    """Files, vocabulary and token cache; tokens by corpus and split."""
    write_documents(study.software, study.general, study.files, max(study.setting.lengths), study.setting.documents)
    prepare(study.phases, study.vocabulary, study.cache_dir, vocabulary_size=study.setting.vocabulary)
    splits = {name: {split: cached(study, name, split) for split in ("train", "validation")} for name in study.files}
    return {
        "corpora": {
            name: {split: {"documents": s.num_documents, "tokens": int(s.num_tokens)} for split, s in of.items()}
            for name, of in splits.items()
        }
    }


def cached(study, corpus, split):
    return TokenCache.open(study.cache_dir, corpus, vocabulary_fingerprint=study.vocabulary.fingerprint).split(split)


def cost(study, length):
    """Seconds of train steps on one row, {kind: one a round}, and bytes of the compiled step's temporary arrays."""
    steps, memory = {}, {}
    text = np.resize(cached(study, "books", "train").documents(0, 1)[0], length - 1)
    batch = row(study, text, length, seed=0)
    for kind in KINDS:
        run = study.run(kind, length, 0, rows=1)
        blueprint = Blueprint(run.model, run.config, run.mesh.build())
        transform = run.updates.build(blueprint.axes)
        loss = lambda *args, run=run: run.loss(*args, num_components=1)  # noqa: E731
        state = blueprint.init_state(blueprint.init(0), transform)
        compiled = make_train_step(blueprint, loss, transform, seed=0).lower(state, batch).compile()
        memory[kind] = compiled.memory_analysis().temp_size_in_bytes
        state, _ = jax.block_until_ready(compiled(state, batch))
        steps[kind] = compiled, state
    seconds = {kind: [] for kind in KINDS}
    for _, kind in itertools.product(range(study.setting.rounds), KINDS):
        compiled, state = steps[kind]
        began = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch))
        seconds[kind].append(time.perf_counter() - began)
        steps[kind] = compiled, state
    return {"step_seconds": seconds, "temporary_bytes": memory}


def held_out(study, corpus, size):
    """Of each held-out document that has one: its first stretches of `size` tokens, int32 [size] each."""
    documents = cached(study, corpus, "validation")
    found = []
    for i in range(documents.num_documents):
        tokens = documents.documents(i, i + 1)[0]
        count = min(len(tokens) // size, study.setting.stretches)
        if count:
            found.append([tokens[k * size : (k + 1) * size] for k in range(count)])
    return found


def row(study, tokens, length, seed, scored=None):
    """A batch of one row: masked text, of which the last `length` - 1 tokens are there, and the last `scored` count."""
    example = MaskedLM()(tokens, np.random.default_rng(seed), study.vocabulary)
    chosen = example["chosen"]
    if scored is not None:
        chosen = chosen & (np.arange(len(chosen)) >= len(tokens) - scored)
    last = slice(-length, None)  # EOS is the last of all
    text = Example(example["inputs"][last], example["targets"][last], 0, chosen=chosen[last])
    return LAYOUTS[EncoderOnly].batch([[text]], {"inputs": length})


def train_arm(study, kind, length, seed):
    """Trains one encoder; nats a masked token, {corpus: {context: [one a document]}}."""
    run = study.run(kind, length, seed, rows=study.setting.tokens // length)
    began = time.monotonic()
    if train(run):
        raise SystemExit("stopped; start the same command again")
    seconds = time.monotonic() - began
    feed, blueprint, params = open_trained(run)
    eval_step = make_eval_step(blueprint, feed.loss)
    contexts = [context for context in study.setting.lengths if context <= length]

    def loss(document, number, context):
        batches = (row(study, tokens, context, (number, k), SCORED) for k, tokens in enumerate(document))
        sums = [eval_step(params, batch) for batch in batches]
        return float(sum(s["nll"] for s in sums) / sum(s["weight"] for s in sums))

    losses = {}
    for corpus in study.files:
        documents = list(enumerate(held_out(study, corpus, max(study.setting.lengths) - 1)))
        losses[corpus] = {context: [loss(d, i, context) for i, d in documents] for context in contexts}
    return {"losses": losses, "train_seconds": seconds, "parameters": blueprint.num_parameters}


def main():
    flags = parser(__doc__, None)
    flags.add_argument("--software", required=True, metavar="FILE", help="documents, of which the long ones are taken")
    flags.add_argument("--general", required=True, metavar="FILE", help="sections of books, among others")
    flags.add_argument("--setting", choices=SETTINGS, default="small")
    flags = flags.parse_args()
    setting = SETTINGS[flags.setting]
    work_dir = str(Path(flags.work_dir or f"runs/studies/long_{flags.setting}").resolve())
    study = Study(setting, str(Path(flags.software).resolve()), str(Path(flags.general).resolve()), work_dir)
    arms = itertools.product(range(setting.seeds), setting.kinds, setting.lengths)
    arms = {arm_name(k, n, seed): {"study": study, "kind": k, "length": n, "seed": seed} for seed, k, n in arms}
    costs = {f"cost-{length}": {"study": study, "length": length} for length in setting.cost_lengths}
    if not flags.report_only:
        files = {"software": Path(study.software).name, "general": Path(study.general).name}
        claim(work_dir, {"setting": dataclasses.asdict(setting), **files})
        how = {"workers": flags.workers, "gpu": flags.gpu}
        run_jobs(prepare_corpora, {"prepare": {"study": study}}, work_dir, **how)
        run_jobs(cost, costs, work_dir, **how)
        run_jobs(train_arm, arms, work_dir, **how)
    results = kept(work_dir, ["prepare", *costs, *arms])
    if missing := [name for name in ("prepare", *costs, *arms) if name not in results]:
        raise UserError(f"{work_dir} holds no result of {missing[0]}; run the study without --report_only first.")
    write_report(study, flags.setting, results)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
