import concurrent.futures
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import MemorySplit, assert_equal, skewed_split

from t5x_domain.data.loader import Batches
from t5x_domain.data.packing import DecoderOnly, EncoderDecoder
from t5x_domain.data.prefetch import iterate
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Component, Corpus, Mixture
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.objectives.language_modeling import CausalLM, PrefixLM
from t5x_domain.objectives.span_corruption import SpanCorruption

VOCABULARY = ByteVocabulary(extra_ids=100)
LENGTHS = {"inputs": 64, "targets": 17}  # 70 raw tokens: round(10.5) = 10 noisy, 3 spans, 64 inputs, 14 targets


SPLITS = [skewed_split("medicine", 0), skewed_split("law", 1)]


def component(corpus, objective=SpanCorruption(), rate=1.0):
    return Component(Corpus(corpus, JsonlSource({"train": "none.jsonl"})), objective, rate)


MIXTURE = Mixture("both", [component("medicine", rate=3.0), component("law", rate=1.0)])
ALONE = Mixture("alone", [component("law")])


def make(splits=SPLITS, mixture=MIXTURE, **changes):
    settings = {"lengths": LENGTHS, "layout": EncoderDecoder(), "batch_size": 8, "seed": 17} | changes
    return Batches(splits, mixture, VOCABULARY, **settings)


packings = pytest.mark.parametrize("packing", ["concat_and_split", "first_fit"])


@packings
def test_batch_is_a_function_of_seed_and_step(packing):
    batches = make(packing=packing)
    steps = [0, 1, 5, 1_000_000]
    expected = [batches[step] for step in steps]
    fresh = make(packing=packing)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for step, batch in zip(reversed(steps), pool.map(fresh.__getitem__, reversed(steps)), strict=True):
            assert_equal(batch, expected[steps.index(step)])
    other_seed = make(packing=packing, seed=18)[5]["encoder_input_tokens"]
    assert not np.array_equal(other_seed, expected[2]["encoder_input_tokens"])


@packings
@pytest.mark.parametrize("num_hosts", [2, 8])
def test_any_number_of_hosts_sees_the_same_global_batches(packing, num_hosts):
    whole = make(packing=packing)
    parts = [make(packing=packing, host=host, num_hosts=num_hosts) for host in range(num_hosts)]
    for step in (0, 3):
        rows = [part[step] for part in parts]
        assert_equal({name: np.concatenate([row[name] for row in rows]) for name in rows[0]}, whole[step])
        assert [seen for part in parts for seen in part.seen(step)] == whole.seen(step)


@packings
def test_any_batch_size_sees_the_same_rows(packing):
    small, large = make(packing=packing, batch_size=4), make(packing=packing, batch_size=8)
    assert_equal({name: np.concatenate([small[2][name], small[3][name]]) for name in small[2]}, large[1])


@packings
def test_one_epoch_holds_every_token_once(packing):
    batches = make(mixture=ALONE, packing=packing, epochs=1)
    num_tokens = sum(SPLITS[1].lengths)
    seen = [seen for step in range(len(batches)) for seen in batches.seen(step)]
    assert {(s.component, s.epoch) for s in seen} == {("law_span_corruption", 0)}
    tokens = np.concatenate([np.arange(s.start_token, s.stop_token) for s in seen])
    if packing == "concat_and_split":
        np.testing.assert_array_equal(np.sort(tokens), np.arange(num_tokens))
    else:
        assert len(tokens) == len(np.unique(tokens)) > 0.99 * num_tokens
    raw = sum(np.count_nonzero((b["encoder_input_tokens"] > 2) & (b["encoder_input_tokens"] < 259)) for b in batches)
    raw += sum(np.count_nonzero((b["decoder_target_tokens"] > 2) & (b["decoder_target_tokens"] < 259)) for b in batches)
    assert raw == len(tokens), "and the provenance is what the batches hold"
    with pytest.raises(IndexError):
        batches[len(batches)]


@pytest.mark.parametrize("separator", [False, True])
def test_provenance_is_what_the_rows_hold(separator):
    """Causal examples show their raw tokens, and the token ids of `MemorySplit` tell where these stand."""
    mixture = Mixture("alone", [component("law", CausalLM())])
    batches = make(mixture=mixture, layout=DecoderOnly(), lengths={"inputs": 0, "targets": 64}, separator=separator)
    for step in range(60):
        batch = batches[step]
        expected = [np.arange(s.start_token, s.stop_token) % 200 + 3 for s in batches.seen(step)]
        tokens = batch["decoder_target_tokens"]
        np.testing.assert_array_equal(tokens[tokens > 1], np.concatenate(expected))


def test_separator_closes_documents():
    lengths = {"inputs": 0, "targets": 1 + 4 + 3}
    mixture = Mixture("alone", [component("tiny", CausalLM())])
    split = MemorySplit("tiny", (2, 2, 1))  # with EOS: 3 4 | 5 6 | 7 and 8 positions; ids 3 … 7
    settings = {"layout": DecoderOnly(), "lengths": lengths, "batch_size": 1, "epochs": 1}
    joined = make([split], mixture, separator=True, **{**settings, "lengths": {"inputs": 0, "targets": 9}})
    (row,) = joined[0]["decoder_target_tokens"].tolist()
    ring = row[:-1]  # The example's own EOS aside, a ring turned at random.
    turned = [ring[i:] + ring[:i] for i in range(8)]
    assert row[-1] == 1 and [3, 4, 1, 5, 6, 1, 7, 1] in turned
    plain = make([split], mixture, **settings)[0]["decoder_target_tokens"]
    assert sorted(plain[0].tolist()) == [0, 0, 1, 3, 4, 5, 6, 7]


def test_component_ids_and_rates():
    batches = make(batch_size=8)
    for step in range(20):
        batch = batches[step]
        assert (batch["component_ids"].max(axis=1) == 1).sum() == 2, "law has a rate of 1 in 4"
        names = [MIXTURE.components[row.max()].name for row in batch["component_ids"]]
        seen = {s.component for s in batches.seen(step)}
        assert set(names) == seen


def test_t5_chunks_fill_their_rows():
    splits = [skewed_split("law", 0, count=4000)]
    batches = make(splits, ALONE, lengths={"inputs": 512, "targets": 114}, batch_size=16)
    batch = batches[0]
    assert (batch["encoder_segment_ids"] == 1).all() and (batch["decoder_segment_ids"] == 1).all()
    assert {s.stop_token - s.start_token for s in batches.seen(0)} == {568}
    assert batches.packing_stats(range(3)).both == 1.0


def test_first_fit_rows_are_full_and_hold_whole_documents():
    # Rows of 64 hold few documents, so the text of a window varies by more than 2 % of its rows: a fill of 0.96.
    batches = make(packing="first_fit", batch_size=64, lengths={"inputs": 64, "targets": 24}, fill=0.96)
    stats = batches.packing_stats(range(8))
    assert stats.encoder > 0.95
    assert stats.dropped_tokens == 0
    longer = make(packing="first_fit", batch_size=64, lengths={"inputs": 512, "targets": 128}).packing_stats(range(8))
    assert longer.encoder > 0.97
    assert longer.dropped_tokens == 0
    ends = {f"{split.corpus}_span_corruption": set(np.asarray(split.offsets).tolist()) for split in SPLITS}
    seen = [s for step in range(8) for s in batches.seen(step)]
    whole = [s.start_token in ends[s.component] and s.stop_token in ends[s.component] for s in seen]
    # The 24 % of 71 … 89 tokens are longer than a row and come in two pieces: 0.76 / (0.76 + 2 x 0.24) = 0.61 whole.
    assert np.mean(whole) > 0.58
    assert batches[0]["encoder_segment_ids"].max() > 3
    assert all(s.component in ends for s in seen)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=30),
    st.sampled_from([SpanCorruption(), SpanCorruption(0.5, 3.0), PrefixLM(), PrefixLM(split="suffix")]),
    st.sampled_from([EncoderDecoder(), DecoderOnly()]),
    st.sampled_from(["concat_and_split", "first_fit"]),
)
def test_any_corpus_objective_and_layout(document_lengths, objective, layout, packing):
    split = MemorySplit("any", tuple(document_lengths))
    mixture = Mixture("any", [component("any", objective)])
    lengths = {"inputs": 64, "targets": 64}
    batches = make([split], mixture, packing=packing, layout=layout, lengths=lengths, epochs=2)
    for batch in batches:
        weights = batch["decoder_loss_weights"]
        assert set(np.unique(weights)) <= {0.0, 1.0}
        assert not weights[batch["decoder_segment_ids"] == 0].any()
    kept = sum(s.stop_token - s.start_token for step in range(len(batches)) for s in batches.seen(step))
    dropped = batches.packing_stats(range(len(batches))).dropped_tokens
    assert kept + dropped == 2 * sum(document_lengths)


def test_last_batch_is_padded_with_zero_rows():
    split = MemorySplit("law", (700,))  # ten chunks of 70
    batches = make([split], ALONE, epochs=1, batch_size=8)
    assert len(batches) == 2
    filled = batches[1]["decoder_loss_weights"].any(axis=1)
    assert filled.tolist() == [True] * 2 + [False] * 6
    second_host = make([split], ALONE, epochs=1, batch_size=8, host=1, num_hosts=2)
    assert not second_host[1]["decoder_segment_ids"].any()
    assert second_host.seen(1) == []


@packings
def test_resumes_where_it_stopped(packing):
    batches = make(packing=packing)
    straight = list(iterate(batches, stop_step=6))
    assert [step for step, *_ in straight] == list(range(6))
    for step, batch, raw_tokens in iterate(make(packing=packing), 3, stop_step=6, num_threads=3):
        assert_equal(batch, straight[step][1])
        assert raw_tokens == straight[step][2] == batches.raw_tokens(step)


def test_worker_processes_give_the_same_batches_in_order():
    batches = make()
    steps = []
    for step, batch, _ in iterate(batches, 2, stop_step=12, num_workers=2, prefetch=1):
        steps.append(step)
        for worker in multiprocessing.active_children() if len(steps) > 1 else ():  # both have begun
            os.kill(worker.pid, signal.SIGTERM)  # as launchers tell all processes of a job
        assert_equal(batch, batches[step])
    assert steps == list(range(2, 12))


def test_worker_processes_end_with_a_process_that_is_killed():
    """What waits for its output waits for all that could still write some."""
    script = "from test_loader import *; left = iterate(make(), num_workers=1); next(left); os.kill(os.getpid(), 9)"
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(here.parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=here, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == -signal.SIGKILL, result.stderr


def test_iterate_ends_with_the_epochs_or_never():
    finite = make(mixture=ALONE, epochs=1)
    assert len(list(iterate(finite))) == len(finite)
    endless = iterate(make(), 10**9)
    assert next(endless)[0] == 10**9
    with pytest.raises(TypeError, match="for ever"):
        len(make())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hosts": 3}, "batch_size=8 must be a positive multiple of the 3 hosts"),
        ({"rows_per_window": 0}, "Batches.rows_per_window=0 must be at least 1"),
        ({"fill": 1.5}, "Batches.fill=1.5 must be"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"epochs": 1}, "epochs=1 needs a mixture of one component"),
        ({"packing": "best_fit"}, "packing='best_fit' is not one of"),
        ({"packing": "first_fit", "separator": True}, "separator=True is for packing='concat_and_split'"),
        ({"splits": SPLITS[:1]}, "corpus law has no cached split here, only medicine"),
        ({"lengths": {"inputs": 64, "targets": 10}}, "targets length 10 is too short"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)
