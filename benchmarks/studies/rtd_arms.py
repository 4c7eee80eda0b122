"""What the study of replaced-token detection compares: the arms, their sizes, and what an update of each computes."""

import dataclasses
import functools
import math
from pathlib import Path

import jax.numpy as jnp
from study import SPLITS

from t5x_domain.adaptation.finetune_config import FineTuning
from t5x_domain.data.curriculum import Phase
from t5x_domain.data.labelled import LabelledTask
from t5x_domain.data.mixtures import mixture_of_denoisers
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Corpus
from t5x_domain.data.vocabulary import Vocabulary
from t5x_domain.models.assemblies import EncoderOnly
from t5x_domain.models.config import ModelConfig
from t5x_domain.models.flops import forward_flops, train_step_flops
from t5x_domain.models.rtd import ReplacedTokenDetection, generator_config
from t5x_domain.objectives.losses import target_scores
from t5x_domain.objectives.masked_lm import MaskedLM
from t5x_domain.objectives.masking import BERT_SHARES
from t5x_domain.objectives.rtd import Chosen, replaced_token_detection_loss
from t5x_domain.training.checkpoint import Retention
from t5x_domain.training.metrics import read_json_lines
from t5x_domain.training.optimizer import AdamW, Updates
from t5x_domain.training.run import Run
from t5x_domain.training.schedule import linear

NO_PRETRAINING = "none"
TRAINED = ("mlm", "rtd_masked", "rtd_tied", "rtd_gdes")
ARMS = (NO_PRETRAINING, *TRAINED)
ELECTRA_SHARES = (0.85, 0.0, 0.15)  # of masked, random and kept tokens among the chosen
MAX_SHARE = 0.2  # of a row's positions that have room for a prediction; 0.15 are chosen on average
MULTIPLE = 128  # of the rows of the embedding


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes. `documents` are the most of each split of the corpus, `examples` the most that fine-tuning learns from;
    None for all. `steps` are those of detection over all tokens; the other arms have as many as cost the same.
    """

    documents: int | None = None
    vocabulary: int = 8000
    embed_dim: int = 128
    mlp_dim: int = 512
    layers: int = 4
    heads: int = 4
    generator_width: float = 0.5
    generator_layers: int | None = None
    embedding_dim: int | None = None
    dtype: str = "float32"
    length: int = 128
    rows: int = 16
    steps: int = 1000
    learning_rate: float = 1.5e-3
    warmup: float = 0.1
    evaluations: int = 10
    seeds: int = 3
    examples: int | None = 2000
    task_seeds: int = 1
    task_epochs: float = 4
    task_length: int = 64
    task_rows: int = 32
    task_learning_rate: float = 1e-3


SETTINGS = {
    "smoke": Setting(
        documents=2000,
        vocabulary=1000,
        embed_dim=32,
        mlp_dim=64,
        layers=1,
        heads=1,
        length=64,
        rows=8,
        steps=20,
        evaluations=2,
        seeds=2,
        examples=64,
        task_seeds=1,
        task_epochs=1,
    ),
    "small": Setting(),
    "gpu": Setting(  # the shape of ELECTRA small: Clark et al. 2020, table 6
        vocabulary=30_000,
        embed_dim=256,
        mlp_dim=1024,
        layers=12,
        heads=4,
        generator_width=0.25,
        embedding_dim=128,
        dtype="bfloat16",
        rows=128,
        steps=100_000,
        learning_rate=5e-4,
        seeds=3,
        examples=None,
        task_seeds=5,
        task_epochs=5,
        task_learning_rate=3e-4,
    ),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """What all jobs share; plain values, so that a job's process gets it whole."""

    setting: Setting
    corpus_file: str
    task_file: str
    work_dir: str

    def path(self, *names):
        return str(Path(self.work_dir, *names))

    @property
    def corpus(self):
        files = dict.fromkeys(("train", "validation"), self.path("data", "corpus.jsonl"))
        return Corpus("biomedical", JsonlSource(files, split_field="split"))

    @property
    def vocabulary(self):
        return Vocabulary(self.path("cache", "vocabulary.model"), extra_ids=1)  # a mask

    @property
    def task(self):
        file = self.path("data", "task.jsonl")
        labels = sorted({record["label"] for record in read_json_lines(Path(file))})
        return LabelledTask("body_system", dict.fromkeys(SPLITS, file), labels=labels, split_field="split")

    def phases(self, arm):
        shares = BERT_SHARES if arm == "mlm" else ELECTRA_SHARES
        return [Phase(mixture_of_denoisers([self.corpus], denoisers=[MaskedLM(shares=shares)]))]

    def config(self, arm):
        setting = self.setting
        detects = {
            "rtd_generator_width": setting.generator_width,
            "rtd_generator_layers": setting.generator_layers,
            "rtd_embedding_sharing": "gdes" if arm == "rtd_gdes" else "tied",
        }
        return ModelConfig(
            vocab_size=-(-(setting.vocabulary + 1) // MULTIPLE) * MULTIPLE,
            embed_dim=setting.embed_dim,
            embedding_dim=setting.embedding_dim,
            mlp_dim=setting.mlp_dim,
            num_heads=setting.heads,
            head_dim=setting.embed_dim // setting.heads,
            num_encoder_layers=setting.layers,
            num_decoder_layers=0,
            mlp_activations=("gelu",),
            norm="layernorm",
            embedding_norm=True,
            tie_embeddings=True,
            scale_logits=True,
            dtype=setting.dtype,
            **(detects if arm.startswith("rtd") else {}),
        )

    def steps(self, arm):
        """As many as cost what `setting.steps` of detection over all tokens cost."""
        return round(self.setting.steps * self.step_flops("rtd_tied") / self.step_flops(arm))

    def step_flops(self, arm):
        """Of forward and backward pass by formula."""
        config, rows = self.config(arm), self.setting.rows
        lengths = {"inputs": self.setting.length, "targets": self.setting.length}
        if arm == "mlm":
            scored = math.ceil(MAX_SHARE * self.setting.length)
            return 3 * rows * forward_flops(EncoderOnly, config, lengths, scored=scored) + output_kernel_flops(config)
        generator = output_kernel_flops(generator_config(config))
        return train_step_flops(ReplacedTokenDetection, config, rows, lengths) + generator

    def run(self, arm, seed):
        setting, steps = self.setting, self.steps(arm)
        detect = functools.partial(replaced_token_detection_loss, masked_only=arm == "rtd_masked", max_share=MAX_SHARE)
        return Run(
            run_dir=self.model(arm, seed),
            model=EncoderOnly if arm == "mlm" else ReplacedTokenDetection,
            config=self.config(arm),
            phases=self.phases(arm),
            vocabulary=self.vocabulary,
            cache_dir=self.path("cache"),
            lengths={"inputs": setting.length, "targets": setting.length},
            updates=updates(setting.learning_rate, steps, setting.warmup),
            total_steps=steps,
            batch_size=setting.rows,
            loss=masked_lm_loss if arm == "mlm" else detect,
            packing="first_fit",
            seed=seed,
            log_every=max(1, steps // 50),
            eval_every=max(1, steps // setting.evaluations),
            eval_batches=8,
            checkpoint_every=max(1, steps // 4),
            retention=Retention(last=1),
        )

    def model(self, arm, seed):
        """Where the model of an arm is."""
        return self.path("models", f"{arm}-{seed}")

    def tuning(self, arm, seed):
        """The fine-tuning of a pretrained model, several times; no two models share a seed of it."""
        setting, task = self.setting, self.task
        steps = math.ceil(setting.task_epochs * len(task.examples("train")) / setting.task_rows)
        return FineTuning(
            task,
            init_from=self.model(arm, seed),
            out_dir=self.path("tuned", f"{arm}-{seed}"),
            updates=updates(setting.task_learning_rate, steps, setting.warmup),
            head="task",
            steps=steps,
            batch_size=setting.task_rows,
            lengths={"inputs": setting.task_length, "targets": 2},
            seeds=range(setting.task_seeds * seed, setting.task_seeds * (seed + 1)),
            metric="macro_f1",
        )


def updates(peak, steps, warmup):
    """ELECTRA's optimizer and schedule (Clark et al. 2020, appendix A)."""
    return Updates(
        AdamW(epsilon=1e-6),
        linear(peak, steps, warmup_steps=round(warmup * steps)),
        weight_decay=0.01,
        no_weight_decay=("scale$", "bias"),
        clip_global_norm=1.0,
    )


def output_kernel_flops(config):
    """Of both passes of the product of factored embeddings that gives the output kernel, once an update."""
    return 6 * (config.embedding_dim or 0) * config.embed_dim * config.vocab_size


def masked_lm_loss(model, batch, rng, *, num_components):
    """`language_model_loss` with logits at the chosen positions alone, as the generators of the other arms have them.

    Logits of all positions would charge masked language modelling for arithmetic that it has no use for.
    """
    assert num_components == 1
    chosen = Chosen.of(batch, MAX_SHARE)
    features = {name: batch[name] for name in model.inputs if name in batch}
    weights = chosen.weights.astype(jnp.float32)
    loss, scores = target_scores(model, chosen.gather(model(**features, rng=rng)), chosen.targets, weights)
    nll, weight = (scores.nll * weights).sum(), weights.sum()
    correct = (scores.correct * weights).sum()
    sums = {"component_nll": nll[None], "component_weight": weight[None]}
    return loss, {"weight": weight, "nll": nll, "correct": correct, **sums}
