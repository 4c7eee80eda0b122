"""Vocabulary surgery: a trained model's token embeddings for another vocabulary, by the meaning of every id.

Ids move: pieces are added, T5's sentinels stand above them all, a domain's own vocabulary has other pieces altogether.
A piece that both vocabularies have keeps its row; a new one begins as the mean of the rows that the old vocabulary
would have written it with (Gee et al. 2022, "Fast Vocabulary Transfer for Language Model Compression", where all of a
vocabulary is exchanged; Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models", on why means).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from t5x_domain.conversion.stores import absolute
from t5x_domain.data.vocabulary import EOS_ID, PAD_ID, UNK_ID, ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.files import path, write_atomically

INITS = ("mean", "random")
_SPECIAL_IDS = (PAD_ID, EOS_ID, UNK_ID)
_SPACE = "▁"  # how SentencePiece writes a space

# What an id stands for: ('special', id), ('piece', '▁heart'), ('byte', 0xE2), ('control', '[S2S]'), ('sentinel', 0).
Meaning = tuple[str, str | int]


@dataclasses.dataclass(frozen=True)
class Transplant:
    """Which rows of an old embedding table make each row of a new one.

    Attributes:
      old_size: ids of the old vocabulary.
      rows: for each id of the new vocabulary the old rows whose mean it begins as; none for all of `ordinary`.
      copied_ids: new ids that mean what their one old row means.
      ordinary: old rows of pieces that stand for text; of bytes in a byte vocabulary.
      unchanged: whether every id means the same in both vocabularies.
    """

    old_size: int
    rows: tuple[tuple[int, ...], ...]
    copied_ids: tuple[int, ...]
    ordinary: tuple[int, ...]
    unchanged: bool

    @classmethod
    def plan(cls, old: Vocabulary | ByteVocabulary, new: Vocabulary | ByteVocabulary) -> "Transplant":
        """Compares two vocabularies.

        Padding, EOS and the unknown piece keep their rows, sentinel k that of the old sentinel k, pieces, bytes and
        control symbols (mode tokens) those of the same string. What the old vocabulary has not:

        * a piece: the mean of the old pieces of its text. Without ▁ it goes on a word, so it is split as such.
        * a control symbol: the mean of the old pieces that a text of that name is encoded as.
        * a sentinel: the mean of all old sentinels; if there are none, as a control symbol.
        * a byte, and whatever the old vocabulary cannot write: the mean of all ordinary rows.

        Raises:
          UserError: a SentencePiece model that cannot be read.
        """
        old_meanings, new_meanings = _meanings(old), _meanings(new)
        ids = {meaning: number for number, meaning in enumerate(old_meanings)}
        if isinstance(old, ByteVocabulary):  # its ASCII bytes are pieces, too
            ids |= {("byte", byte): len(_SPECIAL_IDS) + byte for byte in range(256)}
        sentinels = [number for (kind, _), number in ids.items() if kind == "sentinel"]
        split = _splitter(old)

        def sources(meaning: Meaning) -> Sequence[int]:
            kind, name = meaning
            if meaning in ids:
                return [ids[meaning]]
            if kind == "byte":
                return []
            if kind == "sentinel" and sentinels:
                return sentinels
            if kind == "piece":
                found = split(name.replace(_SPACE, " "))
            else:
                found = old.encode(name if kind == "control" else f"<extra_id_{name}>").tolist()
            # The unknown piece says nothing of the text that it stands for.
            return [number for number in found if number != UNK_ID]

        ordinary_kinds = ("piece", "byte") if isinstance(old, ByteVocabulary) else ("piece",)
        return cls(
            old_size=old.vocab_size,
            rows=tuple(tuple(sources(meaning)) for meaning in new_meanings),
            copied_ids=tuple(number for number, meaning in enumerate(new_meanings) if meaning in ids),
            ordinary=tuple(number for number, (kind, _) in enumerate(old_meanings) if kind in ordinary_kinds),
            unchanged=old_meanings == new_meanings,
        )

    @property
    def copied(self) -> int:
        """New ids whose row is an old one."""
        return len(self.copied_ids)

    @property
    def averaged(self) -> int:
        """New ids whose row is a mean."""
        return len(self.rows) - self.copied

    def check(self, num_rows: int, init: str) -> None:
        """Raises UserError for arguments that `apply` would refuse."""
        if init not in INITS:
            raise UserError(f"init_embedding={init!r} is not one of {', '.join(INITS)}.")
        if num_rows < len(self.rows):
            raise UserError(
                f"{num_rows} rows of an embedding are too few for a vocabulary of {len(self.rows)} ids; "
                f"set ModelConfig.vocab_size to {len(self.rows)} or more."
            )

    def apply(self, table: np.ndarray, num_rows: int, init: str = "mean", seed: int | Sequence[int] = 0) -> np.ndarray:
        """The new table, [num_rows, D] of the same dtype, from the old one, [old_rows, D].

        For the input embedding and for an untied output kernel alike. Copied rows are the same to the bit, means are
        computed in float32. Rows beyond the new vocabulary, which make the number of rows a convenient one, hold the
        mean of all ordinary rows, whatever `init`; if both vocabularies are the same, the old ones are kept. Zeros
        would not do: a zero row of an output kernel gives the logit 0, and training has pushed the logits of nearly
        all tokens far below (28 zero rows cost flan-t5-small 15 % of its loss, 28 mean rows nothing). The logit of a
        mean row is the mean of the logits, so by Jensen's inequality such a row never gets more probability than the
        average token.

        Args:
          table: with a row for every old id at least.
          num_rows: rows wanted, see `padded_size`.
          init: "mean", or "random" as a control: rows that "mean" would average are drawn from a normal distribution
            with the mean and standard deviation, by dimension, of the old ordinary rows.
          seed: of "random". The tables of one model need different ones.

        Raises:
          UserError: an unknown `init`, too few rows in `table`, or `num_rows` smaller than the new vocabulary.
        """
        self.check(num_rows, init)
        if len(table) < self.old_size:
            raise UserError(
                f"the embedding has {len(table)} rows but its vocabulary {self.old_size} ids; one of them belongs to "
                "another model."
            )
        ordinary = table[list(self.ordinary)].astype(np.float32)
        mean = ordinary.mean(axis=0, dtype=np.float64)
        result = np.empty((num_rows, table.shape[1]), table.dtype)
        result[:] = mean
        averaged = np.setdiff1d(np.arange(len(self.rows)), self.copied_ids)
        if init == "random":
            deviation = ordinary.std(axis=0, dtype=np.float64)
            result[averaged] = np.random.default_rng(seed).normal(mean, deviation, (len(averaged), len(mean)))
        else:
            for number in averaged:
                if self.rows[number]:
                    result[number] = table[list(self.rows[number])].astype(np.float32).mean(axis=0)
        copied = list(self.copied_ids)
        result[copied] = table[[self.rows[number][0] for number in copied]]
        if self.unchanged:
            padding = slice(len(self.rows), min(num_rows, len(table)))
            result[padding] = table[padding]
        return result


def padded_size(vocab_size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` with a row for each of `vocab_size` ids."""
    return -(-vocab_size // multiple) * multiple


def add_special_tokens(vocabulary: Vocabulary, tokens: Sequence[str], model_file: str) -> Vocabulary:
    """The vocabulary with ids of their own for tokens that no text is encoded as, e.g. mode tokens.

    They follow the last piece, so sentinels move up; those that are there already stay where they are. More sentinels
    need no new file: `dataclasses.replace(vocabulary, extra_ids=256)`.

    Args:
      vocabulary: stays as it is.
      tokens: e.g. ("[R]", "[X]", "[S]").
      model_file: where the new SentencePiece model goes, whole or not at all.

    Raises:
      UserError: `model_file` is the vocabulary's own, or a token is an ordinary piece of it.
    """
    from sentencepiece import sentencepiece_model_pb2

    if absolute(model_file) == absolute(vocabulary.model_file):
        raise UserError(f"{model_file} is the vocabulary that tokens are to be added to; name another file.")
    model, control = _model(vocabulary), sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL
    there = {piece.piece: number for number, piece in enumerate(model.pieces)}
    for token in dict.fromkeys(tokens):
        if not token or (
            token in there and (there[token] in _SPECIAL_IDS or model.pieces[there[token]].type != control)
        ):
            raise UserError(
                f"'{token}' cannot be a token of its own, {vocabulary.model_file} has an ordinary piece of that name; "
                "choose another, or write it as text."
            )
        if token not in there:
            model.pieces.add(piece=token, type=control)
    write_atomically(model_file, model.SerializeToString())
    return dataclasses.replace(vocabulary, model_file=str(model_file))


def _model(vocabulary: Vocabulary) -> Any:
    """The SentencePiece model as a protocol buffer."""
    from sentencepiece import sentencepiece_model_pb2

    vocabulary.encode("")  # says what is wrong with the file
    return sentencepiece_model_pb2.ModelProto.FromString(path(vocabulary.model_file).read_bytes())


def _meanings(vocabulary: Vocabulary | ByteVocabulary) -> list[Meaning]:
    """What every id stands for, in the order of the ids."""
    if isinstance(vocabulary, ByteVocabulary):
        characters = [("piece", chr(byte).replace(" ", _SPACE)) for byte in range(128)]
        pieces = characters + [("byte", byte) for byte in range(128, 256)]
    else:
        pieces = [_piece_meaning(piece) for piece in _model(vocabulary).pieces[len(_SPECIAL_IDS) :]]
    sentinels = [("sentinel", k) for k in reversed(range(vocabulary.num_sentinels))]
    return [*(("special", number) for number in _SPECIAL_IDS), *pieces, *sentinels]


def _piece_meaning(piece: Any) -> Meaning:
    if piece.type == piece.BYTE:
        return "byte", int(piece.piece[3:5], 16)  # <0xE2>
    return "control" if piece.type == piece.CONTROL else "piece", piece.piece


def _splitter(vocabulary: Vocabulary | ByteVocabulary) -> Callable[[str], list[int]]:
    """Part of a text -> its ids, without the space that SentencePiece puts before a text, so that 'itis' is not
    '▁it is', and with the spaces that it would strip."""
    if isinstance(vocabulary, ByteVocabulary):
        return lambda text: vocabulary.encode(text).tolist()
    import sentencepiece

    model = _model(vocabulary)
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString()).encode
