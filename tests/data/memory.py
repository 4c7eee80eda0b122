"""A corpus in memory, for tests of what is made from the token cache."""

import dataclasses
import itertools

import numpy as np

from t5x_domain.data.offsets import Offsets


@dataclasses.dataclass(frozen=True)
class MemorySplit:
    """The loader's view of `CachedSplit`, in memory. Token ids count up, so a token tells where it stands."""

    corpus: str
    lengths: tuple[int, ...]
    split: str = "train"
    metadata_fields: frozenset = frozenset({"source"})

    @property
    def num_documents(self):
        return len(self.lengths)

    def derived(self, name, make):
        return make()

    def metadata(self, start, stop):
        """Document i is of a source whose name has 1 + i % 5 letters, so its tokens say which document it is of."""
        return [{"source": "abcde"[: 1 + i % 5]} for i in range(start, stop)]

    @property
    def offsets(self):
        return Offsets.from_lengths(self.lengths)

    def documents(self, start, stop):
        borders = itertools.pairwise(self.offsets[start : stop + 1])
        return [np.arange(*border, dtype=np.int32) % 200 + 3 for border in borders]


def skewed_split(corpus, seed, count=400):
    return MemorySplit(corpus, tuple(np.random.default_rng(seed).integers(1, 90, count).tolist()))


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
