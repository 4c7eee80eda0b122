"""Lanes: the same batches on any number of hosts, every token once an epoch, and each host in its own part only."""

import functools

import numpy as np
import pytest
from memory import assert_equal, skewed_split

from t5x_domain.data.curriculum import Curriculum, Phase
from t5x_domain.data.lanes import Lanes
from t5x_domain.data.loader import Batches
from t5x_domain.data.packing import EncoderDecoder
from t5x_domain.data.prefetch import iterate
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Component, Corpus, Mixture
from t5x_domain.data.vocabulary import ByteVocabulary
from t5x_domain.errors import UserError
from t5x_domain.objectives.prefix import Metadata
from t5x_domain.objectives.span_corruption import SpanCorruption

VOCABULARY = ByteVocabulary(extra_ids=100)
LENGTHS = {"inputs": 64, "targets": 17}  # 70 raw tokens a row
SPLITS = [skewed_split("medicine", 0, count=3000), skewed_split("law", 1, count=2000)]
PACKINGS = pytest.mark.parametrize("packing", ["concat_and_split", "first_fit"])


def component(corpus, rate=1.0, metadata=None):
    return Component(Corpus(corpus, JsonlSource({"train": "none.jsonl"})), SpanCorruption(), rate, metadata=metadata)


BOTH = Mixture("both", [component("medicine", 3.0), component("law", 1.0)])
LAW = Mixture("law", [component("law")])


def make(mixture=BOTH, num_lanes=8, batch_size=16, host=0, num_hosts=1, **changes):
    settings = {"lengths": LENGTHS, "layout": EncoderDecoder(), "seed": 17, "rows_per_window": 16} | changes
    names = [c.name for c in BOTH.components]
    open_lane = functools.partial(Batches, SPLITS, mixture, VOCABULARY, component_names=names, **settings)
    return Lanes(open_lane, num_lanes, batch_size=batch_size, host=host, num_hosts=num_hosts)


def tokens_of(seen):
    return np.concatenate([np.arange(s.start_token, s.stop_token) for s in seen])


@PACKINGS
@pytest.mark.parametrize("num_hosts", [2, 8])
def test_any_number_of_hosts_sees_the_same_global_batches(packing, num_hosts):
    whole = make(packing=packing)
    parts = [make(packing=packing, host=host, num_hosts=num_hosts) for host in range(num_hosts)]
    for step in (0, 5, 100_000):
        rows = [part[step] for part in parts]
        assert_equal({name: np.concatenate([row[name] for row in rows]) for name in rows[0]}, whole[step])
        assert [seen for part in parts for seen in part.seen(step)] == whole.seen(step)
        assert whole.raw_tokens(step) == {
            name: sum(part.raw_tokens(step)[name] for part in parts) for name in whole.raw_tokens(step)
        }


@PACKINGS
def test_a_host_stays_in_its_part_of_every_corpus(packing):
    """Part h of H, to a document: an eighth of the tokens, within the longest document of 89 tokens at either end."""
    for host in range(8):
        batches = make(packing=packing, host=host, num_hosts=8)
        seen = [seen for step in range(200) for seen in batches.seen(step)]
        for split in SPLITS:
            mine = tokens_of([s for s in seen if s.component.startswith(split.corpus)])
            size = split.offsets[-1] / 8
            assert host * size - 1 < mine.min() < mine.max() < (host + 1) * size + 89
        assert max(s.epoch for s in seen) >= 1, "and that for more than an epoch"


@PACKINGS
def test_an_epoch_holds_every_token_once(packing):
    batches = make(mixture=LAW, packing=packing)
    seen = [seen for step in range(batches.steps_of_epochs(1.2, "law")) for seen in batches.seen(step)]
    first = tokens_of([s for s in seen if s.epoch == 0])
    assert len(first) == len(np.unique(first))
    if packing == "concat_and_split":
        np.testing.assert_array_equal(np.sort(first), np.arange(SPLITS[1].offsets[-1]))
    else:  # what found no room is left out, as without lanes
        assert len(first) > 0.97 * SPLITS[1].offsets[-1]


def test_batches_are_mixed_by_the_rates():
    """The lanes take turns: of 16 rows 12 are of medicine, whatever the step, as without lanes."""
    batches = make(packing="concat_and_split")
    for step in range(20):
        assert (batches[step]["component_ids"].max(axis=1) == 0).sum() == 12


def test_lanes_are_not_in_step():
    """Windows are filled longest documents first, then shuffled. Were all lanes shuffled alike, a step's 16 rows would
    be alike and their sum would vary by 16 times what a row does; of independent rows it does so by 4 times."""
    lanes = [make(LAW, 16, host=host, num_hosts=16, packing="first_fit") for host in range(16)]
    pieces = np.array([[len(lane.seen(step)) for step in range(64)] for lane in lanes])
    assert pieces.sum(axis=0).std() < 8 * pieces.std(axis=1).mean()


@PACKINGS
def test_phases_go_on_in_every_lane(packing):
    """A second phase sees nothing again that the first has seen, on one host and on two."""
    phases = [Phase(LAW, steps=12, name="a"), Phase(LAW, name="b")]

    def opened(host, num_hosts):
        return lambda mixture, subset: make(mixture, packing=packing, host=host, num_hosts=num_hosts)

    whole = Curriculum(phases, 24, opened(0, 1))
    seen = [seen for step in range(24) for seen in whole.seen(step)]
    tokens = tokens_of([s for s in seen if s.epoch == 0])
    assert len(tokens) == len(np.unique(tokens))
    halves = [Curriculum(phases, 24, opened(host, 2)) for host in (0, 1)]
    for step in (11, 12, 23):
        assert [s for half in halves for s in half.seen(step)] == whole.seen(step)


def test_subsets_are_divided_among_the_lanes():
    batches = make(LAW, subset={"law": 0.1})
    assert batches.subsets == [("law", 200, SPLITS[1].offsets[200])]
    tokens = tokens_of([seen for step in range(20) for seen in batches.seen(step)])
    assert set(tokens) == set(range(SPLITS[1].offsets[200]))


def test_metadata_are_those_of_the_documents():
    """Document i of a `MemorySplit` has a source of 1 + i % 5 letters; the prompt is the source and a colon."""
    mixture = Mixture("law", [component("law", metadata=Metadata(templates=("{source}:",), rate=1.0))])
    batches = make(mixture, packing="first_fit", num_lanes=4, batch_size=4)
    offsets = np.asarray(SPLITS[1].offsets)
    for step in range(3):
        batch = batches[step]
        documents = np.searchsorted(offsets, [s.start_token for s in batches.seen(step)], side="right") - 1
        expected = sorted("abcde"[: 1 + i % 5] for i in documents)
        segments = [
            row[ids == segment]
            for row, ids in zip(*(batch[f"encoder_{name}"] for name in ("input_tokens", "segment_ids")), strict=True)
            for segment in range(1, ids.max() + 1)
        ]
        found = sorted(VOCABULARY.decode(tokens).partition(":")[0] for tokens in segments)
        assert found == expected


def test_iterates_with_worker_processes():
    batches = make()
    for step, batch, raw_tokens in iterate(batches, 3, stop_step=6, num_workers=1):
        assert_equal(batch, batches[step])
        assert raw_tokens == batches.raw_tokens(step)


@pytest.mark.parametrize("settings", [{"num_lanes": 3}, {"num_lanes": 2, "num_hosts": 4}, {"num_lanes": 0}])
def test_refuses_lanes_that_do_not_divide(settings):
    with pytest.raises(UserError, match="Run.lanes = . must divide the batch of 16 rows .* and be a multiple of the"):
        make(**settings)


def test_refuses_more_lanes_than_documents():
    with pytest.raises(UserError, match="Run.lanes = 16 is too many for the 10 documents of corpus law, split train"):
        make(LAW, num_lanes=16, subset={"law": 10})
