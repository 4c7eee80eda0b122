"""Records of the sample, and their words as tokens, for make_figures.py."""

# ruff: noqa: ANN201, D101, D102, D103 -- a script, like those of benchmarks/

import gzip
import json
from pathlib import Path

import numpy as np

SAMPLE = Path(__file__).parents[1] / "data/sample/biomedical.jsonl.gz"


class Words:
    """A vocabulary whose tokens are the words of some texts, each occurrence a token of its own."""

    eos_id, num_sentinels = 1, 256

    def __init__(self):
        self._words = []

    def encode(self, text):
        first = len(self._words) + 2
        self._words += text.split()
        return np.arange(first, len(self._words) + 2, dtype=np.int32)

    def sentinel_ids(self, count):
        return np.arange(10_000, 10_000 + count, dtype=np.int32)

    def sentinel(self, token):
        """The number of a sentinel, counted from 1; None for other tokens."""
        return int(token) - 9_999 if token >= 10_000 else None

    def word(self, token):
        return "EOS" if token == self.eos_id else self._words[token - 2]


def records(*wanted):
    """Records of the sample by id."""
    found = {}
    with gzip.open(SAMPLE, "rt", encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            if record["id"] in wanted:
                found[record["id"]] = record
    return [found[key] for key in wanted]
