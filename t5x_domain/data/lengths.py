"""How long rows should be: the targets length at which a mixture's text fills encoder and decoder alike."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from t5x_domain.data.cache import CachedSplit
from t5x_domain.data.loader import Batches
from t5x_domain.data.packing import EncoderDecoder
from t5x_domain.data.tasks import Mixture
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary

_MULTIPLE = 8
_ROWS_PER_WINDOW, _MOST_WINDOWS = 64, 4


class Fill(NamedTuple):
    """How full rows of (inputs, targets) are planned: shares of the positions, and of the text that finds no room."""

    inputs: int
    targets: int
    encoder: float
    decoder: float
    dropped: float

    @property
    def both(self) -> float:
        """Share of all positions."""
        return (self.inputs * self.encoder + self.targets * self.decoder) / (self.inputs + self.targets)


def fill(
    mixture: Mixture,
    splits: Sequence[CachedSplit],
    vocabulary: Vocabulary | ByteVocabulary,
    inputs: int,
    targets: int,
    subset: Mapping[str, int] | None = None,
) -> Fill:
    """How 'first_fit' fills an encoder-decoder's rows, from lengths alone; of a `subset` as in `Batches`.

    Raises:
      UserError: the mixture cannot be laid out in such rows.
    """
    batches = Batches(
        splits,
        mixture,
        vocabulary,
        lengths={"inputs": inputs, "targets": targets},
        layout=EncoderDecoder(),
        batch_size=_ROWS_PER_WINDOW,
        rows_per_window=_ROWS_PER_WINDOW,
        seed=0,
        packing="first_fit",
        subset=subset,
    )
    in_an_epoch = sum(split.num_tokens for split in splits) // (_ROWS_PER_WINDOW * inputs)
    windows = [batches.plan_window(index) for index in range(min(max(in_an_epoch, 1), _MOST_WINDOWS))]
    kept = sum(piece.stop - piece.start for window in windows for row in window.rows for piece in row)
    dropped = sum(piece.stop - piece.start for window in windows for piece in window.dropped)
    encoder, decoder = (sum(window.filled[side] for window in windows) / len(windows) for side in (0, 1))
    return Fill(inputs, targets, encoder, decoder, dropped / (kept + dropped))


def recommend(
    mixture: Mixture,
    splits: Sequence[CachedSplit],
    vocabulary: Vocabulary | ByteVocabulary,
    inputs: int,
    subset: Mapping[str, int] | None = None,
) -> tuple[Fill, Fill]:
    """The targets length, a multiple of 8, with the least padding and lost text; and, to compare, `inputs` targets.

    `subset` as in `Batches`: all of it is looked at, and of a large corpus the first documents are sample enough.

    Raises:
      UserError: the mixture cannot be laid out in such rows.
    """
    equal = fill(mixture, splits, vocabulary, inputs, inputs, subset)
    # What fills the rows at equal lengths says where both would be full, but for how long documents are cut there.
    middle = max(round(inputs * equal.decoder / equal.encoder / _MULTIPLE), 2)
    candidates = [n * _MULTIPLE for n in range(max(middle - 3, 1), middle + 8)]
    found = [fill(mixture, splits, vocabulary, inputs, targets, subset) for targets in candidates]
    return max(found, key=lambda fill: fill.both * (1 - fill.dropped)), equal
