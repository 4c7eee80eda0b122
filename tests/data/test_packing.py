"""Layouts, against the examples in SeqIO's documentation; test_seqio_parity.py compares with SeqIO itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.data.packing import DecoderOnly, EncoderDecoder, EncoderOnly, Example
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.objectives.language_modeling import CausalLM, PrefixLM
from t5x_domain.objectives.masked_lm import MaskedLM
from t5x_domain.objectives.span_corruption import SpanCorruption


def example(inputs, targets, component_id=0, prefix=(), chosen=()):
    return Example(
        *(np.array(tokens, np.int32) for tokens in (inputs, targets)),
        component_id,
        np.array(prefix, np.int32),
        np.array(chosen, bool),
    )


# The two examples in the docstrings of seqio.EncDecFeatureConverter and seqio.PrefixLMFeatureConverter.
PAIR = [example([7, 8, 5, 1], [3, 9, 1], component_id=2), example([8, 4, 9, 3, 1], [4, 1], component_id=5)]


def assert_features(batch, expected):
    assert {name: feature[0].tolist() for name, feature in batch.items()} == expected
    for name, feature in batch.items():
        assert feature.dtype == (np.float32 if name.endswith("weights") else np.int32)


def test_encoder_decoder_as_seqio_documents_it():
    assert_features(
        EncoderDecoder().batch([PAIR], {"inputs": 10, "targets": 7}),
        {
            "encoder_input_tokens": [7, 8, 5, 1, 8, 4, 9, 3, 1, 0],
            "encoder_segment_ids": [1, 1, 1, 1, 2, 2, 2, 2, 2, 0],
            "encoder_positions": [0, 1, 2, 3, 0, 1, 2, 3, 4, 0],
            "decoder_target_tokens": [3, 9, 1, 4, 1, 0, 0],
            "decoder_input_tokens": [0, 3, 9, 0, 4, 0, 0],
            "decoder_loss_weights": [1, 1, 1, 1, 1, 0, 0],
            "decoder_segment_ids": [1, 1, 1, 2, 2, 0, 0],
            "decoder_positions": [0, 1, 2, 0, 1, 0, 0],
            "component_ids": [2, 2, 2, 5, 5, 0, 0],
        },
    )


def test_decoder_only_as_seqio_documents_it():
    assert_features(
        DecoderOnly().batch([PAIR], {"inputs": 7, "targets": 8}),
        {
            "decoder_target_tokens": [7, 8, 5, 1, 3, 9, 1, 8, 4, 9, 3, 1, 4, 1, 0],
            "decoder_input_tokens": [0, 7, 8, 5, 1, 3, 9, 0, 8, 4, 9, 3, 1, 4, 0],
            "decoder_loss_weights": [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0],
            "decoder_positions": [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 0],
            "decoder_segment_ids": [1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 0],
            "decoder_prefix": [1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0],
            "component_ids": [2, 2, 2, 2, 2, 2, 2, 5, 5, 5, 5, 5, 5, 5, 0],
        },
    )


def test_causal_examples_have_loss_everywhere():
    batch = DecoderOnly().batch([[example([], [5, 6, 1])]], {"inputs": 0, "targets": 4})
    assert batch["decoder_loss_weights"].tolist() == [[1, 1, 1, 0]]
    assert batch["decoder_prefix"].tolist() == [[1, 0, 0, 0]], (
        "only the start token, which causal attention sees anyway"
    )


def test_token_zero_keeps_segment_and_loss():
    """SeqIO takes every 0 for padding; a text may hold it."""
    batch = EncoderDecoder().batch([[example([0, 5, 1], [7, 0, 1])]], {"inputs": 4, "targets": 4})
    assert batch["encoder_segment_ids"].tolist() == [[1, 1, 1, 0]]
    assert batch["decoder_loss_weights"].tolist() == [[1, 1, 1, 0]]
    assert batch["decoder_input_tokens"].tolist() == [[0, 7, 0, 0]]


# The same two with metadata and a mode token before them, and a causal example with metadata between.
WITH_PREFIX = [
    example([7, 8, 5, 1], [3, 9, 1], component_id=2, prefix=[20, 21, 22]),
    example([], [6, 6, 1], component_id=3, prefix=[23, 24]),
    example([8, 4, 9, 3, 1], [4, 1], component_id=5, prefix=[25]),
]


def test_prefix_in_the_encoder():
    """It stands before the inputs, in their segment and their positions; the decoder does not see it."""
    lengths = {"inputs": 16, "targets": 10}
    assert_features(
        EncoderDecoder().batch([WITH_PREFIX], lengths),
        {
            "encoder_input_tokens": [20, 21, 22, 7, 8, 5, 1, 23, 24, 25, 8, 4, 9, 3, 1, 0],
            "encoder_segment_ids": [1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 0],
            "encoder_positions": [0, 1, 2, 3, 4, 5, 6, 0, 1, 0, 1, 2, 3, 4, 5, 0],
            "decoder_target_tokens": [3, 9, 1, 6, 6, 1, 4, 1, 0, 0],
            "decoder_input_tokens": [0, 3, 9, 0, 6, 6, 0, 4, 0, 0],
            "decoder_loss_weights": [1, 1, 1, 1, 1, 1, 1, 1, 0, 0],
            "decoder_segment_ids": [1, 1, 1, 2, 2, 2, 3, 3, 0, 0],
            "decoder_positions": [0, 1, 2, 0, 1, 2, 0, 1, 0, 0],
            "component_ids": [2, 2, 2, 3, 3, 3, 5, 5, 0, 0],
        },
    )


def test_prefix_in_a_decoder():
    """It is not learnt (weights 0). Every position may see the start token, which the shift puts in the place of the
    first token, and prefix and inputs: 1 + 3 + 4 of the first example. A causal example, which has no inputs, keeps its
    prefix causal (MeCo, section 2): only the start token is seen by all."""
    assert_features(
        DecoderOnly().batch([WITH_PREFIX], {"inputs": 14, "targets": 10}),
        {
            "decoder_target_tokens": [
                *(20, 21, 22, 7, 8, 5, 1, 3, 9, 1),
                *(23, 24, 6, 6, 1),
                *(25, 8, 4, 9, 3, 1, 4, 1),
                0,
            ],
            "decoder_input_tokens": [
                *(0, 20, 21, 22, 7, 8, 5, 1, 3, 9),
                *(0, 23, 24, 6, 6),
                *(0, 25, 8, 4, 9, 3, 1, 4),
                0,
            ],
            "decoder_loss_weights": [0] * 7 + [1] * 3 + [0] * 2 + [1] * 3 + [0] * 6 + [1] * 2 + [0],
            "decoder_positions": [*range(10), *range(5), *range(8), 0],
            "decoder_segment_ids": [1] * 10 + [2] * 5 + [3] * 8 + [0],
            "decoder_prefix": [1] * 8 + [0] * 2 + [1] + [0] * 4 + [1] * 7 + [0] + [0],
            "component_ids": [2] * 10 + [3] * 5 + [5] * 8 + [0],
        },
    )


def test_masked_tokens_are_learnt_where_they_stand():
    """A token that is masked (99), one that was replaced (5 for 7) and one that was kept (8) count for the loss;
    prefix, EOS and padding do not. `encoder_token_weights` leave out prefix and padding only."""
    rows = [
        example([99, 5, 8, 9, 1], [6, 7, 8, 9, 1], 2, prefix=[20, 21], chosen=[1, 1, 1, 0, 0]),
        example([4, 99, 1], [4, 3, 1], 5, chosen=[0, 1, 0]),
    ]
    assert_features(
        EncoderOnly().batch([rows], {"inputs": 12}),
        {
            "encoder_input_tokens": [20, 21, 99, 5, 8, 9, 1, 4, 99, 1, 0, 0],
            "encoder_segment_ids": [1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0],
            "encoder_positions": [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 0],
            "encoder_target_tokens": [20, 21, 6, 7, 8, 9, 1, 4, 3, 1, 0, 0],
            "encoder_loss_weights": [0, 0, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0],
            "encoder_token_weights": [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0],
            "component_ids": [2, 2, 2, 2, 2, 2, 2, 5, 5, 5, 0, 0],
        },
    )
    empty = EncoderOnly().batch([[], rows], {"inputs": 12})
    assert all(not feature[0].any() and feature[1].any() for feature in empty.values())


def test_without_prefix_nothing_changes():
    plain = [[Example(e.inputs, e.targets, e.component_id) for e in PAIR]]
    empty = [[e._replace(prefix=np.empty(0, np.int32)) for e in PAIR]]
    for layout in (EncoderDecoder(), DecoderOnly()):
        first, second = (layout.batch(rows, {"inputs": 10, "targets": 7}) for rows in (plain, empty))
        for name in first:
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_causal_examples_leave_the_encoder_empty():
    """Nothing to attend to: no segment of theirs is in the encoder."""
    batch = EncoderDecoder().batch([[example([], [5, 6, 1]), *PAIR[1:]]], {"inputs": 6, "targets": 6})
    assert batch["encoder_segment_ids"].tolist() == [[2, 2, 2, 2, 2, 0]]
    assert batch["encoder_input_tokens"].tolist() == [[8, 4, 9, 3, 1, 0]]
    assert batch["decoder_segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0]]
    assert batch["decoder_loss_weights"].tolist() == [[1, 1, 1, 1, 1, 0]]


@pytest.mark.parametrize("layout", [EncoderDecoder(), DecoderOnly()])
def test_a_prefix_takes_the_room_that_the_layout_says(layout):
    """`cost` leaves the prefix out; `prefix_cost` is the room that each of its tokens takes."""
    objective, rng = SpanCorruption(), np.random.default_rng(0)
    features = objective(np.arange(3, 53, dtype=np.int32), rng, ByteVocabulary())
    prefix = [20, 21, 22, 23, 24]
    batch = layout.batch(
        [[example(features["inputs"], features["targets"], prefix=prefix)]], {"inputs": 80, "targets": 80}
    )
    taken = [np.count_nonzero(batch.get(f"{side}_segment_ids", 0)) for side in ("encoder", "decoder")]
    cost = np.array(layout.cost(objective, 50)) + 5 * np.array(layout.prefix_cost)
    assert taken == cost.tolist()


def test_room_of_random_lengths():
    """A uniform cut of 11 tokens: half on each side on average, at most 10 and EOS; joined, always 11 and two EOS."""
    uniform, suffix = PrefixLM(), PrefixLM(split="suffix")
    assert EncoderDecoder().random_cost(uniform) and not DecoderOnly().random_cost(uniform)
    assert not EncoderDecoder().random_cost(suffix) and not EncoderDecoder().random_cost(CausalLM())
    assert EncoderDecoder().cost(uniform, 11) == (11, 11)
    assert EncoderDecoder().mean_cost(uniform, 11) == (6.5, 6.5)
    assert DecoderOnly().cost(uniform, 11) == DecoderOnly().mean_cost(uniform, 11) == (0, 13)
    assert EncoderDecoder().mean_cost(suffix, 12) == EncoderDecoder().cost(suffix, 12) == (10, 4)
    assert EncoderDecoder().cost(CausalLM(), 11) == (0, 12)


def test_row_without_examples_is_zeros():
    batch = EncoderDecoder().batch([[], PAIR], {"inputs": 10, "targets": 7})
    assert all(not feature[0].any() and feature[1].any() for feature in batch.values())


TOKENS = st.lists(st.integers(2, 99), min_size=1, max_size=6).map(lambda tokens: [*tokens, 1])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.one_of(st.just([]), TOKENS), TOKENS, st.lists(st.integers(0, 99), max_size=4)), max_size=6),
    st.sampled_from([EncoderDecoder(), DecoderOnly()]),
)
def test_segments_give_the_examples_back(triples, layout):
    lengths = {"inputs": 66, "targets": 42}
    rows = [[example(inputs, targets, 7, prefix) for inputs, targets, prefix in triples]]
    batch = {name: feature[0] for name, feature in layout.batch(rows, lengths).items()}
    for segment, (inputs, targets, prefix) in enumerate(triples, start=1):
        own = batch["decoder_segment_ids"] == segment
        decoded = batch["decoder_target_tokens"][own].tolist()
        if isinstance(layout, EncoderDecoder):
            encoded = batch["encoder_input_tokens"][batch["encoder_segment_ids"] == segment].tolist()
            assert (encoded, decoded) == (prefix + inputs, targets)
        else:
            assert decoded == prefix + inputs + targets
            seen_by_all = 1 + (len(prefix + inputs) if inputs else 0)
            assert batch["decoder_prefix"][own].tolist() == [1] * seen_by_all + [0] * (len(decoded) - seen_by_all)
        # Loss on the targets and on nothing else; a segment begins at position 0 and behind the start token.
        assert batch["decoder_target_tokens"][own & (batch["decoder_loss_weights"] == 1)].tolist() == targets
        assert batch["decoder_positions"][own].tolist() == list(range(len(decoded)))
        assert batch["decoder_input_tokens"][own].tolist() == [0, *decoded[:-1]]
        assert set(batch["component_ids"][own]) == {7}
    assert batch["decoder_loss_weights"].sum() == sum(len(targets) for _, targets, _ in triples)


MASKED = st.lists(st.tuples(st.integers(2, 99), st.integers(2, 99), st.booleans()), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(MASKED, st.lists(st.integers(0, 99), max_size=4)), max_size=6))
def test_segments_of_an_encoder_give_the_examples_back(pairs):
    examples = [
        example(
            *([*column, 1] for column in list(zip(*tokens, strict=True))[:2]), 7, prefix, [t[2] for t in tokens] + [0]
        )
        for tokens, prefix in pairs
    ]
    batch = {name: feature[0] for name, feature in EncoderOnly().batch([examples], {"inputs": 66}).items()}
    for segment, one in enumerate(examples, start=1):
        own = batch["encoder_segment_ids"] == segment
        before, no = one.prefix.tolist(), [0] * len(one.prefix)
        assert batch["encoder_input_tokens"][own].tolist() == before + one.inputs.tolist()
        assert batch["encoder_target_tokens"][own].tolist() == before + one.targets.tolist()
        assert batch["encoder_loss_weights"][own].tolist() == no + one.chosen.tolist()
        assert batch["encoder_token_weights"][own].tolist() == no + [1] * len(one.inputs)
        assert batch["encoder_positions"][own].tolist() == list(range(len(before) + len(one.inputs)))
        assert set(batch["component_ids"][own]) == {7}
    padding = batch["encoder_segment_ids"] == 0
    assert not any(feature[padding].any() for feature in batch.values())


def test_raw_lengths_fill_the_rows():
    lengths = {"inputs": 512, "targets": 114}
    assert EncoderDecoder().raw_length(SpanCorruption(), lengths) == 568  # as T5
    # 568 raw tokens come to 512 + 114 = 626 joined, one more would open no span: 483 + 85 tokens, 28 + 28 + 2 = 626.
    assert DecoderOnly().raw_length(SpanCorruption(), lengths) == 568
    assert DecoderOnly().raw_length(PrefixLM(), lengths) == 624  # two EOS, wherever the cut falls
    assert DecoderOnly().raw_length(CausalLM(), lengths) == 625  # one EOS
    assert EncoderOnly().raw_length(MaskedLM(), {"inputs": 512}) == 511  # one EOS


def test_checks():
    vocabulary = ByteVocabulary(extra_ids=100)
    EncoderDecoder().check(CausalLM(), {"inputs": 8, "targets": 8}, vocabulary)
    with pytest.raises(UserError, match="targets length 100 is too short"):
        EncoderDecoder().check(SpanCorruption(), {"inputs": 512, "targets": 100}, vocabulary)
    with pytest.raises(UserError, match="need .* sentinels"):
        DecoderOnly().check(SpanCorruption(0.5, 3.0), {"inputs": 512, "targets": 512}, vocabulary)
    with pytest.raises(UserError, match="too short for two tokens"):
        DecoderOnly().check(PrefixLM(), {"inputs": 1, "targets": 2}, vocabulary)
    EncoderOnly().check(MaskedLM(), {"inputs": 3}, vocabulary)
    with pytest.raises(UserError, match="mlm: the inputs length 2 is too short"):
        EncoderOnly().check(MaskedLM(), {"inputs": 2}, vocabulary)
    with pytest.raises(UserError, match="raise ByteVocabulary.extra_ids"):
        EncoderOnly().check(MaskedLM(), {"inputs": 8}, ByteVocabulary(extra_ids=0))
