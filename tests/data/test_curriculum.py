"""Phases of a run: where they begin, what they go on with, what they refuse, and the recipes in gin/recipes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import assert_equal, skewed_split

from t5x_domain import cli
from t5x_domain.data.curriculum import Curriculum, Phase, learning_rate, shares_seen
from t5x_domain.data.loader import Batches, iterate
from t5x_domain.data.mixtures import mixture_of_denoisers
from t5x_domain.data.packing import DecoderOnly, EncoderDecoder
from t5x_domain.data.sampling import ExampleRandom
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Component, Corpus, Mixture
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.objectives.language_modeling import CausalLM
from t5x_domain.objectives.prefix import Metadata, Mode

VOCABULARY = ByteVocabulary(extra_ids=100)
SPLITS = [skewed_split("medicine", 0, count=800), skewed_split("law", 1, count=800)]
CORPORA = [Corpus(split.corpus, JsonlSource({"train": "none.jsonl"})) for split in SPLITS]
METADATA = Metadata(templates=("{source}:",))
LENGTHS = {"inputs": 64, "targets": 64}


def mixture(rates=(1.0, 1.0), denoisers="t5", corpora=CORPORA, **more):
    return mixture_of_denoisers(corpora, denoisers=denoisers, rates=rates[: len(corpora)], **more)


def curriculum(phases, total_steps=20, splits=SPLITS, layout=None, packing="first_fit", rows_per_window=4):
    names = list({c.name: None for phase in phases for c in phase.components})

    def batches(mixture, subset):
        return Batches(
            splits,
            mixture,
            VOCABULARY,
            lengths=LENGTHS,
            layout=layout or EncoderDecoder(),
            batch_size=4,
            rows_per_window=rows_per_window,
            seed=5,
            packing=packing,
            component_names=names,
            subset=subset,
        )

    return Curriculum(phases, total_steps, batches)


@pytest.mark.parametrize(
    "lengths, starts",
    [
        ([{"share": 0.9}, {"share": 0.1}], [0, 18]),
        ([{"share": 1 / 3}, {"share": 1 / 3}, {"share": 1 / 3}], [0, 7, 13]),  # round(20/3) = 7, round(40/3) = 13
        ([{"steps": 5}, {}], [0, 5]),
        ([{}, {"share": 0.25}, {"steps": 2}], [0, 13, 18]),
        ([{}], [0]),
    ],
)
def test_where_phases_begin(lengths, starts):
    phases = [Phase(mixture(), name=str(number), **length) for number, length in enumerate(lengths)]
    made = curriculum(phases)
    assert made.starts == starts
    assert made.spans[-1][1] == 20
    assert [made.phase_of(step) for step in starts] == list(range(len(starts)))
    assert [made.phase_of(step - 1) for step in starts[1:]] == list(range(len(starts) - 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 20))
def test_shares_that_sum_to_one_lose_no_step(parts, factor):
    total = sum(parts) * factor
    phases = [Phase(mixture(), share=part / sum(parts)) for part in parts]
    spans = curriculum(phases, total).spans
    assert [stop - start for start, stop in spans] == [part * factor for part in parts]


def seen_tokens(made, steps, corpus):
    """{epoch: token numbers} of a corpus in some steps."""
    result = {}
    for seen in (seen for step in steps for seen in made.seen(step)):
        if seen.component.startswith(corpus):
            result.setdefault(seen.epoch, []).append(np.arange(seen.start_token, seen.stop_token))
    return {epoch: np.concatenate(parts) for epoch, parts in result.items()}


def test_cooldown_sees_new_documents_without_metadata():
    """MeCo: the last tenth goes on with text that has not been seen, whatever the denoiser, and carries no metadata."""
    learnt = mixture(denoisers="ul2_442", metadata=METADATA)
    made = curriculum([Phase(learnt, share=0.9), Phase(learnt, metadata_rate=0.0)])
    for corpus in ("medicine", "law"):
        first, last = (seen_tokens(made, steps, corpus) for steps in (range(18), range(18, 20)))
        assert set(first) == set(last) == {0}, "one epoch is enough for this run"
        assert len(last[0]) > 100
        assert not set(first[0]) & set(last[0])
    # Metadata are 'a:', 'ab:', … in front of the inputs; the raw tokens of `MemorySplit` count up from 3.
    colon = ord(":") + 3
    after_letter = [
        [
            np.isin(row[np.flatnonzero(row == colon) - 1], np.frombuffer(b"abcde", np.uint8) + 3).sum()
            for row in made[step]["encoder_input_tokens"]
        ]
        for step in (0, 5, 18, 19)
    ]
    assert np.sum(after_letter[:2]) > 10
    # By chance a corrupted text has such a pair too, but rarely.
    assert np.sum(after_letter[2:]) <= 1


def test_a_corpus_goes_on_across_other_rates_and_denoisers():
    phases = [
        Phase(mixture((1.0, 1.0)), share=0.5),
        Phase(mixture((3.0, 1.0), "ul2_442"), share=0.3),
        Phase(mixture((0.2, 1.0), "prefix_lm"), share=0.2),
    ]
    made = curriculum(phases)
    for corpus in ("medicine", "law"):
        for tokens in seen_tokens(made, range(20), corpus).values():
            assert len(tokens) == len(np.unique(tokens))


def test_a_corpus_goes_on_with_concat_and_split():
    made = curriculum([Phase(mixture((1.0, 3.0)), share=0.5), Phase(mixture((3.0, 1.0)))], packing="concat_and_split")
    alone = curriculum([Phase(mixture((1.0, 3.0)))], packing="concat_and_split")
    assert [made.seen(step) for step in range(10)] == [alone.seen(step) for step in range(10)]
    for corpus in ("medicine", "law"):
        for tokens in seen_tokens(made, range(20), corpus).values():
            assert len(tokens) == len(np.unique(tokens))


def test_epochs_of_a_fixed_subset_with_new_samples_of_the_rest():
    """The stability gap: the same 40 documents of law four times, medicine never the same."""
    phase = Phase(mixture((1.0, 1.0)), epochs=4, subset={"law": 40})
    rest = Phase(mixture(), name="rest")
    made = curriculum([phase, rest], total_steps=400)
    stop = made.starts[1]
    law = seen_tokens(made, range(stop), "law")
    subset = int(SPLITS[1].offsets[40])
    for epoch in range(3):  # The last of four ends with the phase, give or take a window.
        dropped = subset - len(law[epoch])
        assert len(law[epoch]) == len(np.unique(law[epoch])) and max(law[epoch]) < subset
        assert dropped < 0.1 * subset
    assert set(law) <= {0, 1, 2, 3, 4} and {0, 1, 2, 3} <= set(law)
    medicine = seen_tokens(made, range(stop), "medicine")
    assert set(medicine) == {0} and len(medicine[0]) == len(np.unique(medicine[0]))
    assert max(seen_tokens(made, range(stop, 400), "law")[0]) > subset
    share = curriculum([dataclasses.replace(phase, subset={"law": 0.05}), rest], total_steps=400)
    assert share.starts == made.starts, "a share of 0.05 is 40 of 800 documents"


def test_epochs_are_passes_by_all_denoisers_together():
    """Four passes over 40 documents by seven denoisers, in either packing."""
    for packing in ("first_fit", "concat_and_split"):
        phases = [
            Phase(mixture(denoisers="ul2_442", corpora=CORPORA[1:]), epochs=4, subset={"law": 40}),
            Phase(mixture()),
        ]
        made = curriculum(phases, total_steps=2000, packing=packing)
        tokens = sum(sum(made.raw_tokens(step).values()) for step in range(made.starts[1]))
        # Whole windows of 4 rows, and steps of 4 rows; up to 5 % found no room.
        assert 3.7 < tokens / SPLITS[1].offsets[40] < 4.5, packing


def test_a_subset_is_corrupted_otherwise_than_the_whole():
    """The same document comes in the subset and in the whole, as the same piece of the same epoch."""
    phases = [Phase(mixture(), steps=20, subset={"law": 800, "medicine": 700}), Phase(mixture(), steps=20)]
    made = curriculum(phases, total_steps=40)
    first, second = made._batches
    assert [maker._key for maker in first._makers] != [maker._key for maker in second._makers]
    piece = next(p for row in first._rows(0, 8) for p in row if p.component == 0)
    tokens = np.arange(3, 60, dtype=np.int32)
    same, other = (batches._makers[0].example(piece, tokens, ExampleRandom(5)).inputs for batches in (first, second))
    assert not np.array_equal(same, other)


def test_batches_are_random_access_across_phases():
    phases = [Phase(mixture(denoisers="ul2_442", metadata=METADATA), share=0.5), Phase(mixture((1.0, 9.0)))]
    made, again = curriculum(phases), curriculum(phases)
    for step in (19, 0, 10, 9, 11):
        assert_equal(made[step], again[step])
        assert made.seen(step) == again.seen(step)


def test_worker_processes_make_the_same_batches():
    learnt = mixture(denoisers="ul2_442", split="uniform", metadata=dataclasses.replace(METADATA, rate=0.5))
    made = curriculum([Phase(learnt, share=0.5, schedule=lambda step: step), Phase(learnt)])
    for step, batch, _ in iterate(made, 8, stop_step=12, num_workers=2):
        assert_equal(batch, made[step])


def test_raw_tokens_are_those_of_the_rows_and_follow_the_rates():
    made = curriculum(
        [Phase(mixture((3.0, 1.0), "ul2_442"), share=0.5), Phase(mixture((1.0, 3.0)), name="law")],
        200,
        rows_per_window=64,
    )
    counted = {}
    for name, steps in (("phase 1", range(100)), ("law", range(100, 200))):
        counted[name] = {}
        for step in steps:
            for component, number in made.raw_tokens(step).items():
                counted[name][component] = counted[name].get(component, 0) + number
        tokens = {}
        for seen in (seen for step in steps for seen in made.seen(step)):
            tokens[seen.component] = tokens.get(seen.component, 0) + seen.stop_token - seen.start_token
        assert {k: v for k, v in counted[name].items() if v} == tokens
    components = mixture(denoisers="ul2_442").components
    shares = shares_seen(counted["phase 1"], components)
    # 7 windows of 64 rows. A component's stretch in each is cut at documents of 45 tokens on average, which leaves it
    # uncertain by sqrt(2 x 7) x 45 / sqrt(3) = 100 tokens in all, 5 % of the smaller denoisers' 2,000 or so; 3 sigma.
    assert shares["corpora"] == pytest.approx({"medicine": 0.75, "law": 0.25}, rel=0.03)
    expected = {"r3_15": 0.2, "r8_15": 0.2, "x3_50": 0.1, "x8_50": 0.1, "x64_15": 0.1, "x64_50": 0.1, "s": 0.2}
    assert shares["denoisers"] == pytest.approx(expected, rel=0.15)
    assert shares_seen(counted["law"], components)["corpora"] == pytest.approx(
        {"medicine": 0.25, "law": 0.75}, rel=0.03
    )


def test_learning_rate_by_phase():
    """The run's own schedule goes on by the run's steps; a phase's own counts from the phase's start."""
    phases = [
        Phase(mixture(), steps=5),
        Phase(mixture(), steps=10, schedule=lambda step: 100.0 + step),
        Phase(mixture()),
    ]
    starts = curriculum(phases).starts
    rate = learning_rate(phases, starts, lambda step: 1.0 * step)
    assert [float(rate(step)) for step in (0, 4, 5, 14, 15, 19)] == [0, 4, 100, 109, 15, 19]
    base = object()
    assert learning_rate(phases[:1] + phases[2:], [0, 5], base) is base


@pytest.mark.parametrize("layout", [EncoderDecoder(), DecoderOnly()])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_rate_of_metadata(layout, rate):
    """Document i of `MemorySplit` has a source of 1 + i % 5 letters; with the colon that is what its prefix takes."""
    learnt = mixture(metadata=dataclasses.replace(METADATA, rate=rate))
    made = curriculum([Phase(learnt)], layout=layout, total_steps=50)
    makers = made._batches[0]._makers
    carried = []
    for maker in makers:
        for piece in (p for row in made._batches[0]._rows(0, 200) for p in row if makers[p.component] is maker):
            document = maker.line.document(piece.start)
            prefix = maker._metadata.of(piece)
            assert len(prefix) in (0, 2 + document % 5)
            assert len(prefix) == maker._metadata.lengths(piece.epoch, np.array([document]))[0]
            carried.append(len(prefix) > 0)
    # binomial(n, rate), six standard deviations
    assert abs(np.mean(carried) - rate) <= 6 * np.sqrt(rate * (1 - rate) / len(carried))


def test_prefixes_carry_no_loss_and_causal_text_stays_causal():
    learnt = Mixture("clm", [Component(CORPORA[0], CausalLM(), metadata=METADATA)])
    batch = curriculum([Phase(learnt)], layout=DecoderOnly())[0]
    tokens, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    starts = np.argwhere((batch["decoder_positions"] == 0) & (batch["decoder_segment_ids"] > 0))
    assert len(starts) > 8
    letters = np.frombuffer(b"abcde", np.uint8) + 3
    for row, start in starts:
        length = 1 + int(np.flatnonzero(tokens[row, start:] == ord(":") + 3)[0])
        np.testing.assert_array_equal(tokens[row, start : start + length - 1], letters[: length - 1])
        assert not weights[row, start : start + length].any()
        assert weights[row, start + length] == 1
        assert batch["decoder_prefix"][row, start : start + length].tolist() == [1] + [0] * (length - 1)
        assert batch["decoder_input_tokens"][row, start] == 0, "the start token is never a target"


REFUSED = [
    ([], "Run.phases is empty"),
    (
        [{"share": 0.5}, {"share": 0.4}],
        "do not fill the run of 20 steps .TRAIN_STEPS., they have phase 1 10, phase 2 8",
    ),
    ([{"steps": 30}, {}], "they have phase 1 30, phase 2 -10"),
    ([{"steps": 20}, {}], "they have phase 1 20, phase 2 0"),
    ([{}, {}], "2 phases have no length"),
    ([{"share": 0.5, "steps": 3}], "Phase.share and Phase.steps are both set"),
    ([{"epochs": 0}], "Phase.epochs = 0: it must be above 0"),
    ([{"steps": 1e1}, {}], "Phase.steps = 10.0: it must be an integer"),
    ([{"metadata_rate": 2.0}], "Phase.metadata_rate = 2.0: it must lie between 0 and 1"),
    ([{"share": 0.99}, {"share": 0.01}], "they have phase 1 20, phase 2 0. Each needs a step at least"),
    ([{"subset": {"physics": 3}}], "Phase.subset names the corpus 'physics', but the mixture has only medicine, law"),
    ([{"subset": {"law": 801}}], "Phase.subset: 801 of corpus law is 801 documents, but there are 800"),
    ([{"subset": {"law": 0.0001}}], "Phase.subset: 0.0001 of corpus law is 0 documents"),
    ([{"metadata_rate": 0.0}], "no component of mixture 'denoisers' has metadata"),
    ([{"name": "a", "share": 0.5}, {"name": "a", "share": 0.5}], "two phases are named 'a'"),
]


@pytest.mark.parametrize("phases, message", REFUSED)
def test_phases_that_cannot_be(phases, message):
    with pytest.raises(UserError, match=message):
        curriculum([Phase(mixture(), **settings) for settings in phases])


def test_metadata_that_cannot_be():
    for templates in (("{author}",), ("{author} {source}",)):
        with pytest.raises(UserError, match="need the field author, which nothing in corpus 'medicine'"):
            curriculum([Phase(mixture(metadata=Metadata(templates)))])
    with pytest.raises(UserError, match="set Run.packing='first_fit'"):
        curriculum([Phase(mixture(metadata=METADATA))], packing="concat_and_split")
    with pytest.raises(UserError, match="leaves no room in"):
        curriculum([Phase(mixture(metadata=Metadata(("x" * 70,), max_tokens=80)))])
    fallback = curriculum([Phase(mixture(metadata=Metadata(("{author}:", "?:"))))])[0]["encoder_input_tokens"]
    question = np.flatnonzero(fallback[0] == ord("?") + 3)
    assert fallback[0, question[0] + 1] == ord(":") + 3


def test_what_was_seen_is_counted_once_across_an_interruption(two_corpora, monkeypatch):
    """Stopped after 10 steps, between the logged steps 8 and 12."""
    import jax

    from t5x_domain.data.preparation import prepare
    from t5x_domain.training import loop
    from t5x_domain.training.run import Run

    class Notice:
        """Told to stop at the tenth question."""

        asked = 0

        @property
        def given(self):
            self.asked += 1
            return self.asked == 10

        def close(self):
            pass

    monkeypatch.setattr("jax.devices", lambda *_: jax.local_devices()[:1])
    files = ["models/tiny", "mixtures/sample", "runs/pretrain", "recipes/upsampling"]
    cli.load_gin([f"gin/{file}.gin" for file in files], [*two_corpora, "UPSAMPLED_RATES = [9.0, 1.0]"])
    cli.build(prepare)
    run = cli.build(Run)
    assert loop.train(run) == 0
    stopped = dataclasses.replace(run, run_dir=f"{run.run_dir}-stopped")
    with monkeypatch.context() as patched:
        patched.setattr(loop, "PreemptionNotice", Notice)
        assert loop.train(stopped) == loop.EXIT_PREEMPTED
    assert loop.train(stopped) == 0
    assert (Path(stopped.run_dir) / "phases.json").read_bytes() == (Path(run.run_dir) / "phases.json").read_bytes()


def test_conditional_evaluation_puts_metadata_where_training_did(two_corpora, monkeypatch):
    """Held-out text without, with its own, with given metadata, and in another mode: what the model gets to read."""
    import jax

    from t5x_domain.data.preparation import prepare
    from t5x_domain.training.feed import Feed
    from t5x_domain.training.run import Run

    monkeypatch.setattr("jax.devices", lambda *_: jax.local_devices()[:1])
    files = ["models/tiny", "mixtures/sample", "runs/pretrain", "recipes/meco"]
    settings = ["Metadata.templates = ('Source: {source} ',)", "Metadata.rate = 0.5", "DENOISERS = 'ul2_442'"]
    scored = ["Run.eval_mixture = @s/mixture_of_denoisers()", "s/mixture_of_denoisers.denoisers = 's_only'"]
    cli.load_gin([f"gin/{file}.gin" for file in files], [*two_corpora, *settings, *scored])
    cli.build(prepare)
    run = cli.build(Run)
    feed = Feed(run, run.mesh.build())

    targets = []

    def starts(**conditions):
        """The first bytes that the encoder reads of every held-out example."""
        read = []
        targets.append([])

        def eval_step(params, batch):
            tokens = np.asarray(batch["encoder_input_tokens"])
            for row, start in np.argwhere(
                (np.asarray(batch["encoder_positions"]) == 0) & (np.asarray(batch["encoder_segment_ids"]) > 0)
            ):
                read.append(VOCABULARY.decode(tokens[row, start : start + 30]))
            targets[-1].append(np.asarray(batch["decoder_target_tokens"]))
            return {"nll": 1.0, "correct": 0.0, "weight": 1.0}

        feed.held_out(eval_step, None, **conditions)
        return read

    own = tuple(f"Source: {corpus}{i} [S2S]" for corpus in ("biomedical", "general") for i in range(3))
    assert all(text.startswith("[S2S]") for text in starts())
    assert all(text.startswith(own) for text in starts(metadata="own"))
    assert all(text.startswith("Source: law [NLG]") for text in starts(metadata={"source": "law"}, mode=Mode("[NLG]")))
    assert not any(text.startswith(("[", "S")) for text in starts(mode=None))
    # The same text is scored under all conditions, in the same rows.
    for other in targets[1:]:
        np.testing.assert_array_equal(other, targets[0])
    with pytest.raises(UserError, match="the given metadata name the field court, but .* have only source"):
        starts(metadata={"court": "law"})
    bare = mixture_of_denoisers(run.phases[0].mixture.corpora, denoisers="t5", metadata=None)
    plain = dataclasses.replace(run, eval_mixture=bare)
    with pytest.raises(UserError, match="'biomedical_r3_15' was trained without metadata"):
        Feed(plain, run.mesh.build()).held_out(None, None, metadata="own")


def test_phases_may_not_give_one_name_to_two_objectives(two_corpora, monkeypatch):
    import jax

    from t5x_domain.data.preparation import prepare
    from t5x_domain.training.feed import Feed
    from t5x_domain.training.run import Run

    monkeypatch.setattr("jax.devices", lambda *_: jax.local_devices()[:1])
    cli.load_gin([f"gin/{f}.gin" for f in ("models/tiny", "mixtures/sample", "runs/pretrain")], two_corpora)
    cli.build(prepare)
    run = cli.build(Run)
    (component, *_) = run.phases[0].mixture.components
    changed = dataclasses.replace(component.objective, mean_span_length=8)
    other = Mixture("other", [dataclasses.replace(component, objective=changed)])
    with pytest.raises(UserError, match="different objectives named 'biomedical_r3_15'"):
        Feed(dataclasses.replace(run, eval_mixture=other), run.mesh.build())
    # A mix with causal LM trains an encoder-decoder, and its causal part is scored by itself.
    unilm = mixture_of_denoisers(run.phases[0].mixture.corpora, denoisers="unilm")
    feed = Feed(dataclasses.replace(run, phases=[Phase(unilm)], packing="first_fit"), run.mesh.build())
    assert len(feed.eval_components) == 6


@pytest.fixture
def two_corpora(tmp_path):
    """gin bindings for two corpora of 300 documents with sources, as bytes."""
    rng = np.random.default_rng(0)
    for name in ("biomedical", "general"):
        records = [
            {
                "text": " ".join(rng.choice(["law", "cell", "of", "the", "tissue"], rng.integers(3, 25))),
                "source": f"{name}{i % 3}",
                "split": ("train", "train", "validation", "test")[i % 4],
            }
            for i in range(300)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    bindings = {
        "BIOMEDICAL": repr(str(tmp_path / "biomedical.jsonl")),
        "GENERAL": repr(str(tmp_path / "general.jsonl")),
        "CACHE_DIR": repr(str(tmp_path / "cache")),
        "RUN_DIR": repr(str(tmp_path / "run")),
        "VOCABULARY": "@ByteVocabulary()",
        "ByteVocabulary.extra_ids": 256,
        "ModelConfig.vocab_size": 640,
        "ModelConfig.embed_dim": 16,
        "ModelConfig.mlp_dim": 16,
        "ModelConfig.num_heads": 1,
        "ModelConfig.head_dim": 16,
        "ModelConfig.num_encoder_layers": 1,
        "ModelConfig.num_decoder_layers": 1,
        "LENGTHS": {"inputs": 64, "targets": 64},
        "BATCH_SIZE": 8,
        "TRAIN_STEPS": 20,
        "VOCABULARY_SIZE": None,
        "prepare.inputs_length": None,
        "Run.eval_batches": 1,
        "Run.log_every": 4,
    }
    return [f"{name} = {value}" for name, value in bindings.items()]


RECIPES = {
    # name: (bindings, start of each phase)
    "meco": (["Metadata.templates = ('Source: {source} ',)"], [0, 18]),
    "upsampling": (["UPSAMPLED_RATES = [9.0, 1.0]"], [0, 17]),
    "replay": (["REPLAY_RATES = [0.9, 0.1]"], [0]),
    "rewarm": (["REWARMED_STEPS = 8", "rewarmed/cosine.warmup_steps = 2"], [0, 12]),
    "stability_gap": (
        ["SUBSET = {'biomedical': 20}", "Run.packing = 'first_fit'", "Batches.rows_per_window = 8"],
        None,
    ),
    "ul2r": ([], [0]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run(name, two_corpora, monkeypatch, capsys):
    """Each file of gin/recipes trains, and what it promises is in the logs."""
    import jax

    from t5x_domain.data.preparation import prepare
    from t5x_domain.training.loop import train
    from t5x_domain.training.run import Run

    monkeypatch.setattr("jax.devices", lambda *_: jax.local_devices()[:1])
    bindings, starts = RECIPES[name]
    files = ["models/tiny", "mixtures/sample", "runs/pretrain", f"recipes/{name}"]
    cli.load_gin([f"gin/{file}.gin" for file in files], [*two_corpora, *bindings])
    cli.build(prepare)
    run = cli.build(Run)
    folder = Path(run.run_dir)
    if name == "ul2r":  # a finished model of another objective
        base = mixture_of_denoisers(run.phases[0].mixture.corpora, denoisers="t5")
        finished = dataclasses.replace(run, run_dir=str(folder / "base"), phases=[Phase(base)], total_steps=4)
        assert train(finished) == 0
        run = dataclasses.replace(run, init_from=finished.run_dir, eval_mixture=base)
    assert train(run) == 0
    phases = json.loads((folder / "phases.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if starts is not None:
        assert [phase["start"] for phase in phases] == starts
    assert phases[-1]["stop"] == 20 and all(phase["raw_tokens"] > 0 for phase in phases)
    corpora = [phase["corpora"] for phase in phases]
    rates = [line["learning_rate"] for line in lines]  # of steps 4, 8, 12, 16, 20
    if name == "meco":
        metadata = [phase.components[0].metadata.rate for phase in run.phases]
        assert metadata == [1.0, 0.0]
        assert len(set(rates)) == 1, "rsqrt during its warm-up: the schedule goes on"
    elif name == "upsampling":
        assert corpora[0]["biomedical"] == pytest.approx(0.5, abs=0.1)
        assert corpora[1]["biomedical"] == pytest.approx(0.9, abs=0.1)
    elif name == "replay":
        assert corpora[0] == pytest.approx({"biomedical": 0.9, "general": 0.1}, abs=0.05)
    elif name == "rewarm":
        # Steps 13 … 20 are steps 0 … 7 of the phase: 16 is its step 3, half a cosine of 6 steps after 2 of warm-up.
        assert rates[:3] == [rates[0]] * 3
        assert rates[3:] == pytest.approx([0.01 * (1 + np.cos(np.pi * n / 6)) / 2 for n in (1, 5)], rel=1e-5)
    elif name == "stability_gap":
        assert [phase["name"] for phase in phases] == ["subset", "whole"]
        assert 0 < phases[1]["start"] < 20
    else:
        before = json.loads((folder / "eval.json").read_text())["before"]
        assert before == json.loads((folder / "base" / "eval.json").read_text())["after"] | {"step": 0}
        assert phases[0]["denoisers"] == pytest.approx(
            {"s": 0.5, "r3_15": 0.25, "x32_15": 0.125, "x32_50": 0.125}, abs=0.04
        )
        assert rates[-1] == pytest.approx(1e-6 + (1e-4 - 1e-6) * (1 + np.cos(np.pi * 19 / 20)) / 2, rel=1e-4)
