"""From pieces of a corpus to examples: reads the token cache and applies objective, mode token and metadata."""

import functools
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from t5x_domain.data.packing import Example, Layout
from t5x_domain.data.sampling import ExampleRandom, Piece, random_bits
from t5x_domain.data.shapes import Shape, Source
from t5x_domain.data.tasks import Component
from t5x_domain.data.token_line import TokenLine
from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.objectives.prefix import NO_TOKENS, Metadata


@functools.lru_cache(maxsize=1 << 16)  # many documents share a source
def _encoded(vocabulary: Vocabulary | ByteVocabulary, text: str) -> np.ndarray:
    return vocabulary.encode(text) if text else NO_TOKENS


class MetadataOf:
    """Which documents of a line carry metadata, and which."""

    def __init__(self, metadata: Metadata, line: TokenLine, vocabulary: Vocabulary | ByteVocabulary, key: int):
        """`key` seeds the draw.

        Raises:
          UserError: a template needs a field that no document has.
        """
        self._metadata, self._line, self._vocabulary, self._key = metadata, line, vocabulary, key
        split = line.split
        self._metadata.check_fields(split.metadata_fields, f"corpus '{split.corpus}', split '{split.split}',")
        if self._metadata.fields is not None:
            self._lengths = np.full(line.num_documents, len(self._encode(self._metadata.text({}))), np.uint16)
        else:
            name = f"metadata-{self._metadata.fingerprint}-{vocabulary.fingerprint[:16]}"
            if line.num_documents < split.num_documents:
                name += f"-{line.documents.start}-{line.documents.stop}"
            self._lengths = split.derived(name, self._all_lengths)

    @property
    def longest(self) -> int:
        """Most tokens that a document carries."""
        return int(self._lengths.max()) if self._metadata.rate else 0

    @property
    def mean(self) -> float:
        """Expected tokens of a document."""
        return self._metadata.rate * int(self._lengths.sum(dtype=np.int64)) / len(self._lengths)

    def lengths(self, epoch: int, documents: np.ndarray) -> np.ndarray:
        """Tokens that each of the documents (int64 [n]) carries in an epoch, int64 [n]."""
        return self._lengths[documents].astype(np.int64) * self._drawn(epoch, documents)

    def of(self, piece: Piece) -> np.ndarray:
        """Token ids for the example of a piece, int32 [n]."""
        document = self._line.document(piece.start)
        if not self._drawn(piece.epoch, np.array([document]))[0]:
            return NO_TOKENS
        fields = {} if self._metadata.fields is not None else next(self._line.metadata(range(document, document + 1)))
        return self._encode(self._metadata.text(fields))

    def _encode(self, text: str) -> np.ndarray:
        return _encoded(self._vocabulary, text)[: self._metadata.max_tokens]

    def _all_lengths(self) -> np.ndarray:
        count = self._line.num_documents
        lengths = (len(self._encode(self._metadata.text(fields))) for fields in self._line.metadata(range(count)))
        return np.fromiter(lengths, np.uint16, count)

    def _drawn(self, epoch: int, documents: np.ndarray) -> np.ndarray:
        """Whether documents carry their metadata in an epoch: a hash of (seed, epoch, document) against the rate."""
        if self._metadata.rate in (0, 1):
            return np.full(len(documents), bool(self._metadata.rate))
        bits = documents.astype(np.uint64) ^ np.uint64(random_bits(self._key, epoch))
        # splitmix64's finaliser (Steele et al. 2014)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (bits ^ (bits >> np.uint64(31))) < np.uint64(min(int(self._metadata.rate * 2**64), 2**64 - 1))


class ExampleMaker:
    """Makes the examples of one component, and says how much room they take before any is read."""

    def __init__(
        self,
        component: Component,
        component_id: int,
        line: TokenLine,
        vocabulary: Vocabulary | ByteVocabulary,
        layout: Layout,
        lengths: Mapping[str, int],
        seed: int,
        room_for: Component | None = None,
    ):
        """`component_id` marks the component's targets in a batch; for `room_for` see `Batches`.

        Raises:
          UserError: lengths that leave no room for text, a vocabulary without the mode token or with too few
            sentinels, metadata that no document has.
        """
        self.component, self.component_id, self.line = component, component_id, line
        self.objective, self._vocabulary, self._layout = component.objective, vocabulary, layout
        self._mode = component.mode.ids(vocabulary) if component.mode else NO_TOKENS
        # By name, so that the same component of another mixture makes the same examples.
        self.key = (zlib.crc32(component.name.encode()), *line.key)
        self._key = random_bits(*self.key)
        self._metadata = self._metadata_of(component, line, seed) if component.metadata else None
        self._seed = seed
        before = len(self._mode) + (self._metadata.longest if self._metadata else 0)
        if room_for is not None:
            trained = self._metadata_of(room_for, line, seed).longest if room_for.metadata else 0
            before = max(before, trained + (len(room_for.mode.ids(vocabulary)) if room_for.mode else 0))
        self._reserved = None if room_for is None else before
        self._lengths, self._room = lengths, {**lengths, "inputs": lengths["inputs"] - before}
        rooms = zip(layout.capacity(self._room), layout.capacity(lengths), strict=True)
        if before and min(room for room, whole in rooms if whole) < 2:
            raise UserError(
                f"{component.name}: metadata and mode token take {before} tokens, which leaves no room in "
                f"{dict(lengths)}; raise the inputs length or lower Metadata.max_tokens."
            )

    def _metadata_of(self, component: Component, line: TokenLine, seed: int) -> MetadataOf:
        return MetadataOf(component.metadata, line, self._vocabulary, random_bits(seed, self._key, 2))

    @property
    def raw_length(self) -> int:
        """Raw tokens whose example fills a row, for 'concat_and_split'.

        Raises:
          UserError: the example would overrun the targets, or the sentinels of the vocabulary.
        """
        self._layout.check(self.objective, self._room, self._vocabulary)
        return self._layout.raw_length(self.objective, self._room)

    def shape(self) -> Shape:
        """What pieces take of a row, for 'first_fit'."""
        capacity = self._layout.capacity(self._room)
        lengths = [(0, 0)]
        for num_raw in range(1, sum(self._lengths.values())):
            cost = self._layout.cost(self.objective, num_raw)
            if any(taken > size for taken, size in zip(cost, capacity, strict=True)):
                break
            lengths.append(cost)
        longest = len(lengths) - 1
        if longest < 2:
            raise UserError(
                f"{self.objective.name}: sequences of {self._lengths} are too short for two tokens of text."
            )
        self.objective.check_vocabulary(longest, self._vocabulary)
        # What every example has before it: the mode token, or the room that is kept.
        constant = len(self._mode) if self._reserved is None else self._reserved
        mode = np.array(self._layout.prefix_cost)[:, None] * constant
        varies = self._metadata is not None and self._reserved is None
        means = [self._layout.mean_cost(self.objective, num_raw) for num_raw in range(longest + 1)]
        table, mean = np.array(lengths, np.int64).T + mode, np.array(means, np.float64).T + mode
        table[:, 0] = mean[:, 0] = 0
        return Shape(
            table,
            mean=mean,
            draw=functools.partial(self._draw, mode) if self._layout.random_cost(self.objective) else None,
            prefix_cost=self._layout.prefix_cost,
            prefixes=self._metadata.lengths if varies else None,
            mean_prefix=self._metadata.mean if varies else 0.0,
        )

    def _draw(self, mode: np.ndarray, pieces: Sequence[Piece]) -> np.ndarray:
        random = ExampleRandom(self._seed)  # threads that plan at once need one each
        lengths = [self.objective.drawn_lengths(p.stop - p.start, random.at(p, self._key)) for p in pieces]
        return np.array(lengths, np.int64).reshape(-1, 2).T + mode

    @property
    def source(self) -> Source:
        """The documents, for 'first_fit'."""
        return Source(self.line.key, self.line.offsets)

    def example(self, piece: Piece, tokens: np.ndarray, random: ExampleRandom) -> Example:
        """The example of a piece (int32 [n]); the same whenever it is asked for."""
        features = self.objective(tokens, random.at(piece, self._key), self._vocabulary)
        prefix = self._mode if self._metadata is None else np.concatenate([self._metadata.of(piece), self._mode])
        return Example(
            features["inputs"], features["targets"], self.component_id, prefix, features.get("chosen", NO_TOKENS)
        )
