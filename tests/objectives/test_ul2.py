"""UL2's mixes: which denoisers at which rates, that every one gives the text back, and that lengths are T5's."""

import math

import gin
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain import cli
from t5x_domain.data.mixtures import mixture_of_denoisers
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Corpus
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.objectives.language_modeling import CausalLM, PrefixLM
from t5x_domain.objectives.prefix import Metadata, Mode
from t5x_domain.objectives.span_corruption import SpanCorruption
from t5x_domain.objectives.ul2 import PRESETS

EOS = 1
VOCABULARY = ByteVocabulary(extra_ids=256)  # Text ids stay below 259, sentinels are 514, 513, …
FIRST_SENTINEL = 514
LAW = Corpus("law", JsonlSource({"train": "law.jsonl"}))
NEWS = Corpus("news", JsonlSource({"train": "news.jsonl"}))


def mix(denoisers, **knobs):
    return mixture_of_denoisers([LAW], denoisers=denoisers, **knobs)


def objectives(preset, **knobs):
    """{name: objective} of a preset."""
    return {component.objective.name: component.objective for component in mix(preset, **knobs).components}


# Every denoiser of every preset, and S with both splits.
DENOISERS = {
    name: objective
    for split in ("suffix", "uniform")
    for preset in PRESETS
    for name, objective in objectives(preset, split=split).items()
}
CORRUPTING = {name: objective for name, objective in DENOISERS.items() if isinstance(objective, SpanCorruption)}


def test_every_denoiser_is_tested():
    assert set(DENOISERS) == {
        *("r3_15", "r8_15", "x3_50", "x8_50", "x64_15", "x64_50", "x32_15", "x32_50", "r1_15"),
        *("s", "s_uniform", "c"),
    }


# --- Which denoisers, at which rates.


def shares(mixture):
    """{name of the objective: rate}."""
    return {component.objective.name: component.rate for component in mixture.components}


@pytest.mark.parametrize("preset", PRESETS)
def test_weights_sum_to_one(preset):
    assert sum(denoiser.weight for denoiser in PRESETS[preset]) == pytest.approx(1, abs=1e-12)
    assert all(denoiser.weight > 0 for denoiser in PRESETS[preset])


def test_the_seven_denoisers_of_the_paper():
    """UL2, section 3.1.1: R with spans of 3 and 8 at 15 %, S over the last quarter, X with short spans at 50 % and with
    spans of 64 at 15 % and 50 %."""
    assert [tuple(denoiser[:3]) for denoiser in PRESETS["ul2_uniform7"]] == [
        ("R", 3, 0.15),
        ("R", 8, 0.15),
        ("S", None, 0.25),
        ("X", 3, 0.5),
        ("X", 8, 0.5),
        ("X", 64, 0.15),
        ("X", 64, 0.5),
    ]
    mixture = mix("ul2_uniform7")
    assert [component.rate for component in mixture.components] == pytest.approx([1 / 7] * 7)
    assert [component.objective for component in mixture.components] == [
        SpanCorruption(0.15, 3, "r3_15"),
        SpanCorruption(0.15, 8, "r8_15"),
        PrefixLM("suffix", 0.25, "s"),
        SpanCorruption(0.5, 3, "x3_50"),
        SpanCorruption(0.5, 8, "x8_50"),
        SpanCorruption(0.15, 64, "x64_15"),
        SpanCorruption(0.5, 64, "x64_50"),
    ]


@pytest.mark.parametrize("family", "RX")
def test_extreme_is_long_or_much(family):
    """The model card of UL2-20B: extreme is a span of 12 tokens or more, or a rate of 30 % or more; and each half of a
    text that is corrupted in spans of 3 is X, single masked tokens (UniLM) are R."""
    found = [d for preset in PRESETS.values() for d in preset if d.family == family]
    assert found
    assert all((d.mean_span_length >= 12 or d.rate >= 0.3) == (family == "X") for d in found)


@pytest.mark.parametrize(
    "preset, expected",
    [
        # 0.4 over two R, 0.4 over four X, 0.2 S
        (
            "ul2_442",
            {"r3_15": 0.2, "r8_15": 0.2, "x3_50": 0.1, "x8_50": 0.1, "x64_15": 0.1, "x64_50": 0.1, "s": 0.2},
        ),
        # UL2R: S 0.5, R 0.25, X 0.25 with spans of 32 at 15 % and at 50 %
        ("ul2r_502525", {"s": 0.5, "r3_15": 0.25, "x32_15": 0.125, "x32_50": 0.125}),
        ("t5", {"r3_15": 1}),
        ("causal_lm", {"c": 1}),
        ("prefix_lm", {"s_uniform": 1}),
        ("t5_and_causal_lm", {"r3_15": 0.5, "c": 0.5}),
        ("unilm", {"c": 1 / 3, "s_uniform": 1 / 3, "r1_15": 1 / 3}),
        ("r_only", {"r3_15": 0.5, "r8_15": 0.5}),
        ("s_only", {"s": 1}),
        ("x_only", {"x3_50": 0.25, "x8_50": 0.25, "x64_15": 0.25, "x64_50": 0.25}),
    ],
)
def test_rates_of_presets(preset, expected):
    assert shares(mix(preset)) == pytest.approx(expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_component_has_the_rate_of_its_corpus_times_the_weight_of_its_denoiser(preset):
    mixture = mixture_of_denoisers([LAW, NEWS], denoisers=preset, rates=[3.0, 0.5], name="both")
    assert mixture.name == "both"
    assert mixture.corpora == [LAW, NEWS]
    names = [component.name for component in mixture.components]
    assert len(set(names)) == len(names) == 2 * len(PRESETS[preset])
    assert all(c.name == f"{c.corpus.name}_{c.objective.name}" for c in mixture.components)
    for corpus, rate in ((LAW, 3.0), (NEWS, 0.5)):
        found = [c.rate for c in mixture.components if c.corpus == corpus]
        assert found == pytest.approx([rate * denoiser.weight for denoiser in PRESETS[preset]])
    equal = mixture_of_denoisers([LAW, NEWS], denoisers=preset)
    assert sum(c.rate for c in equal.components if c.corpus == LAW) == pytest.approx(1)
    assert sum(c.rate for c in equal.components) == pytest.approx(2)


# --- Mode tokens, splits, metadata.


def modes(mixture):
    """{name of the objective: mode}."""
    return {component.objective.name: component.mode for component in mixture.components}


def test_modes_by_family():
    text = modes(mix("ul2_442"))
    names = {"r": "[NLU]", "x": "[NLG]", "s": "[S2S]"}  # of the released checkpoints, by family
    assert text == {name: Mode(names[name[0]], as_text=True) for name in text}
    own_ids = modes(mix("ul2_442", mode_form="id"))
    names = {"r": "[R]", "x": "[X]", "s": "[S]"}  # the paper's
    assert own_ids == {name: Mode(names[name[0]], as_text=False) for name in own_ids}
    assert set(modes(mix("ul2_442", mode_form=None)).values()) == {None}


def test_special_tokens_are_what_a_vocabulary_must_have():
    assert mix("ul2_442", mode_form="id").special_tokens == ["[R]", "[X]", "[S]"]
    assert mix("ul2r_502525", mode_form="id").special_tokens == ["[S]", "[R]", "[X]"]
    assert mix("ul2_442", mode_form="text").special_tokens == []
    assert mix("ul2_442", mode_form=None).special_tokens == []


def test_own_mode_tokens_keep_their_names():
    own = [("R", 3, 0.15, "[MEDICAL]", 0.5), ("C", None, None, "[S2S]", 0.25), ("S", None, 0.25, None, 0.25)]
    assert modes(mix(own, mode_form="id")) == {"r3_15": Mode("[MEDICAL]", False), "c": Mode("[S]", False), "s": None}
    assert modes(mix(own, mode_form="text")) == {"r3_15": Mode("[MEDICAL]"), "c": Mode("[S2S]"), "s": None}
    # One mode is one id, whatever family has it.
    both = [("R", 32, 0.5, "[NLG]", 0.5), ("X", 8, 0.5, "[NLG]", 0.5)]
    assert modes(mix(both, mode_form="id")) == {"r32_50": Mode("[X]", False), "x8_50": Mode("[X]", False)}


def test_a_denoiser_with_and_without_its_mode():
    both = [("R", 3, 0.15, "[NLU]", 0.5), ("R", 3, 0.15, None, 0.5)]
    assert modes(mix(both)) == {"r3_15_nlu": Mode("[NLU]"), "r3_15_bare": None}


@pytest.mark.parametrize("preset", ["t5", "causal_lm", "prefix_lm", "t5_and_causal_lm", "unilm"])
def test_baselines_have_no_modes(preset):
    assert set(modes(mix(preset)).values()) == {None}


def test_splits():
    assert objectives("s_only") == {"s": PrefixLM("suffix", 0.25, "s")}
    assert objectives("s_only", split="uniform") == {"s_uniform": PrefixLM("uniform", 0.25, "s_uniform")}
    # T5's prefix LM, the baseline, cuts anywhere whatever UL2's S does.
    for split in ("suffix", "uniform"):
        assert objectives("prefix_lm", split=split) == {"s_uniform": PrefixLM("uniform", 0.25, "s_uniform")}
    both = [("S", None, 0.5, None, 0.5), ("S", None, 0.25, None, 0.25), ("S", None, 0.125, None, 0.25)]
    assert {name: o.mean_suffix for name, o in objectives(both).items()} == {"s": 0.25, "s_50": 0.5, "s_12p5": 0.125}


def test_names_tell_fractions_apart():
    own = [("R", 2.5, 0.15, None, 0.5), ("R", 25, 0.155, None, 0.5)]
    assert set(objectives(own)) == {"r2p5_15", "r25_15p5"}


def test_metadata_stand_before_every_component():
    metadata = Metadata(rate=0.9)
    mixture = mixture_of_denoisers([LAW, NEWS], metadata=metadata)
    assert [component.metadata for component in mixture.components] == [metadata] * 14
    assert {component.metadata for component in mix("t5").components} == {None}


# --- From gin.

CORPORA_IN_GIN = (
    "JsonlSource.files = {'train': 'law.jsonl'}",
    "Corpus.name = 'law'",
    "Corpus.source = @JsonlSource()",
    "mixture_of_denoisers.corpora = [@Corpus()]",
)


@pytest.fixture
def from_gin():
    def build(*bindings):
        cli.load_gin([], [*CORPORA_IN_GIN, *bindings])
        return cli.build(mixture_of_denoisers)

    yield build
    gin.clear_config()


def test_a_list_in_gin_builds_the_preset(from_gin):
    """ul2_442, written out as docs and gin files write it."""
    written = (
        "[('R', 3, 0.15, '[NLU]', 0.2), ('R', 8, 0.15, '[NLU]', 0.2), ('X', 3, 0.5, '[NLG]', 0.1),"
        " ('X', 8, 0.5, '[NLG]', 0.1), ('X', 64, 0.15, '[NLG]', 0.1), ('X', 64, 0.5, '[NLG]', 0.1),"
        " ('S', None, 0.25, '[S2S]', 0.2)]"
    )
    by_list = from_gin(f"mixture_of_denoisers.denoisers = {written}")
    by_name = from_gin("mixture_of_denoisers.denoisers = 'ul2_442'")
    assert by_list == by_name == mix("ul2_442") == from_gin()
    assert by_list.corpora == [LAW]


def test_every_knob_in_gin(from_gin):
    mixture = from_gin(
        "DENOISERS = 'ul2r_502525'",
        "mixture_of_denoisers.denoisers = %DENOISERS",
        "mixture_of_denoisers.rates = (2.0,)",
        "mixture_of_denoisers.split = 'uniform'",
        "mixture_of_denoisers.mode_form = 'id'",
        "mixture_of_denoisers.metadata = @Metadata()",
        "mixture_of_denoisers.name = 'own'",
        "Metadata.templates = ('Date: {date}. ',)",
    )
    assert mixture == mix(
        "ul2r_502525",
        rates=[2.0],
        split="uniform",
        mode_form="id",
        metadata=Metadata(("Date: {date}. ",)),
        name="own",
    )
    assert from_gin("mixture_of_denoisers.mode_form = None") == mix("ul2_442", mode_form=None)


def test_mistakes_in_gin_are_sentences(from_gin):
    with pytest.raises(UserError, match="mixture_of_denoisers.denoisers: unknown denoiser mix 'ul2'; choose one of"):
        from_gin("mixture_of_denoisers.denoisers = 'ul2'")
    with pytest.raises(UserError, match="mixture_of_denoisers.mode_form='texts' is not one of"):
        from_gin("mixture_of_denoisers.mode_form = 'texts'")


# --- Examples.


def text(num_tokens, seed):
    """Random text ids, a tenth of them 0: they are text wherever they stand. EOS and unknown are left out."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 259, num_tokens)
    return np.where(rng.random(num_tokens) < 0.1, 0, tokens).astype(np.int32)


def corrupted(objective, num_tokens, seed=0):
    return objective(text(num_tokens, seed), np.random.default_rng(seed), VOCABULARY)


def spans_of(targets):
    """Token ids behind each sentinel of the targets, the sentinel first, EOS left out."""
    starts = np.flatnonzero(targets > 258)
    return [span.tolist() for span in np.split(targets[:-1], starts)[1:]] if len(starts) else []


def restore(example):
    """Puts the spans of the targets in the place of their sentinels in the inputs; without sentinels, joins them."""
    inputs, targets = example["inputs"][:-1].tolist(), example["targets"]
    spans = {span[0]: span[1:] for span in spans_of(targets)}
    restored = [t for token in inputs for t in spans.get(token, [token])]
    return restored if spans else restored + targets[:-1].tolist()


@settings(max_examples=25, deadline=None)
@given(st.one_of(st.integers(1, 40), st.sampled_from([128, 512, 1000])), st.integers(0, 2**32))
@pytest.mark.parametrize("name", DENOISERS)
def test_example_restores_the_text(name, num_tokens, seed):
    objective, tokens = DENOISERS[name], text(num_tokens, seed)
    example = objective(tokens, np.random.default_rng(seed), VOCABULARY)
    assert restore(example) == tokens.tolist()
    inputs, targets = example["inputs"], example["targets"]
    assert inputs.dtype == targets.dtype == np.int32
    assert targets[-1] == EOS
    assert not len(inputs) if name == "c" else inputs[-1] == EOS
    # What first fit plans with is what it gets, before any token is read.
    planned = objective.drawn_lengths(num_tokens, np.random.default_rng(seed))
    assert planned == (len(inputs), len(targets))
    longest = objective.lengths(num_tokens)
    assert planned == longest if not objective.random_lengths else all(np.array(planned) <= longest)
    assert sum(planned) == objective.joined_length(num_tokens)
    # Sentinels count down from the top of the vocabulary, the same in both.
    sentinels = FIRST_SENTINEL - np.arange(objective.sentinels_needed(num_tokens))
    np.testing.assert_array_equal(inputs[inputs > 258], sentinels)
    np.testing.assert_array_equal(targets[targets > 258], sentinels)
    # T5's mask ends noisy: the last span closes the targets, and no sentinel stands behind it.
    assert len(targets) < 2 or targets[-2] <= 258


@pytest.mark.parametrize("num_tokens", [100, 512, 568, 1000])
@pytest.mark.parametrize("name", CORRUPTING)
def test_rates_and_mean_span_lengths(name, num_tokens):
    """The m noisy tokens are the rate to the nearest token, and the k spans are m / mean to the nearest span, so the
    mean of the lengths, m / k, is off by at most a factor of 1/2 / k."""
    objective = CORRUPTING[name]
    spans = [len(span) - 1 for span in spans_of(corrupted(objective, num_tokens)["targets"])]
    assert abs(sum(spans) - num_tokens * objective.noise_density) <= 0.5
    if len(spans) > 1:
        assert np.mean(spans) == pytest.approx(objective.mean_span_length, rel=0.5 / len(spans))
    else:
        assert sum(spans) < 1.5 * objective.mean_span_length


@pytest.mark.parametrize("name", CORRUPTING)
def test_spans_are_drawn_evenly(name):
    """m tokens are cut into k spans, all ways alike. A span's length less one is then the number of stars before the
    first of k - 1 bars among m - k stars: mean (m - k) / k, variance (m - k) m (k - 1) / (k^2 (k + 1)). The means of
    the first, a middle and the last span over 400 examples stay within six standard errors, noisy and clean."""
    objective, num_tokens, draws = CORRUPTING[name], 1000, 400
    num_noise, num_spans = objective.noise(num_tokens)
    noisy, clean = [], []
    for seed in range(draws):
        example = corrupted(objective, num_tokens, seed)
        noisy.append([len(span) - 1 for span in spans_of(example["targets"])])
        ends = np.flatnonzero(example["inputs"] > 258)
        clean.append(np.diff(ends, prepend=-1) - 1)
    for lengths, total in ((np.array(noisy), num_noise), (np.array(clean), num_tokens - num_noise)):
        assert lengths.shape == (draws, num_spans)
        variance = (total - num_spans) * total * (num_spans - 1) / (num_spans**2 * (num_spans + 1))
        places = [0, num_spans // 2, num_spans - 1]
        assert (abs(lengths.mean(0)[places] - total / num_spans) <= 6 * math.sqrt(variance / draws) + 1e-9).all()
        if num_spans > 1 and total > num_spans:
            # The sample variance of 400 draws of a near-geometric length has a relative standard error of about
            # sqrt(8 / 400) = 0.14 (its kurtosis is at most 9), so 0.85 is six of them.
            assert lengths[:, 0].var() == pytest.approx(variance, rel=0.85)


@pytest.mark.parametrize("num_tokens", [2, 3, 11, 512])
@pytest.mark.parametrize("name", DENOISERS)
def test_mean_lengths(name, num_tokens):
    """A uniform cut of n tokens leaves 1 … n - 1 in the prefix: mean n / 2, variance ((n - 1)^2 - 1) / 12. The other
    denoisers' lengths depend on n alone."""
    objective, draws = DENOISERS[name], 1000
    rng = np.random.default_rng(0)
    lengths = np.array([objective.drawn_lengths(num_tokens, rng) for _ in range(draws)])
    error = math.sqrt(((num_tokens - 1) ** 2 - 1) / 12 / draws) if name == "s_uniform" else 0.0
    assert (abs(lengths.mean(0) - objective.mean_lengths(num_tokens)) <= 6 * error).all()
    if name == "s_uniform":
        assert objective.mean_lengths(num_tokens) == (num_tokens / 2 + 1, num_tokens / 2 + 1)


def test_suffix_and_uniform_predict_a_quarter_and_a_half():
    assert DENOISERS["s"].mean_lengths(1000) == (751, 251)  # with EOS
    assert DENOISERS["s_uniform"].mean_lengths(1000) == (501, 501)


# --- Lengths.

# Raw tokens, inputs, targets, spans at inputs and targets of 512 and of 1,024. R and X by `random_spans_helper` of the
# t5 package. S: the last quarter of 681 is round(170.25) = 170, so 681 - 170 + 1 = 512 inputs and 171 targets; 682 has
# round(170.5) = 170 (halves to even) and 513 inputs. Of 1,364 it is 341, so 1,024 and 342; 1,365 would have 1,025.
# S_uniform: a prefix or a suffix of n - 1 tokens and EOS must fit. C: n tokens and EOS.
LENGTHS = {
    "r3_15": ((568, 512, 114, 28), (1137, 1024, 229, 57)),
    "r8_15": ((588, 512, 100, 11), (1178, 1024, 200, 22)),
    "s": ((681, 512, 171, 0), (1364, 1024, 342, 0)),
    "x3_50": ((766, 512, 512, 128), (1534, 1024, 1024, 256)),
    "x8_50": ((908, 512, 512, 57), (1818, 1024, 1024, 114)),
    "x64_15": ((600, 512, 92, 1), (1200, 1024, 184, 3)),
    "x64_50": ((1006, 512, 512, 8), (2014, 1024, 1024, 16)),
    "x32_15": ((598, 512, 94, 3), (1197, 1024, 187, 6)),
    "x32_50": ((990, 511, 511, 15), (1984, 1024, 1024, 31)),
    "s_uniform": ((512, 512, 512, 0), (1024, 1024, 1024, 0)),
    "c": ((511, 0, 512, 0), (1023, 0, 1024, 0)),
}


@pytest.mark.parametrize("length, column", [(512, 0), (1024, 1)])
@pytest.mark.parametrize("name", LENGTHS)
def test_published_lengths(name, length, column):
    raw, inputs, targets, spans = LENGTHS[name][column]
    objective, lengths = DENOISERS[name], {"inputs": length, "targets": length}
    assert objective.raw_length(lengths) == raw
    assert objective.lengths(raw) == (inputs, targets)
    assert objective.sentinels_needed(raw) == spans
    objective.check(lengths, VOCABULARY)
    example = corrupted(objective, raw)
    assert len(example["inputs"]) + len(example["targets"]) == objective.joined_length(raw)
    assert np.count_nonzero(example["targets"] > 258) == spans


@pytest.mark.parametrize("name, length, needed", [("x3_50", 512, 128), ("x3_50", 1024, 256), ("x8_50", 1024, 114)])
def test_a_hundred_sentinels_are_too_few(name, length, needed):
    objective, lengths = DENOISERS[name], {"inputs": length, "targets": length}
    message = (
        f"{name}: examples of .* need {needed} sentinels but .* only 100; set ByteVocabulary.extra_ids to {needed}"
    )
    with pytest.raises(UserError, match=message):
        objective.check(lengths, ByteVocabulary(extra_ids=100))
    with pytest.raises(UserError, match=f"need {needed} sentinels"):
        objective.check(lengths, ByteVocabulary(extra_ids=needed - 1))
    objective.check(lengths, ByteVocabulary(extra_ids=needed))
    # Nor does an example take ordinary ids for sentinels if nobody checked.
    with pytest.raises(UserError, match=f"sentinel {needed - 1} is needed"):
        objective(text(objective.raw_length(lengths), 0), np.random.default_rng(0), ByteVocabulary(extra_ids=100))


def test_targets_shorter_than_a_denoiser_needs():
    with pytest.raises(UserError, match="x64_50: the targets length 114 is too short.*set targets to 512 or more"):
        DENOISERS["x64_50"].check({"inputs": 512, "targets": 114}, VOCABULARY)


# --- Mistakes.

A = ("R", 3, 0.15, None, 1.0)


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"denoisers": "ul2_424"}, "denoisers: unknown denoiser mix 'ul2_424'; choose one of ul2_uniform7, ul2_442, "),
        ({"denoisers": [("Q", 3, 0.15, None, 1.0)]}, "denoisers: unknown denoiser 'Q'; the families are R, X, S, C"),
        ({"denoisers": [("r", 3, 0.15, None, 1.0)]}, "denoisers: unknown denoiser 'r'; the families are R, X, S, C"),
        ({"denoisers": [("R", 3, 0.15, 1.0)]}, r"denoisers: \('R', 3, 0.15, 1.0\) must be \(family, mean span length"),
        ({"denoisers": A}, r"denoisers: .* must be \(family, mean span length"),
        ({"denoisers": [A, A]}, "denoisers: the weights 1, 1 sum to 2; make them sum to 1"),
        ({"denoisers": [A[:4] + (0.999,)]}, "denoisers: the weights 0.999 sum to 0.999"),
        ({"denoisers": []}, "denoisers: the weights .* sum to 0"),
        ({"denoisers": [("R", None, 0.15, None, 1.0)]}, "denoisers: .*'R', None, 0.15.* does not fit its family"),
        ({"denoisers": [("X", 3, None, None, 1.0)]}, "denoisers: .*'X', 3, None.* does not fit its family"),
        ({"denoisers": [("S", 3, 0.25, None, 1.0)]}, "denoisers: .*'S', 3, 0.25.* does not fit its family"),
        ({"denoisers": [("C", 3, None, None, 1.0)]}, "denoisers: .*'C', 3, None.* does not fit its family"),
        ({"denoisers": [("C", None, 0.5, None, 1.0)]}, "denoisers: .*'C', None, 0.5.* does not fit its family"),
        ({"denoisers": [("R", 3, 1.5, None, 1.0)]}, "noise_density=1.5 must lie between 0 and 1"),
        ({"denoisers": [("R", 0.5, 0.15, None, 1.0)]}, "mean_span_length=0.5 must be at least 1"),
        ({"denoisers": [("S", None, 1.0, None, 1.0)]}, "mean_suffix=1.0 must lie between 0 and 1"),
        ({"denoisers": [A[:4] + (1.5,), ("C", None, None, None, -0.5)]}, r"the weight of \('C', .* must be above 0"),
        ({"denoisers": [A[:4] + (0.5,)] * 2}, "comes to the same as another entry; leave one out"),
        ({"rates": [1.0, 2.0]}, r"mixture_of_denoisers.rates has 2 numbers for 1 corpora"),
        ({"rates": []}, r"mixture_of_denoisers.rates has 0 numbers for 1 corpora"),
        ({"rates": [0.0]}, "rate of corpus 'law' is 0.0; it must be above 0"),
        ({"mode_form": "txt"}, "mixture_of_denoisers.mode_form='txt' is not one of 'text', 'id', None"),
        ({"split": "prefix"}, "mixture_of_denoisers.split='prefix' is not one of 'suffix', 'uniform'"),
        ({"denoisers": "t5", "split": "prefix"}, "split='prefix' is not one of"),
    ],
)
def test_mistakes(knobs, message):
    with pytest.raises(UserError, match=message):
        mixture_of_denoisers([LAW], **knobs)


def test_no_corpora():
    with pytest.raises(UserError, match="Mixture 'denoisers' has no components"):
        mixture_of_denoisers([])


def test_causal_lm_is_the_causal_objective():
    assert objectives("causal_lm") == {"c": CausalLM(name="c")}
