import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.objectives.language_modeling import CausalLM, PrefixLM

VOCABULARY = ByteVocabulary(extra_ids=1)
EOS = 1


def example(objective, num_tokens, seed=0):
    tokens = np.arange(2, num_tokens + 2, dtype=np.int32)
    return tokens, objective(tokens, np.random.default_rng(seed), VOCABULARY)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([PrefixLM(), PrefixLM(split="suffix"), PrefixLM(split="suffix", mean_suffix=0.6), CausalLM()]),
    st.integers(1, 200),
    st.integers(0, 2**32),
)
def test_inputs_and_targets_are_the_text(objective, num_tokens, seed):
    tokens, features = example(objective, num_tokens, seed)
    assert all(feature.dtype == np.int32 for feature in features.values())
    assert features["targets"][-1] == EOS
    prefix = features["inputs"][:-1]
    np.testing.assert_array_equal(np.concatenate([prefix, features["targets"][:-1]]), tokens)
    longest = objective.lengths(num_tokens)
    assert len(features["inputs"]) <= longest[0] and len(features["targets"]) <= longest[1]
    assert len(features["inputs"]) + len(features["targets"]) == objective.joined_length(num_tokens)
    drawn = objective.drawn_lengths(num_tokens, np.random.default_rng(seed))
    assert drawn == (len(features["inputs"]), len(features["targets"])), "what first fit plans with"
    if not objective.random_lengths:
        assert drawn == longest == objective.mean_lengths(num_tokens)


def test_uniform_split():
    """The prefix has 1 … n - 1 tokens, each as likely: n = 11 gives 10 lengths, 400 expected in 4,000 draws, and a
    standard deviation of sqrt(4000 * .1 * .9) = 19."""
    lengths = [len(example(PrefixLM(), 11, seed)[1]["inputs"]) - 1 for seed in range(4000)]
    counts = np.bincount(lengths, minlength=11)
    assert counts[0] == 0 and len(counts) == 11
    assert (abs(counts[1:] - 400) < 4.5 * 19).all()


@pytest.mark.parametrize("num_tokens", [2, 3, 11, 500])
def test_mean_lengths_of_a_uniform_split(num_tokens):
    """The cut is uniform on 1 … n - 1: mean n / 2, variance ((n - 1)^2 - 1) / 12; six standard errors of 4,000 draws.
    Both sides have an EOS."""
    rng = np.random.default_rng(0)
    drawn = np.array([PrefixLM().drawn_lengths(num_tokens, rng) for _ in range(4000)])
    assert PrefixLM().random_lengths
    assert PrefixLM().mean_lengths(num_tokens) == (num_tokens / 2 + 1, num_tokens / 2 + 1)
    error = (((num_tokens - 1) ** 2 - 1) / 12 / 4000) ** 0.5
    assert (abs(drawn.mean(0) - (num_tokens / 2 + 1)) <= 6 * error).all()
    assert (drawn.sum(1) == num_tokens + 2).all()
    assert drawn.max(0).tolist() == list(PrefixLM().lengths(num_tokens)) == [num_tokens, num_tokens]
    assert drawn.min() == 2


def test_single_token():
    """One token cannot be cut: it is predicted from nothing."""
    for objective in (PrefixLM(), PrefixLM(split="suffix")):
        _, features = example(objective, 1)
        assert features["inputs"].tolist() == [EOS]
        assert features["targets"].tolist() == [2, EOS]
        assert objective.lengths(1) == objective.drawn_lengths(1, np.random.default_rng(0)) == (1, 2)


def test_token_zero_is_text():
    for objective in (PrefixLM(), PrefixLM(split="suffix"), CausalLM()):
        features = objective(np.zeros(20, np.int32), np.random.default_rng(0), VOCABULARY)
        joined = np.concatenate([features["inputs"][:-1], features["targets"][:-1]])
        assert joined.tolist() == [0] * 20


def test_suffix_is_the_last_quarter():
    _, features = example(PrefixLM(split="suffix"), 100)
    assert (len(features["inputs"]), len(features["targets"])) == (76, 26)  # with EOS


def test_causal_has_no_inputs():
    _, features = example(CausalLM(), 5)
    assert features["inputs"].size == 0
    assert features["targets"].tolist() == [2, 3, 4, 5, 6, EOS]


def test_raw_lengths():
    # Uniform: a prefix of n - 1 tokens and EOS must fit into the inputs, and the same for the suffix.
    assert PrefixLM().raw_length({"inputs": 512, "targets": 256}) == 256
    # Last quarter of 678: round(169.5) = 170, inputs 678 - 170 + 1 = 509, targets 171; of 682: 170 and 513 > 512.
    suffix = PrefixLM(split="suffix")
    assert suffix.raw_length({"inputs": 512, "targets": 512}) == 681
    assert suffix.lengths(681) == (512, 171)
    assert suffix.raw_length({"inputs": 512, "targets": 100}) == 397  # round(398 / 4) = round(99.5) = 100 > 99
    assert CausalLM().raw_length({"inputs": 0, "targets": 1024}) == 1023


def test_errors():
    with pytest.raises(UserError, match="PrefixLM.split='middle' is not one of uniform, suffix"):
        PrefixLM(split="middle")
    with pytest.raises(UserError, match="PrefixLM.mean_suffix=1.5"):
        PrefixLM(mean_suffix=1.5)
    with pytest.raises(UserError, match="2 or longer"):
        PrefixLM().raw_length({"inputs": 1, "targets": 10})
    with pytest.raises(UserError, match="targets length 1 is too short"):
        CausalLM().raw_length({"inputs": 0, "targets": 1})
