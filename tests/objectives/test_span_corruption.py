import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.objectives.span_corruption import SpanCorruption

VOCABULARY = ByteVocabulary(extra_ids=300)  # Text ids stay below 259, sentinels are 558, 557, …
FIRST_SENTINEL = 558


def corrupt(objective, num_tokens, seed=0):
    """Tokens 2, 3, … so that the place of a token can be read from the example."""
    tokens = (2 + np.arange(num_tokens) % 250).astype(np.int32)
    return tokens, objective(tokens, np.random.default_rng(seed), VOCABULARY)


def spans_of(targets):
    """Token ids behind each sentinel of the targets, EOS left out."""
    starts = np.flatnonzero(targets > 258)
    return [span.tolist() for span in np.split(targets[:-1], starts)[1:]] if len(starts) else []


def restore(example):
    """Puts the spans of the targets in the place of their sentinels in the inputs."""
    spans = {span[0]: span[1:] for span in spans_of(example["targets"])}
    return [t for token in example["inputs"][:-1].tolist() for t in spans.get(token, [token])]


# (mean span, density) -> {inputs length: (raw tokens, inputs, targets, spans)}. Computed with `random_spans_helper` of
# the t5 package; 568 -> 512/114 is the published T5 pretraining case, the rest are UL2's and UL2R's denoisers.
LENGTHS = {
    (3, 0.15): {512: (568, 512, 114, 28), 1024: (1137, 1024, 229, 57)},
    (8, 0.15): {512: (588, 512, 100, 11), 1024: (1178, 1024, 200, 22)},
    (3, 0.50): {512: (766, 512, 512, 128), 1024: (1534, 1024, 1024, 256)},
    (8, 0.50): {512: (908, 512, 512, 57), 1024: (1818, 1024, 1024, 114)},
    (64, 0.15): {512: (600, 512, 92, 1), 1024: (1200, 1024, 184, 3)},
    (64, 0.50): {512: (1006, 512, 512, 8), 1024: (2014, 1024, 1024, 16)},
    (32, 0.15): {512: (598, 512, 94, 3), 1024: (1197, 1024, 187, 6)},
    (32, 0.50): {512: (990, 511, 511, 15), 1024: (1984, 1024, 1024, 31)},
}


@pytest.mark.parametrize(
    "knobs, length, expected", [(knobs, n, row[n]) for knobs, row in LENGTHS.items() for n in (512, 1024)]
)
def test_published_lengths(knobs, length, expected):
    mean_span_length, noise_density = knobs
    objective = SpanCorruption(noise_density, mean_span_length)
    raw, inputs, targets, spans = expected
    assert objective.raw_length({"inputs": length, "targets": length}) == raw
    assert objective.lengths(raw) == (inputs, targets)
    assert objective.sentinels_needed(raw) == spans
    _, example = corrupt(objective, raw)
    assert (len(example["inputs"]), len(example["targets"])) == (inputs, targets)
    assert np.count_nonzero(example["targets"] > 258) == spans


OBJECTIVES = st.builds(
    SpanCorruption,
    noise_density=st.sampled_from([0.05, 0.15, 0.3, 0.5, 0.85]),
    mean_span_length=st.sampled_from([1.0, 2.5, 3.0, 8.0, 64.0]),
)


@settings(max_examples=150, deadline=None)
@given(OBJECTIVES, st.integers(1, 290), st.integers(0, 2**32))
def test_example_restores_the_text(objective, num_tokens, seed):
    tokens, example = corrupt(objective, num_tokens, seed)
    inputs, targets = example["inputs"], example["targets"]
    assert inputs.dtype == targets.dtype == np.int32
    assert (len(inputs), len(targets)) == objective.lengths(num_tokens)
    assert inputs[-1] == targets[-1] == VOCABULARY.eos_id
    assert restore(example) == tokens.tolist()
    # Sentinels count down from the top in both, each once, and the k-th span of the text has the k-th sentinel.
    sentinels = FIRST_SENTINEL - np.arange(objective.sentinels_needed(num_tokens))
    np.testing.assert_array_equal(inputs[inputs > 258], sentinels)
    np.testing.assert_array_equal(targets[targets > 258], sentinels)


@settings(max_examples=100, deadline=None)
@given(OBJECTIVES, st.integers(2, 290), st.integers(0, 2**32))
def test_begins_clean_ends_noisy_and_keeps_spans_apart(objective, num_tokens, seed):
    tokens, example = corrupt(objective, num_tokens, seed)
    assert example["inputs"][0] == tokens[0]
    assert example["inputs"][-2] > 258, "the text ends noisy, so a sentinel closes the inputs"
    assert example["targets"][-2] == tokens[-1], "and no sentinel closes the targets"
    assert not np.any((example["inputs"][:-1] > 258) & (example["inputs"][1:] > 258))
    assert all(len(span) > 1 for span in spans_of(example["targets"]))


@given(OBJECTIVES)
@settings(max_examples=20, deadline=None)
def test_lengths_never_shrink(objective):
    """First fit relies on it to find the longest piece that fits."""
    lengths = np.array([objective.lengths(n) for n in range(1, 400)])
    assert (np.diff(lengths, axis=0) >= 0).all()


def test_token_zero_is_text():
    tokens = np.zeros(100, np.int32)
    example = SpanCorruption()(tokens, np.random.default_rng(0), VOCABULARY)
    assert restore(example) == [0] * 100


def test_same_generator_same_example():
    first, second, other = (corrupt(SpanCorruption(), 568, seed)[1] for seed in (7, 7, 8))
    np.testing.assert_array_equal(first["inputs"], second["inputs"])
    assert not np.array_equal(first["inputs"], other["inputs"])


def test_every_cut_into_spans_is_equally_likely():
    """12 noisy tokens of 80 in 4 spans: a span of a uniformly random composition of m into k parts has
    P(length = 1) = (k - 1) / (m - 1) = 3/11. Over 4,000 examples x 4 spans, the standard error of a binomial share is
    at most sqrt(3/11 * 8/11 / 4000) = 0.007 (spans of one example are negatively correlated, which only helps)."""
    lengths = [
        len(span) - 1 for seed in range(4000) for span in spans_of(corrupt(SpanCorruption(), 80, seed)[1]["targets"])
    ]
    assert np.mean(lengths) == 3.0
    assert abs(np.mean(np.array(lengths) == 1) - 3 / 11) < 4 * 0.007


def test_every_place_is_noisy_as_often_as_the_mask_implies():
    """With two spans over n tokens, the first noisy span begins after a clean one whose length is uniform on
    1 … clean - 1. n = 20, density .3: 6 noisy and 14 clean tokens, so P(token 1 is noisy) = P(length 1) = 1/13."""
    noisy = [corrupt(SpanCorruption(0.3, 3.0), 20, seed)[1]["inputs"][1] > 258 for seed in range(4000)]
    assert abs(np.mean(noisy) - 1 / 13) < 4 * math.sqrt(1 / 13 * 12 / 13 / 4000)


def test_too_few_sentinels():
    with pytest.raises(UserError, match=r"need 128 sentinels .* only 100; set ByteVocabulary.extra_ids to 128"):
        SpanCorruption(0.5, 3.0).check({"inputs": 512, "targets": 512}, ByteVocabulary(extra_ids=100))
    SpanCorruption(0.5, 3.0).check({"inputs": 512, "targets": 512}, ByteVocabulary(extra_ids=128))


def test_targets_too_short():
    with pytest.raises(UserError, match="targets length 113 is too short.*targets of 114; set targets to 114"):
        SpanCorruption().check({"inputs": 512, "targets": 113}, VOCABULARY)
    SpanCorruption().check({"inputs": 512, "targets": 114}, VOCABULARY)


@pytest.mark.parametrize("knobs", [{"noise_density": 0.0}, {"noise_density": 1.0}, {"mean_span_length": 0.5}])
def test_bad_knobs(knobs):
    with pytest.raises(UserError, match=f"SpanCorruption.{next(iter(knobs))}"):
        SpanCorruption(**knobs)


def test_inputs_too_short():
    with pytest.raises(UserError, match="inputs length 3 is too short"):
        SpanCorruption().raw_length({"inputs": 3, "targets": 10})
