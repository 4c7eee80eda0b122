"""The objective, from one example to a run that learns it."""

import dataclasses
import json

import gin
import numpy as np
import pytest

from t5x_domain import cli
from t5x_domain.data.loader import Batches
from t5x_domain.data.mixtures import mixture_of_denoisers
from t5x_domain.data.offsets import Offsets
from t5x_domain.data.packing import DecoderOnly, EncoderDecoder, EncoderOnly
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Corpus, register
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.objectives.masked_lm import MaskedLM
from t5x_domain.objectives.masking import Lexicon, Uniform, WholeWord
from t5x_domain.objectives.prefix import Metadata

VOCABULARY = ByteVocabulary(extra_ids=10)  # the mask token is 268
LENGTHS = {"inputs": 64}
LAW = Corpus("law", JsonlSource({"train": "none.jsonl"}))


@dataclasses.dataclass(frozen=True)
class Split:
    """Documents of the bytes a, b, … z, a, …, whose source is a line of capitals."""

    corpus: str = "law"
    split: str = "train"
    metadata_fields: frozenset = frozenset({"source"})
    num_documents: int = 200

    @property
    def offsets(self):
        sizes = np.random.default_rng(0).integers(20, 90, self.num_documents)
        return Offsets.from_lengths(sizes)

    def documents(self, start, stop):
        return [np.arange(a, b, dtype=np.int32) % 26 + 100 for a, b in zip(*self._borders(start, stop), strict=True)]

    def _borders(self, start, stop):
        return self.offsets[start:stop], self.offsets[start + 1 : stop + 1]

    def metadata(self, start, stop):
        return [{"source": "SOURCE"} for _ in range(start, stop)]

    def derived(self, name, make):
        return make()


def batches(objective=MaskedLM(), layout=EncoderOnly(), metadata=None, **changes):
    mixture = mixture_of_denoisers([LAW], denoisers=[objective], metadata=metadata)
    settings = {"lengths": LENGTHS, "layout": layout, "batch_size": 8, "seed": 3} | changes
    return Batches([Split()], mixture, VOCABULARY, **settings)


# --- An example.


def test_example_is_closed_and_chosen_tokens_are_marked():
    tokens = np.arange(100, 200, dtype=np.int32)
    example = MaskedLM(Uniform(0.2), (1.0, 0.0, 0.0))(tokens, np.random.default_rng(0), VOCABULARY)
    assert example["targets"].tolist() == [*range(100, 200), 1]
    assert example["chosen"].dtype == bool and example["chosen"].sum() == 20
    assert example["inputs"].dtype == example["targets"].dtype == np.int32
    np.testing.assert_array_equal(example["inputs"], np.where(example["chosen"], 268, example["targets"]))
    assert not example["chosen"][-1]
    assert tokens.tolist() == list(range(100, 200)), "what the cache gave is left as it was"


def test_lengths_are_exact():
    objective = MaskedLM()
    for num_raw in (1, 2, 63):
        example = objective(np.full(num_raw, 100, np.int32), np.random.default_rng(0), VOCABULARY)
        assert (len(example["inputs"]), len(example["targets"])) == objective.lengths(num_raw)
    assert objective.raw_length(LENGTHS) == 63


@pytest.mark.parametrize("shares", [(0.8, 0.2), (0.8, 0.1, 0.2), (1.2, -0.1, -0.1), (0.8, 0.1)])
def test_shares_must_sum_to_one(shares):
    with pytest.raises(UserError, match="MaskedLM.shares=.* must be three numbers"):
        MaskedLM(shares=shares)


# --- Rows.


def test_rows_hold_the_text_and_its_chosen_tokens():
    """Rows of 63 tokens and EOS, of which round(9.45) = 9 are chosen; one row ends the corpus and is shorter."""
    made = batches()
    batch = made[0]
    sizes = batch["encoder_token_weights"].sum(axis=1).astype(int) - 1
    assert (sizes == 63).sum() >= 7
    assert batch["encoder_loss_weights"].sum(axis=1).tolist() == [round(0.15 * size) for size in sizes]
    text = np.concatenate([np.arange(seen.start_token, seen.stop_token) for seen in made.seen(0)]) % 26 + 100
    targets = batch["encoder_target_tokens"]
    np.testing.assert_array_equal(targets[targets > 1], text)
    assert all(row[size] == 1 and not row[size + 1 :].any() for row, size in zip(targets, sizes, strict=True))
    changed = batch["encoder_input_tokens"] != targets
    assert not (changed & (batch["encoder_loss_weights"] == 0)).any()
    assert 40 < changed.sum() <= batch["encoder_loss_weights"].sum(), "nine of ten, or nearly so"


@pytest.mark.parametrize("packing", ["concat_and_split", "first_fit"])
def test_masks_are_a_function_of_seed_and_step(packing):
    first, again, other = (batches(packing=packing, seed=seed) for seed in (3, 3, 4))
    for name, feature in first[5].items():
        np.testing.assert_array_equal(feature, again[5][name])
    assert (first[5]["encoder_loss_weights"] != other[5]["encoder_loss_weights"]).any()


def test_every_epoch_has_its_own_masks():
    """Two epochs of 200 documents of 20 to 89 tokens in rows of 64: the same document, hidden otherwise."""
    made, found = batches(packing="first_fit"), {}
    for step in range(2 * 10_900 // 500 + 1):
        batch = made[step]
        segments = [(row, n) for row, ids in enumerate(batch["encoder_segment_ids"]) for n in range(1, ids.max() + 1)]
        for seen, (row, segment) in zip(made.seen(step), segments, strict=True):
            own = batch["encoder_segment_ids"][row] == segment
            masks = found.setdefault((seen.start_token, seen.stop_token), {})
            masks[seen.epoch] = batch["encoder_loss_weights"][row, own]
    twice = [(masks[0], masks[1]) for masks in found.values() if {0, 1} <= masks.keys()]
    assert len(twice) > 100
    assert sum((first != second).any() for first, second in twice) > 0.9 * len(twice)


def test_metadata_are_neither_chosen_nor_learnt():
    """14 bytes of 'Source: SOURCE' before each document, in pieces of the prefix's segment."""
    objective = MaskedLM(Uniform(0.9), (0.0, 1.0, 0.0))
    made = batches(objective, metadata=Metadata(("Source: {source}",)), packing="first_fit")
    prefix = VOCABULARY.encode("Source: SOURCE")
    count = 0
    for step in range(3):
        batch = made[step]
        stands = batch["encoder_positions"] < len(prefix)
        stands &= batch["encoder_segment_ids"] > 0
        for name in ("encoder_input_tokens", "encoder_target_tokens"):
            np.testing.assert_array_equal(batch[name][stands], prefix[batch["encoder_positions"][stands]])
        assert not batch["encoder_loss_weights"][stands].any()
        np.testing.assert_array_equal(
            batch["encoder_token_weights"], ((batch["encoder_segment_ids"] > 0) & ~stands).astype(np.float32)
        )
        assert batch["encoder_loss_weights"].sum() > 0.8 * (batch["encoder_token_weights"].sum() - 8 * 3)
        count += (batch["encoder_positions"] == 0)[stands].sum()
    assert count > 24


def test_first_fit_fills_the_rows():
    stats = batches(packing="first_fit", batch_size=64).packing_stats([0, 1])
    assert stats.encoder == stats.both > 0.95
    assert np.isnan(stats.decoder)


# --- What does not go together.


@pytest.mark.parametrize("packing", ["concat_and_split", "first_fit"])
def test_objective_and_model_must_fit(packing):
    for layout in (EncoderDecoder(), DecoderOnly()):
        name = type(layout).__name__
        with pytest.raises(UserError, match=f"Run.model = {name} predicts with its decoder, but 'mlm'.*MODEL = @Enc"):
            batches(layout=layout, packing=packing, lengths={"inputs": 64, "targets": 64})
    for preset, objective in (("t5", "r3_15"), ("ul2_442", "r3_15"), ("prefix_lm", "s_uniform"), ("causal_lm", "c")):
        mixture = mixture_of_denoisers([LAW], denoisers=preset, mode_form=None)
        message = f"Run.model is an encoder alone, which cannot write the targets of '{objective}'.*set MODEL = @Enc"
        with pytest.raises(UserError, match=message):
            Batches(
                [Split()],
                mixture,
                VOCABULARY,
                lengths={"inputs": 64, "targets": 64},
                layout=EncoderOnly(),
                batch_size=8,
                seed=0,
                packing=packing,
            )


@pytest.mark.parametrize("packing", ["concat_and_split", "first_fit"])
def test_vocabulary_must_serve(packing):
    mixture = mixture_of_denoisers([LAW], denoisers=[MaskedLM()])
    settings = {"lengths": LENGTHS, "layout": EncoderOnly(), "batch_size": 8, "seed": 0, "packing": packing}
    with pytest.raises(UserError, match="raise ByteVocabulary.extra_ids"):
        Batches([Split()], mixture, ByteVocabulary(extra_ids=0), **settings)

    class Nothing(Lexicon):
        def check(self, vocabulary):
            raise UserError("no word is known")

    with pytest.raises(UserError, match="no word is known"):
        batches(MaskedLM(Nothing(["word"])), packing=packing)


def test_seqio_tasks_cannot_say_what_was_chosen():
    with pytest.raises(UserError, match="law_mlm: a SeqIO task .* 'mlm' chose"):
        register(mixture_of_denoisers([LAW], denoisers=[MaskedLM()]), VOCABULARY)


def test_objectives_in_the_place_of_denoisers():
    """Every corpus with each of them; a mix with denoisers is refused."""
    pair, other = [LAW, dataclasses.replace(LAW, name="general")], MaskedLM(WholeWord(), name="words")
    mixture = mixture_of_denoisers(pair, denoisers=[MaskedLM(), other], rates=[3, 1])
    rates = {"law_mlm": 1.5, "law_words": 1.5, "general_mlm": 0.5, "general_words": 0.5}
    assert {c.name: c.rate for c in mixture.components} == rates
    assert not any(c.mode for c in mixture.components)
    with pytest.raises(UserError, match="MaskedLM.* must be .family.* or all entries must be objectives"):
        mixture_of_denoisers(pair, denoisers=[("R", 3, 0.15, None, 0.5), MaskedLM()])


# --- Gin, and a run.

FILES = ["gin/models/tiny.gin", "gin/mixtures/sample.gin", "gin/mixtures/mlm.gin", "gin/runs/pretrain.gin"]


def test_gin_builds_every_masking(tmp_path):
    terms = tmp_path / "terms.txt"
    terms.write_text("law\n")
    for masking, made in {
        "@Uniform()": Uniform(),
        "@WholeWord()": WholeWord(0.2),
        "@Lexicon()": Lexicon(file=str(terms)),
    }.items():
        bindings = [f"MASKING = {masking}", "SHARES = (0.85, 0.0, 0.15)", f"Lexicon.file = {str(terms)!r}"]
        cli.load_gin(FILES, [*bindings, "WholeWord.rate = 0.2", "RUN_DIR = 'none'"])
        assert cli.build(mixture_of_denoisers).components[0].objective == MaskedLM(made, (0.85, 0.0, 0.15))
        gin.clear_config()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Two corpora in which a word says what the next one is, and an encoder of one layer."""
    import jax

    from t5x_domain.data.preparation import prepare
    from t5x_domain.training.run import Run

    monkeypatch.setattr("jax.devices", lambda *_: jax.local_devices()[:1])
    rng = np.random.default_rng(0)
    for name in ("biomedical", "general"):
        texts = [" ".join(rng.choice(["aaaa bbbb", "cccc dddd"], 12)) for _ in range(200)]
        records = [{"text": text, "split": ("train", "validation")[i % 4 == 0]} for i, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    bindings = {
        "MODEL": "@EncoderOnly",
        "BIOMEDICAL": repr(str(tmp_path / "biomedical.jsonl")),
        "GENERAL": repr(str(tmp_path / "general.jsonl")),
        **{f"{name}/JsonlSource.files": _splits(name) for name in ("biomedical", "general")},
        "CACHE_DIR": repr(str(tmp_path / "cache")),
        "RUN_DIR": repr(str(tmp_path / "run")),
        "VOCABULARY": "@ByteVocabulary()",
        "VOCABULARY_SIZE": None,
        "ModelConfig.vocab_size": 384,
        "ModelConfig.embed_dim": 32,
        "ModelConfig.mlp_dim": 32,
        "ModelConfig.num_heads": 1,
        "ModelConfig.head_dim": 16,
        "ModelConfig.num_encoder_layers": 1,
        "LENGTHS": LENGTHS,
        "BATCH_SIZE": 8,
        "TRAIN_STEPS": 40,
        "Run.eval_batches": 2,
        "rsqrt.base": 0.3,
        "rsqrt.warmup_steps": 10,
    }
    cli.load_gin(FILES, [f"{name} = {value}" for name, value in bindings.items()])
    cli.build(prepare)
    return cli.build(Run)


def _splits(corpus):
    return f"{{'train': %{corpus.upper()}, 'validation': %{corpus.upper()}}}"


def test_an_encoder_learns_and_is_scored_on_fixed_masks(run):
    """Held-out perplexity falls from that of 384 ids at random; asked again, the same masks give the same score."""
    from t5x_domain.training.loop import open_trained, train
    from t5x_domain.training.step import make_eval_step

    assert train(run) == 0
    with open(f"{run.run_dir}/eval.json", encoding="utf-8") as file:
        scores = json.load(file)
    for corpus in ("biomedical", "general"):
        before, after = (scores[when][corpus] for when in ("before", "after"))
        assert before["perplexity"] > 100 and after["perplexity"] < 20
        # Two batches of eight rows of 63 bytes, round(9.45) = 9 of them hidden.
        assert before["targets"] == after["targets"] == 2 * 8 * 9
    feed, blueprint, params = open_trained(run)
    assert feed.held_out(make_eval_step(blueprint, feed.loss), params)["general"] == scores["after"]["general"]
