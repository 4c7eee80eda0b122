"""Which tokens may be drawn, how often they are, and which settings contradict each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from t5x_domain.errors import UserError
from t5x_domain.inference.decoding import Decoding, decode_rows, truncated

LOGITS = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))


def kept(**how):
    return np.flatnonzero(np.isfinite(np.asarray(truncated(LOGITS, Decoding(temperature=1.0, **how)))[0])).tolist()


def test_top_k_keeps_the_likeliest():
    assert kept(top_k=2) == [0, 1]
    assert kept(top_k=9) == [0, 1, 2, 3]


def test_top_p_keeps_the_fewest_that_reach_it():
    assert kept(top_p=0.35) == [0]
    assert kept(top_p=0.5) == [0, 1]  # 0.4 is less, 0.7 reaches it
    assert kept(top_p=0.75) == [0, 1, 2]
    assert kept(top_p=1.0) == [0, 1, 2, 3]


def test_min_p_is_relative_to_the_likeliest():
    assert kept(min_p=0.6) == [0, 1]  # 0.6 of 0.4 is 0.24
    assert kept(min_p=1.0) == [0]


def test_temperature_comes_before_truncation():
    """At temperature 0.5 probabilities are squared: 0.16, 0.09, 0.04, 0.01 of 0.30, so the first is 0.53 of them."""
    hot = truncated(LOGITS, Decoding(temperature=0.5, top_p=0.5))
    assert np.isfinite(np.asarray(hot)).sum() == 1


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature):
    rows = 4000
    decoding = Decoding(max_tokens=1, temperature=temperature, num_outputs=1)
    streams = jax.random.split(jax.random.key(5), rows)
    logits = jnp.repeat(LOGITS, rows, axis=0)
    written = decode_rows(
        lambda tokens, cache: (logits, cache), logits, (), decoding, eos_id=9, vocab_size=4, streams=streams
    )
    counts = np.bincount(np.asarray(written.tokens).reshape(-1), minlength=4)
    weights = np.array([0.4, 0.3, 0.2, 0.1]) ** (1 / temperature)
    assert stats.chisquare(counts, rows * weights / weights.sum()).pvalue > 1e-4
    # The score is the model's own log-probability, whatever was done to draw.
    expected = np.log([0.4, 0.3, 0.2, 0.1])[np.asarray(written.tokens).reshape(-1)]
    np.testing.assert_allclose(np.asarray(written.scores).reshape(-1), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "how, said",
    [
        ({"max_tokens": 0}, "Decoding.max_tokens = 0"),
        ({"temperature": -1.0}, "Decoding.temperature = -1.0"),
        ({"top_k": 5}, "Decoding.top_k has no effect"),
        ({"temperature": 1.0, "top_p": 1.5}, "Decoding.top_p = 1.5"),
        ({"temperature": 1.0, "min_p": 0.0}, "Decoding.min_p = 0.0"),
        ({"temperature": 1.0, "top_k": 0}, "Decoding.top_k = 0"),
        ({"temperature": 1.0, "num_beams": 4}, "Decoding.num_beams is for temperature = 0"),
        ({"num_outputs": 2}, "Decoding.num_outputs = 2 needs"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(how, said):
    with pytest.raises(UserError, match=said):
        Decoding(**how)
