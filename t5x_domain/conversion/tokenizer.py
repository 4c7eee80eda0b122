"""Tokenizer files of Hugging Face folders both ways, without torch, transformers or tokenizers.

What is written is the generic fast tokenizer, which transformers 4 and 5 load as it stands, without SentencePiece.
(Class T5Tokenizer of transformers 5 builds its own pipeline, without byte fallback; ByT5Tokenizer has no start token.)
Its ids are those of `vocabulary.encode`, then EOS, except where
- a text spells a special token: `</s>` or `[NLU]` becomes that token, and `<extra_id_k>` a sentinel even inside a word
  or a byte vocabulary's text. Ours, like SeqIO's, knows sentinels only after a space. All white space before one is
  dropped, which shows where the vocabulary keeps white space;
- two segmentations score alike to six digits, as of '-------' or in texts of thousands of words: SentencePiece adds
  scores in float32, tokenizers in float64. Seen in fewer than 2 of 1,000 lines;
- the vocabulary normalizes, and characters stand decomposed (kana, Hangul, more than one mark on a letter) or carry a
  mark on a compatibility character: tokenizers looks whole graphemes up, SentencePiece the longest rule.
It shows unknown pieces as `<unk>`, ours as ' ⁇ '.
"""

import base64
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from t5x_domain.data.vocabulary import EOS_ID, PAD_ID, UNK_ID, ByteVocabulary, Vocabulary
from t5x_domain.errors import UserError
from t5x_domain.files import path

MODEL_FILES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
_SPACE = "▁"
_SENTINEL = re.compile(rf"{_SPACE}?<extra_id_(\d+)>")
_BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
# Cuts a text that spells a byte piece, so that it does not become that byte.
_SPELT_BYTE = {
    "type": "Split",
    "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
_SHOW_BYTES = [{"type": "ByteFallback"}, {"type": "Fuse"}]
# What these do is known to a SentencePiece model too: its character map, and its two settings of white space.
_KNOWN_STEPS = ("Sequence", "Precompiled", "Replace", "Strip", "Metaspace", "WhitespaceSplit", "Split")
_SUPPORTED = "supported are SentencePiece models, Unigram tokenizers of T5's kind and bytes (ByT5)"
_DEFAULT_SENTINELS = {"T5Tokenizer": 100, "ByT5Tokenizer": 125}


def write_tokenizer(
    folder: Path, vocabulary: Vocabulary | ByteVocabulary, *, start_token: bool, max_length: int | None = None
) -> None:
    """Writes what `AutoTokenizer.from_pretrained(folder)` reads, and `spiece.model` of a SentencePiece vocabulary.

    Args:
      folder: exists; files in it are overwritten.
      vocabulary: control symbols of its model, e.g. mode tokens, become special tokens like the sentinels.
      start_token: False appends EOS; True instead puts id 0 before the text, as rows of decoder-only models start.
      max_length: tokens that the model reads at most; None for any number.

    Raises:
      UserError: the SentencePiece model does something that the files cannot say.
    """
    if isinstance(vocabulary, ByteVocabulary):
        special = {PAD_ID: "<pad>", EOS_ID: "</s>", UNK_ID: "<unk>"}
        parts = {"decoder": {"type": "Sequence", "decoders": _SHOW_BYTES}}
        ids = {piece: index for index, piece in enumerate([*special.values(), *_BYTE_PIECES])}
        model = json.dumps({"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "vocab": ids, "merges": []})
    else:
        require_writable(vocabulary)
        proto = _parse(path(vocabulary.model_file))
        special = {
            i: piece.piece for i, piece in enumerate(proto.pieces) if piece.type in (piece.CONTROL, piece.UNKNOWN)
        }
        parts = _pipeline(proto)
        model = _unigram(proto, vocabulary.num_sentinels)
        (folder / MODEL_FILES[0]).write_bytes(path(vocabulary.model_file).read_bytes())
    sentinels = {int(vocabulary.sentinel_id(k)): f"<extra_id_{k}>" for k in range(vocabulary.num_sentinels)}
    flags = {"single_word": False, "rstrip": False, "normalized": False, "special": True}
    added = [
        {"id": index, "content": token, "lstrip": index in sentinels, **flags}
        for index, token in sorted((special | sentinels).items())
    ]
    frame = _template(PAD_ID if start_token else EOS_ID, special, start_token)
    document = {"version": "1.0", "added_tokens": added, **parts, "post_processor": frame, "model": None}
    text = json.dumps(document, ensure_ascii=False).removesuffix("null}") + model + "}"
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length or int(1e30),  # what transformers means by no limit
        "clean_up_tokenization_spaces": False,
        "pad_token": special[PAD_ID],
        "eos_token": special[EOS_ID],
        "unk_token": special[UNK_ID],
        **({"bos_token": special[PAD_ID]} if start_token else {}),
        "extra_ids": vocabulary.num_sentinels,
        "additional_special_tokens": [*sentinels.values(), *(special[index] for index in special if index > UNK_ID)],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def read_vocabulary(folder: epath.Path, into: Path) -> Vocabulary | ByteVocabulary | None:
    """The vocabulary of a Hugging Face folder; None if it holds no tokenizer.

    Args:
      folder: holds a SentencePiece model, or the `tokenizer.json` of a Unigram or of a byte tokenizer, or a
        `tokenizer_config.json` that names ByT5's class.
      into: SentencePiece model to write, where the folder has none or one that holds its sentinels itself.

    Raises:
      UserError: a tokenizer of another kind, or tokens whose ids a vocabulary cannot give them.
    """
    try:
        return _read_vocabulary(folder, into)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: its tokenizer files are damaged ({error!r}); copy them anew.") from error


def _read_vocabulary(folder: epath.Path, into: Path) -> Vocabulary | ByteVocabulary | None:
    config, document = _read_json(folder / "tokenizer_config.json"), _read_json(folder / "tokenizer.json")
    kind = str(config.get("tokenizer_class", "T5Tokenizer")).removesuffix("Fast")
    model_file = next((folder / name for name in MODEL_FILES if (folder / name).is_file()), None)
    settings = document.get("model", {})
    if kind == "ByT5Tokenizer" or (settings.get("byte_fallback") and settings.get("merges") == []):
        byte_ids = {piece: index for index, piece in enumerate(_BYTE_PIECES, start=UNK_ID + 1)}
        if not byte_ids.items() <= settings.get("vocab", byte_ids).items():
            raise UserError(f"{folder}/tokenizer.json: its bytes do not have the ids 3 to 258; {_SUPPORTED}.")
        return ByteVocabulary(_num_sentinels(folder, config, document, [*range(UNK_ID + 1), *byte_ids], kind))
    if model_file is None and not document:
        return None
    if model_file is None and (settings.get("type", "Unigram") != "Unigram" or settings.get("unk_id") is None):
        raise UserError(
            f"{folder}/tokenizer.json: a tokenizer of type {settings.get('type', 'unknown')}; {_SUPPORTED}."
        )
    proto = _parse(model_file) if model_file else _sentencepiece(folder, config, document)
    pieces = [piece.piece for piece in proto.pieces]
    num_sentinels = _num_sentinels(folder, config, document, pieces, kind)
    own = sum(bool(_SENTINEL.fullmatch(piece)) for piece in pieces)
    if own or model_file is None:
        del proto.pieces[len(pieces) - own :]
        model_file = into
        into.write_bytes(proto.SerializeToString(deterministic=True))
    vocabulary = Vocabulary(str(model_file), num_sentinels)
    vocabulary.vocab_size  # noqa: B018  # loads it, which checks the ids of padding, EOS and unknown
    return vocabulary


def _parse(model_file: epath.Path):  # noqa: ANN202
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    try:
        return ModelProto.FromString(model_file.read_bytes())
    except DecodeError as error:
        raise UserError(f"{model_file}: not a SentencePiece model; {_SUPPORTED}.") from error


def _read_json(file: epath.Path) -> dict:
    """{} if there is no such file."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); copy the file anew.") from error


def require_writable(vocabulary: Vocabulary | ByteVocabulary) -> None:
    """Raises UserError if the SentencePiece model does something that tokenizer files cannot say."""
    if isinstance(vocabulary, ByteVocabulary):
        return
    model_file = vocabulary.model_file
    proto = _parse(path(model_file))
    spec, types = proto.normalizer_spec, proto.SentencePiece
    known = (types.NORMAL, types.CONTROL, types.UNKNOWN, types.BYTE)
    unusual = next((piece.piece for piece in proto.pieces if piece.type not in known), None)
    if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
        problem = "is not a unigram model"
    elif proto.trainer_spec.treat_whitespace_as_suffix or not (spec.escape_whitespaces and spec.add_dummy_prefix):
        problem = f"does not write every word's space as '{_SPACE}' before it"
    elif unusual is not None:
        problem = f"has the user-defined or unused piece '{unusual}'"
    else:
        return
    raise UserError(f"{model_file}: {problem}, which tokenizer files cannot say; train a vocabulary with `prepare`.")


def _pipeline(proto: Any) -> dict[str, Any]:
    """Normalizer, pre-tokenizer and decoder that do what the model's normalizer_spec says."""
    spec = proto.normalizer_spec
    steps = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps += [_replace("Regex", " {2,}", " "), _replace("Regex", f"[ {_SPACE}]+$", "")]
    else:
        steps.append(_replace("String", " ", _SPACE))
    # The first puts a space before the text, even if it starts with spaces that are kept: these are written '▁' by now.
    words_only = not any(_SPACE in piece.piece[1:] for piece in proto.pieces)
    split = [_metaspace(" ", "first", split=False), _metaspace(_SPACE, "never", split=words_only)]
    if _byte_fallback(proto):
        split.append(_SPELT_BYTE)
    # A sentinel's piece begins with a space in SentencePiece.
    shown = [_replace("Regex", "^<extra_id_", f"{_SPACE}<extra_id_"), _replace("String", _SPACE, " "), *_SHOW_BYTES]
    shown.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split},
        "decoder": {"type": "Sequence", "decoders": shown},
    }


def _byte_fallback(proto: Any) -> bool:
    return any(piece.type == piece.BYTE for piece in proto.pieces)


def _metaspace(replacement: str, scheme: str, *, split: bool) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": replacement, "prepend_scheme": scheme, "split": split}


def _replace(kind: str, pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def _unigram(proto: Any, num_sentinels: int) -> str:
    """The model as JSON."""
    pieces = [f"[{json.dumps(piece.piece, ensure_ascii=False)},{_decimal(piece.score)}]" for piece in proto.pieces]
    pieces += [f'["<extra_id_{k}>",0.0]' for k in reversed(range(num_sentinels))]
    settings = json.dumps({"type": "Unigram", "unk_id": UNK_ID, "byte_fallback": _byte_fallback(proto), "vocab": []})
    return f"{settings.removesuffix('[]}')}[{','.join(pieces)}]}}"


def _decimal(score: float) -> str:
    """A number that tokenizers, which rounds digits and power of ten apart, reads as exactly this float32 value.

    Values off by one unit in the last place would break ties, as in '------', otherwise than SentencePiece does. One
    value in a thousand or fewer has no such form.
    """
    for power in range(15, 20):
        digits = score * 10.0**power
        for near in (digits, math.nextafter(digits, 0.0), math.nextafter(digits, 2 * digits)):
            if near.is_integer() and abs(near) < 2**63 and near / 10.0**power == score:
                return f"{int(near)}e-{power}"
    return repr(score)


def _template(index: int, special: Mapping[int, str], start_token: bool) -> dict[str, Any]:
    token = {"SpecialToken": {"id": special[index], "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [token, first] if start_token else [first, token],
        "pair": [token, first, second] if start_token else [first, token, second, token],
        "special_tokens": {special[index]: {"id": special[index], "ids": [index], "tokens": [special[index]]}},
    }


def _num_sentinels(folder: Path, config: dict, document: dict, pieces: list, kind: str) -> int:
    """Number of sentinels; `pieces` are all tokens with an id of their own, sentinels perhaps among them."""
    ids = {piece: index for index, piece in enumerate(pieces) if _SENTINEL.fullmatch(str(piece))}
    num_pieces = len(pieces) - len(ids)
    ids |= {entry["content"]: entry["id"] for entry in document.get("added_tokens", ())}
    ids |= {entry["content"]: int(index) for index, entry in config.get("added_tokens_decoder", {}).items()}
    sentinels = {int(match[1]): index for token, index in ids.items() if (match := _SENTINEL.fullmatch(token))}
    size = num_pieces + len(sentinels)
    wrong = [k for k, index in sentinels.items() if index != size - 1 - k]
    # transformers numbers ByT5's sentinels upwards. No ByT5 was trained with them (its sentinels were the last bytes),
    # so only their number counts.
    if wrong and kind != "ByT5Tokenizer":
        k = min(wrong)
        raise UserError(
            f"{folder}: <extra_id_{k}> has id {sentinels[k]}, but sentinel {k} of {len(sentinels)} above {num_pieces} "
            f"pieces must have id {size - 1 - k}; number the sentinels from the top of the vocabulary downwards."
        )
    for token, index in ids.items():
        if index >= num_pieces and not _SENTINEL.fullmatch(token):
            raise UserError(f"{folder}: the added token '{token}' has id {index}, above the pieces; {_SUPPORTED}.")
    if sentinels:
        return len(sentinels)
    named = [*(config.get("additional_special_tokens") or config.get("extra_special_tokens") or ())]
    named = [token["content"] if isinstance(token, dict) else token for token in named]
    return sum(bool(_SENTINEL.fullmatch(token)) for token in named) or config.get(
        "extra_ids", _DEFAULT_SENTINELS.get(kind, 0)
    )


def _steps(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer and all that it is made of."""
    if step:
        yield step
        for part in (*step.get("normalizers", ()), *step.get("pretokenizers", ())):
            yield from _steps(part)


def _sentencepiece(folder: Path, config: dict, document: dict):  # noqa: ANN202
    """The SentencePiece model of a Unigram `tokenizer.json`, sentinels included if the file counts them as pieces."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    settings, proto = document["model"], ModelProto()
    special = {entry["id"] for entry in document.get("added_tokens", ()) if entry["special"]}
    byte_pieces = set(_BYTE_PIECES) if settings.get("byte_fallback") else ()
    types = proto.SentencePiece
    for index, (piece, score) in enumerate(settings["vocab"]):
        if index == settings["unk_id"]:
            proto.pieces.add(piece=piece, type=types.UNKNOWN)
        elif index in special:
            proto.pieces.add(piece=piece, type=types.CONTROL)
        elif piece in byte_pieces:
            proto.pieces.add(piece=piece, type=types.BYTE)
        else:
            proto.pieces.add(piece=piece, score=score)
    tokens = [piece.piece for piece in proto.pieces]
    names = [config.get("pad_token") or "<pad>", config.get("eos_token") or "</s>"]
    pad, eos = (name["content"] if isinstance(name, dict) else name for name in names)
    spec = proto.trainer_spec
    spec.vocab_size, spec.byte_fallback = len(tokens), bool(byte_pieces)
    spec.pad_piece, spec.eos_piece, spec.unk_piece = pad, eos, tokens[settings["unk_id"]]
    spec.pad_id, spec.eos_id = (tokens.index(token) if token in tokens else -1 for token in (pad, eos))
    spec.unk_id, spec.bos_id = settings["unk_id"], -1
    _read_pipeline(proto.normalizer_spec, folder, document)
    return proto


def _read_pipeline(spec: Any, folder: Path, document: dict) -> None:
    """Sets what a SentencePiece model says of normalization; the other way round than `_pipeline`."""
    spec.name, spec.remove_extra_whitespaces, spec.add_dummy_prefix = "identity", False, False
    for step in (*_steps(document.get("normalizer")), *_steps(document.get("pre_tokenizer"))):
        kind = step["type"]
        if kind not in _KNOWN_STEPS or (kind == "Replace" and step["content"].strip(f" {_SPACE}")):
            raise UserError(f"{folder}/tokenizer.json: cannot be read with its step {kind}; {_SUPPORTED}.")
        if kind == "Precompiled":
            spec.name = "user_defined"
            spec.precompiled_charsmap = base64.b64decode(step["precompiled_charsmap"])
        elif kind in ("Strip", "WhitespaceSplit") or (kind == "Replace" and "Regex" in step["pattern"]):
            spec.remove_extra_whitespaces = True
        elif kind == "Metaspace":
            spec.add_dummy_prefix |= step.get("prepend_scheme", "always") != "never"
