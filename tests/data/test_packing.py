"""Layouts, against the examples in SeqIO's documentation; test_seqio_parity.py compares with SeqIO itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_domain.data.packing import DecoderOnly, EncoderDecoder, Example
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.objectives.language_modeling import CausalLM, PrefixLM
from t5x_domain.objectives.span_corruption import SpanCorruption


def example(inputs, targets, corpus_id=0):
    return Example(np.array(inputs, np.int32), np.array(targets, np.int32), corpus_id)


# The two examples in the docstrings of seqio.EncDecFeatureConverter and seqio.PrefixLMFeatureConverter.
PAIR = [example([7, 8, 5, 1], [3, 9, 1], corpus_id=2), example([8, 4, 9, 3, 1], [4, 1], corpus_id=5)]


def assert_features(batch, expected):
    assert {name: feature[0].tolist() for name, feature in batch.items()} == expected
    for name, feature in batch.items():
        assert feature.dtype == (np.float32 if name == "decoder_loss_weights" else np.int32)


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
            "corpus_ids": [2, 2, 2, 5, 5, 0, 0],
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
            "corpus_ids": [2, 2, 2, 2, 2, 2, 2, 5, 5, 5, 5, 5, 5, 5, 0],
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


def test_row_without_examples_is_zeros():
    batch = EncoderDecoder().batch([[], PAIR], {"inputs": 10, "targets": 7})
    assert all(not feature[0].any() and feature[1].any() for feature in batch.values())


TOKENS = st.lists(st.integers(2, 99), min_size=1, max_size=6).map(lambda tokens: [*tokens, 1])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=6), st.sampled_from([EncoderDecoder(), DecoderOnly()]))
def test_segments_give_the_examples_back(pairs, layout):
    lengths = {"inputs": 42, "targets": 42}
    batch = layout.batch([[example(*pair) for pair in pairs]], lengths)
    for segment, (inputs, targets) in enumerate(pairs, start=1):
        decoded = batch["decoder_target_tokens"][batch["decoder_segment_ids"] == segment].tolist()
        if isinstance(layout, EncoderDecoder):
            decoded = batch["encoder_input_tokens"][batch["encoder_segment_ids"] == segment].tolist() + decoded
        assert decoded == inputs + targets
    weights = batch["decoder_loss_weights"]
    assert weights.sum() == sum(len(targets) for _, targets in pairs)


def test_raw_lengths_fill_the_rows():
    lengths = {"inputs": 512, "targets": 114}
    assert EncoderDecoder().raw_length(SpanCorruption(), lengths) == 568  # as T5
    # 568 raw tokens come to 512 + 114 = 626 joined, one more would open no span: 483 + 85 tokens, 28 + 28 + 2 = 626.
    assert DecoderOnly().raw_length(SpanCorruption(), lengths) == 568
    assert DecoderOnly().raw_length(PrefixLM(), lengths) == 624  # two EOS, wherever the cut falls
    assert DecoderOnly().raw_length(CausalLM(), lengths) == 625  # one EOS


def test_checks():
    vocabulary = ByteVocabulary(extra_ids=100)
    with pytest.raises(UserError, match="causal_lm leaves an encoder without inputs; use the DecoderOnly layout"):
        EncoderDecoder().check(CausalLM(), {"inputs": 8, "targets": 8}, vocabulary)
    with pytest.raises(UserError, match="targets length 100 is too short"):
        EncoderDecoder().check(SpanCorruption(), {"inputs": 512, "targets": 100}, vocabulary)
    with pytest.raises(UserError, match="need .* sentinels"):
        DecoderOnly().check(SpanCorruption(0.5, 3.0), {"inputs": 512, "targets": 512}, vocabulary)
    with pytest.raises(UserError, match="too short for two tokens"):
        DecoderOnly().check(PrefixLM(), {"inputs": 1, "targets": 2}, vocabulary)
