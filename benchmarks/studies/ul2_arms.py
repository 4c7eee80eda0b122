"""What the miniature of UL2's ablation compares: objectives, sizes, and how every objective gets the same text."""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from t5x_domain.data.cache import TokenCache
from t5x_domain.data.curriculum import Phase
from t5x_domain.data.loader import Batches
from t5x_domain.data.mixtures import mixture_of_denoisers
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Corpus
from t5x_domain.data.vocabulary import Vocabulary
from t5x_domain.models.assemblies import DecoderOnly, EncoderDecoder
from t5x_domain.models.config import ModelConfig
from t5x_domain.objectives.language_modeling import CausalLM
from t5x_domain.objectives.losses import language_model_loss
from t5x_domain.objectives.prefix import NO_TOKENS, Mode
from t5x_domain.parallel.mesh import MeshShape
from t5x_domain.training.feed import LAYOUTS
from t5x_domain.training.optimizer import Adafactor, Updates
from t5x_domain.training.run import Run
from t5x_domain.training.schedule import linear

MODELS = {"encoder_decoder": EncoderDecoder, "decoder_only": DecoderOnly}
NO_PRETRAINING = "none"


@dataclasses.dataclass(frozen=True)
class Objective:
    """An arm: a preset of objectives/ul2.py, how it is asked to go on with a text, its mode tokens by task, and where
    its prefix LM cuts: UL2's S-denoiser before the last quarter, the prefix LM of other objectives anywhere.
    """

    preset: str
    continuation: str
    write_mode: str | None = None
    fill_mode: str | None = None
    split: str = "suffix"


# How a text is continued is what the objective was trained to do, chosen before anything was measured: 'prefix' has the
# beginning in the inputs and the rest as targets, 'sentinel' has it as the inputs' last corrupted span, 'causal' has no
# inputs and the beginning in the targets.
OBJECTIVES = {
    "causal_lm": Objective("causal_lm", "causal"),
    "prefix_lm": Objective("prefix_lm", "prefix", split="uniform"),
    "t5": Objective("t5", "sentinel"),
    "t5_and_causal_lm": Objective("t5_and_causal_lm", "causal"),
    "unilm": Objective("unilm", "prefix", split="uniform"),
    "ul2": Objective("ul2_uniform7", "prefix", "[S]", "[R]"),
    "s_only": Objective("s_only", "prefix", "[S]", "[S]"),
    "x_only": Objective("x_only", "sentinel", "[X]", "[X]"),
    "r_only": Objective("r_only", "sentinel", "[R]", "[R]"),
    NO_PRETRAINING: Objective("prefix_lm", "prefix"),
}
PAPER_ARMS = ("causal_lm", "prefix_lm", "t5", "t5_and_causal_lm", "unilm", "ul2")
MODES = ("[S]", "[R]", "[X]", None)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes. Lengths and counts are in tokens, rows, documents or updates."""

    objectives: tuple[str, ...] = (*PAPER_ARMS, "s_only", "x_only", NO_PRETRAINING)
    architectures: tuple[str, ...] = ("encoder_decoder",)
    seeds: tuple[int, ...] = (0, 1, 2)
    vocabulary_size: int = 2000
    embed_dim: int = 128
    mlp_dim: int = 256
    num_heads: int = 2
    layers: int = 2
    dtype: str = "float32"
    raw_tokens: int = 256  # of text in a row
    rows: int = 12
    steps: int = 600
    peak: float = 0.03
    warmup: int = 20
    examples_per_label: int = 40
    tested_per_label: int = 40
    fine_tuning_steps: int = 150
    fine_tuning_rows: int = 16
    fine_tuning_peak: float = 0.01
    text_length: int = 64  # of what is classified
    held_out_documents: int = 200  # of each corpus
    held_out_length: int = 128
    prompts: int = 48
    prompt_length: int = 32
    written_length: int = 16


SETTINGS = {
    "cpu": Setting(),
    "gpu": Setting(
        objectives=(*PAPER_ARMS, "s_only", "x_only", "r_only", NO_PRETRAINING),
        architectures=("encoder_decoder", "decoder_only"),
        seeds=(0, 1, 2, 3, 4),
        vocabulary_size=8000,
        embed_dim=384,
        mlp_dim=1024,
        num_heads=6,
        layers=4,
        dtype="bfloat16",
        raw_tokens=512,
        rows=64,
        steps=2000,
        peak=0.01,
        warmup=200,
        fine_tuning_steps=300,
        fine_tuning_rows=32,
        fine_tuning_peak=0.003,
        prompts=128,
    ),
    "smoke": Setting(
        objectives=("t5", "ul2"),
        seeds=(0, 1),
        embed_dim=32,
        mlp_dim=32,
        num_heads=1,
        layers=1,
        rows=2,
        steps=4,
        warmup=1,
        examples_per_label=2,
        tested_per_label=2,
        fine_tuning_steps=3,
        held_out_documents=8,
        prompts=4,
        written_length=4,
    ),
}


@dataclasses.dataclass(frozen=True)
class CausalLMAfterEOS(CausalLM):
    """Causal LM for an encoder-decoder, which must read something: EOS alone."""

    name: str = "c"

    def lengths(self, num_raw):
        return 1, num_raw + 1

    def __call__(self, tokens, rng, vocabulary):
        return {**super().__call__(tokens, rng, vocabulary), "inputs": np.array([vocabulary.eos_id], np.int32)}


@dataclasses.dataclass(frozen=True)
class Place:
    """Files of the study, and what is in them."""

    work_dir: str
    documents: tuple[str, ...]
    setting: Setting

    @property
    def cache_dir(self):
        return f"{self.work_dir}/cache"

    @functools.cached_property
    def vocabulary(self):
        return Vocabulary(f"{self.cache_dir}/vocabulary.model", extra_ids=256)

    @functools.cached_property
    def corpora(self):
        return [
            Corpus(
                Path(file).name.partition(".")[0],
                JsonlSource(dict.fromkeys(("train", "validation"), file), split_field="split"),
            )
            for file in self.documents
        ]

    def mixture(self, objective, architecture):
        arm = OBJECTIVES[objective]
        mixture = mixture_of_denoisers(self.corpora, denoisers=arm.preset, split=arm.split, mode_form="id")
        if architecture == "decoder_only":
            return mixture
        components = [
            dataclasses.replace(c, objective=CausalLMAfterEOS()) if isinstance(c.objective, CausalLM) else c
            for c in mixture.components
        ]
        return dataclasses.replace(mixture, components=components)

    def splits(self, name):
        fingerprint = self.vocabulary.fingerprint
        return [
            TokenCache.open(self.cache_dir, c.name, vocabulary_fingerprint=fingerprint).split(name)
            for c in self.corpora
        ]

    def mode(self, token):
        return NO_TOKENS if token is None else Mode(token, as_text=False).ids(self.vocabulary)

    def config(self, architecture):
        setting = self.setting
        return ModelConfig(
            vocab_size=-(-self.vocabulary.vocab_size // 128) * 128,
            embed_dim=setting.embed_dim,
            mlp_dim=setting.mlp_dim,
            num_heads=setting.num_heads,
            head_dim=setting.embed_dim // setting.num_heads,
            num_encoder_layers=setting.layers if architecture == "encoder_decoder" else 0,
            num_decoder_layers=setting.layers,
            dtype=setting.dtype,
        )


def equal_lengths(place, objective, architecture, rounds=6):
    """Row lengths at which an update of this objective holds `raw_tokens` of text a row, and what is in the rows.

    Every objective makes another number of inputs and targets of the same text. So rows are as long as it takes, found
    by packing some: what is alike for all objectives is the text of an update, not the padding nor the arithmetic.
    """
    setting, layout = place.setting, LAYOUTS[MODELS[architecture]]
    lengths = {"inputs": setting.raw_tokens, "targets": setting.raw_tokens}
    for round_number in range(rounds):
        batches = Batches(
            place.splits("train"),
            place.mixture(objective, architecture),
            place.vocabulary,
            lengths=lengths,
            layout=layout,
            batch_size=64,
            seed=0,
            packing="first_fit",
        )
        steps = range(4)
        stats, rows = batches.packing_stats(steps), 64 * len(steps)
        raw = sum(sum(batches.raw_tokens(step).values()) for step in steps) / rows
        room = dict(zip(("inputs", "targets"), layout.capacity(lengths), strict=True))
        filled = {"inputs": stats.encoder, "targets": stats.decoder}
        taken = {name: room[name] * filled[name] if room[name] else 0.0 for name in room}
        measured = {
            "lengths": lengths,
            "raw_tokens_per_row": raw,
            "encoder_tokens_per_raw_token": taken["inputs"] / raw,
            "decoder_tokens_per_raw_token": taken["targets"] / raw,
            "encoder_filled": None if np.isnan(stats.encoder) else stats.encoder,
            "decoder_filled": stats.decoder,
            "dropped_share": stats.dropped_share,
        }
        if round_number == rounds - 1 or (round_number > 1 and abs(raw / setting.raw_tokens - 1) < 0.004):
            return measured
        fullest = np.nanmax(list(filled.values()))
        wanted = {name: taken[name] / raw * setting.raw_tokens / fullest for name in taken}
        if architecture == "decoder_only":
            lengths = {"inputs": round(wanted["targets"]) // 2, "targets": -(-round(wanted["targets"]) // 2)}
        else:  # the shorter sequence gets a little more room, or a few documents with many targets would leave gaps
            longest = max(wanted.values())
            lengths = {n: round(w if w == longest else max(1.1 * w, 24)) for n, w in wanted.items()}


def make_run(place, objective, architecture, seed, lengths):
    setting = place.setting
    return Run(
        run_dir=f"{place.work_dir}/runs/{objective}-{architecture}-{seed}",
        model=MODELS[architecture],
        config=place.config(architecture),
        phases=[Phase(place.mixture(objective, architecture))],
        vocabulary=place.vocabulary,
        cache_dir=place.cache_dir,
        lengths=lengths,
        updates=make_updates(setting.peak, setting.steps, setting.warmup),
        total_steps=setting.steps,
        batch_size=setting.rows,
        mesh=MeshShape(),
        loss=functools.partial(language_model_loss, z_loss=1e-4),
        packing="first_fit",
        seed=seed,
        log_every=max(setting.steps // 10, 1),
        eval_every=setting.steps,
        eval_batches=1,
        checkpoint_every=max(setting.steps // 2, 1),
    )


def make_updates(peak, steps, warmup):
    return Updates(Adafactor(), linear(peak=peak, total_steps=steps, warmup_steps=warmup))
