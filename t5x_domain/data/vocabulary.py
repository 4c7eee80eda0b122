"""Vocabularies: SentencePiece and bytes, with the id conventions of T5 and SeqIO.

Padding is 0, the end of a sequence 1, the unknown piece 2; `extra_ids` sentinels stand at the top of the vocabulary and
count downwards, so sentinel k is `vocab_size - 1 - k` (Raffel et al. 2020, 3.1.4; seqio.SentencePieceVocabulary).
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePath
from typing import NamedTuple

import gin
import numpy as np

from t5x_domain import files
from t5x_domain.errors import UserError
from t5x_domain.files import write_atomically

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
_NUM_SPECIAL_IDS = 3
# SentencePiece leaves out training lines longer than this many bytes (its default is 4192), so longer lines are cut.
_MAX_LINE_BYTES = 4096


class Pieces(NamedTuple):
    """What the ids of a vocabulary stand for, bool [vocab_size] each."""

    text: np.ndarray  # a piece of a text: not padding, EOS, the unknown piece, a control token or a sentinel
    characters: np.ndarray  # text that is not a single byte of what no other piece can write
    begins_word: np.ndarray  # begins with the space before a word
    goes_on: np.ndarray  # begins with a letter or a digit, hence goes on with a word that stands before it


# Under this name a vocabulary may have an id of its own for the mask token.
MASK = "[MASK]"


class _SentinelIds:
    """What every vocabulary shares; subclasses are frozen dataclasses with `extra_ids` and `vocab_size`."""

    pad_id = PAD_ID
    eos_id = EOS_ID
    unk_id = UNK_ID

    @property
    def num_sentinels(self) -> int:
        return self.extra_ids

    def sentinel_id(self, k: int | np.ndarray) -> int | np.ndarray:
        """Id of the k-th sentinel, `vocab_size - 1 - k`; `k` may be an array.

        Raises:
          UserError: there is no such sentinel; without the check an ordinary piece would silently take its place.
        """
        if np.any(np.asarray(k) >= self.extra_ids):
            raise UserError(
                f"sentinel {np.max(k)} is needed but the vocabulary has extra_ids={self.extra_ids}: "
                f"raise {type(self).__name__}.extra_ids."
            )
        return self.vocab_size - 1 - k

    def sentinel_ids(self, count: int) -> np.ndarray:
        """Ids of the first `count` sentinels, int32 [count], a view that must not be written to.

        Raises:
          UserError: there are fewer.
        """
        if count > self.extra_ids:
            self.sentinel_id(count - 1)
        return self._sentinel_ids[:count]

    @functools.cached_property
    def _sentinel_ids(self) -> np.ndarray:
        return (self.vocab_size - 1 - np.arange(self.extra_ids)).astype(np.int32)

    def special_id(self, token: str) -> int:
        """Id of a token that no text is encoded as, e.g. a mode token.

        Raises:
          UserError: the vocabulary was not trained with it.
        """
        found = self._special_id(token)
        if found is None:
            raise UserError(
                f"mode token missing in the vocabulary: {self.description} has no id of its own for '{token}'; train a "
                "vocabulary whose mixture uses it with `prepare`, or write mode tokens as text (mode_form='text')."
            )
        return found

    def _special_id(self, token: str) -> int | None:
        return None

    @functools.cached_property
    def mask_id(self) -> int:
        """Id that hides a token in masked language modeling: `[MASK]` where the vocabulary has such a control token,
        else the first sentinel, T5's own sign for what is missing.

        Raises:
          UserError: it has neither.
        """
        found = self._special_id(MASK)
        return self.sentinel_id(0) if found is None else found


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Vocabulary(_SentinelIds):
    """A SentencePiece model with `extra_ids` sentinels above its pieces; ids equal SeqIO's and Hugging Face's T5.

    Loaded at first use; pickles as its two fields. A literal `<extra_id_k>` in a text is encoded as that sentinel.
    """

    model_file: str
    extra_ids: int = 100

    def __getstate__(self) -> dict:
        return {"model_file": self.model_file, "extra_ids": self.extra_ids}

    @functools.cached_property
    def _model_bytes(self) -> bytes:
        try:
            return files.path(self.model_file).read_bytes()
        except OSError as error:
            raise UserError(
                f"{self.model_file}: cannot read the SentencePiece model ({error.strerror}); "
                "train one with `python -m t5x_domain.prepare` or set Vocabulary.model_file."
            ) from error

    @functools.cached_property
    def _processor(self):  # noqa: ANN202
        import sentencepiece
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2

        try:
            model = sentencepiece_model_pb2.ModelProto.FromString(self._model_bytes)
        except DecodeError as error:
            raise UserError(f"{self.model_file}: not a SentencePiece model; set Vocabulary.model_file.") from error
        for k in reversed(range(self.extra_ids)):
            model.pieces.add(
                piece=f"▁<extra_id_{k}>", type=sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
            )
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        ids = (processor.pad_id(), processor.eos_id(), processor.unk_id())
        if ids != (PAD_ID, EOS_ID, UNK_ID):
            raise UserError(
                f"{self.model_file}: pad, eos and unk have ids {ids} but T5 needs (0, 1, 2); "
                "train with --pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1."
            )
        return processor

    @functools.cached_property
    def vocab_size(self) -> int:
        """Pieces and sentinels; a model may pad its embedding table beyond this."""
        return self._processor.get_piece_size()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the model's bytes and the number of sentinels."""
        return hashlib.sha256(self._model_bytes + f"extra_ids={self.extra_ids}".encode()).hexdigest()

    @property
    def description(self) -> dict:
        return {
            "kind": "sentencepiece",
            "model_file": PurePath(self.model_file).name,
            "vocab_size": self.vocab_size,
            "extra_ids": self.extra_ids,
        }

    def _special_id(self, token: str) -> int | None:
        found = self._processor.piece_to_id(token)
        return found if self._processor.is_control(found) and found not in (PAD_ID, EOS_ID) else None

    @functools.cached_property
    def pieces(self) -> Pieces:
        """What each id stands for. A word begins at SentencePiece's mark, '▁'."""
        processor, sentinels = self._processor, np.zeros(self.extra_ids, bool)
        ids = list(range(self.vocab_size - self.extra_ids))
        pieces = np.array(processor.id_to_piece(ids))
        special, byte = (
            np.logical_or.reduce([[holds(i) for i in ids] for holds in kinds])
            for kinds in ((processor.is_control, processor.is_unknown, processor.is_unused), (processor.is_byte,))
        )
        goes_on = [
            _in_words(int(piece[3:5], 16)) if is_byte else piece[:1].isalnum()
            for piece, is_byte in zip(pieces.tolist(), byte, strict=True)
        ]
        found = (~special, ~special & ~byte, ~special & np.char.startswith(pieces, "▁"), ~special & goes_on)
        return Pieces(*(np.concatenate([kind, sentinels]) for kind in found))

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 [n], without EOS."""
        return np.array(self._processor.encode(text), np.int32)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids as of `encode`, and the characters [begin, end) that each stands for; int32 [n] each.

        A token may stand for no character at all; of the bytes of a character only one stands for it.
        """
        pieces, before = self._processor.encode_as_proto(text).pieces, _characters_before_bytes(text)
        begins, ends = (before[[getattr(piece, side) for piece in pieces]] for side in ("begin", "end"))
        return np.array([piece.id for piece in pieces], np.int32), begins, ends

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids [n]; sentinels are shown as `<extra_id_k>`, padding and EOS are not shown."""
        return self._processor.decode(np.asarray(ids).tolist())

    def as_seqio(self):  # noqa: ANN201
        """The same vocabulary as a `seqio.SentencePieceVocabulary`."""
        import seqio

        return seqio.SentencePieceVocabulary(self.model_file, self.extra_ids)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class ByteVocabulary(_SentinelIds):
    """UTF-8 bytes as ids 3..258, sentinels above (ByT5: Xue et al. 2022, section 3.1, with sentinels of their own)."""

    extra_ids: int = 100

    @property
    def vocab_size(self) -> int:
        return _NUM_SPECIAL_IDS + 256 + self.extra_ids

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the scheme and the number of sentinels."""
        return hashlib.sha256(f"bytes,extra_ids={self.extra_ids}".encode()).hexdigest()

    @property
    def description(self) -> dict:
        return {"kind": "bytes", "vocab_size": self.vocab_size, "extra_ids": self.extra_ids}

    @functools.cached_property
    def pieces(self) -> Pieces:
        """What each id stands for. A word begins at the space before it."""
        before, sentinels = np.zeros(_NUM_SPECIAL_IDS, bool), np.zeros(self.extra_ids, bool)
        found = (
            np.ones(256, bool),
            np.ones(256, bool),
            np.array([chr(byte).isspace() and byte < 0x80 for byte in range(256)]),
            np.array([_in_words(byte) for byte in range(256)]),
        )
        return Pieces(*(np.concatenate([before, kind, sentinels]) for kind in found))

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 [n], without EOS. A literal `<extra_id_k>` stays the bytes it is written with."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + _NUM_SPECIAL_IDS

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Vocabulary.encode_with_offsets`."""
        before = _characters_before_bytes(text)
        return self.encode(text), before[:-1], before[1:]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids [n]; sentinels are shown as `<extra_id_k>`, special ids and broken UTF-8 are not shown."""
        shown = bytearray()
        for token in np.asarray(ids).tolist():
            if token >= _NUM_SPECIAL_IDS + 256:
                shown += f"<extra_id_{self.vocab_size - 1 - token}>".encode()
            elif token >= _NUM_SPECIAL_IDS:
                shown.append(token - _NUM_SPECIAL_IDS)
        return shown.decode("utf-8", errors="ignore")

    def as_seqio(self):  # noqa: ANN201
        """The same ids as a `seqio.ByteVocabulary` (which does not show sentinels when it decodes)."""
        import seqio

        return seqio.ByteVocabulary(self.extra_ids)


def _in_words(byte: int) -> bool:
    """Whether a UTF-8 byte is one of a letter or a digit; nearly all characters beyond ASCII are letters."""
    return byte >= 0x80 or chr(byte).isalnum()


def _characters_before_bytes(text: str) -> np.ndarray:
    """Of each of the n UTF-8 bytes the characters before it, and last all; int32 [n + 1]."""
    data = np.frombuffer(text.encode("utf-8"), np.uint8)
    return np.concatenate([[0], np.cumsum((data & 0xC0) != 0x80)]).astype(np.int32)


def train_sentencepiece(
    documents: Iterable[str],
    model_file: str,
    vocab_size: int,
    *,
    special_tokens: Sequence[str] = (),
    normalization: str = "nmt_nfkc",
    max_lines: int = 2_000_000,
) -> None:
    """Trains a unigram model (Kudo 2018) with byte fallback and T5's special ids, and writes it whole or not at all.

    The same documents in the same order give the same bytes: training runs in one thread.

    Args:
      documents: texts; each line of a text is a training sentence.
      model_file: where to write the `.model` file.
      vocab_size: number of pieces, special ids and the 256 byte pieces included, sentinels not included.
      special_tokens: tokens with an id of their own that no text is encoded as, e.g. mode tokens.
      normalization: SentencePiece rule; "identity" keeps the text as it is, line ends included.
      max_lines: lines sampled evenly from all documents to learn from; bounds the memory.

    Raises:
      UserError: no text, or a vocabulary size that the text cannot give (the possible size is named).
    """
    import sentencepiece

    failures = []
    lines = _training_lines(documents, failures)
    first = next(lines, None)
    if first is None:
        raise UserError(f"{model_file}: cannot train a vocabulary, the training documents hold no text.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name=normalization,
            remove_extra_whitespaces=normalization != "identity",
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            control_symbols=list(special_tokens),
            input_sentence_size=max_lines,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise UserError(_vocabulary_size_message(vocab_size, str(error))) from error
    write_atomically(model_file, model.getvalue())


def _training_lines(documents: Iterable[str], failures: list[Exception]) -> Iterator[str]:
    """Lines of the documents. SentencePiece makes a RuntimeError of an error here, so the original is kept too."""
    try:
        for text in documents:
            for line in text.splitlines():
                encoded = line.strip().encode("utf-8")
                for start in range(0, len(encoded), _MAX_LINE_BYTES):
                    yield encoded[start : start + _MAX_LINE_BYTES].decode("utf-8", errors="ignore")
    except Exception as error:
        failures.append(error)
        raise


def _vocabulary_size_message(vocab_size: int, error: str) -> str:
    if largest := re.search(r"value <= (\d+)", error):
        return (
            f"vocabulary_size={vocab_size} is too large for the corpus: at most {largest[1]} pieces are possible; "
            "lower it or give more text."
        )
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return f"vocabulary_size={vocab_size} is too small: the corpus needs at least {smallest[1]} pieces."
    return f"SentencePiece could not train a vocabulary of {vocab_size} pieces: {' '.join(error.split())}"
