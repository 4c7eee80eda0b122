"""Phases of a run: where they begin, what they go on with, what they refuse, and the recipes in gin/recipes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import assert_equal, skewed_split

from t5x_domain.data.curriculum import Curriculum, Phase, learning_rate, shares_seen
from t5x_domain.data.loader import Batches
from t5x_domain.data.mixtures import mixture_of_denoisers
from t5x_domain.data.packing import DecoderOnly, EncoderDecoder
from t5x_domain.data.prefetch import iterate
from t5x_domain.data.sampling import ExampleRandom
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Component, Corpus, Mixture
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.objectives.language_modeling import CausalLM
from t5x_domain.objectives.prefix import Metadata

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
