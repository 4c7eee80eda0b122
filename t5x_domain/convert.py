"""`python -m t5x_domain.convert --from=DIR --to=DIR --to_format=…`: a model from one file format to another."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from t5x_domain import cli
from t5x_domain.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from t5x_domain.conversion.checkpoint import Checkpoint
    from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary

_FORMATS = ("native", "huggingface", "t5x")


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, reads the one model lazily and writes the other."""
    parser = cli.parser("convert")
    parser.add_argument("--from", dest="source", required=True, metavar="DIR", help="the model to convert")
    parser.add_argument("--from_format", choices=_FORMATS, help="its format (default: what is found there)")
    parser.add_argument("--to", dest="target", required=True, metavar="DIR", help="a new folder for the result")
    parser.add_argument("--to_format", choices=_FORMATS[:2], required=True, help="its format")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the tensors (default: as they are)")
    parser.add_argument("--check", action="store_true", help="run both models and print the largest difference")
    parser.add_argument("--check_python", metavar="FILE", help="interpreter with transformers (default: this)")
    parser.add_argument("--skip_tokenizer", action="store_true", help="leave a Hugging Face tokenizer of another kind")
    t5x = parser.add_argument_group("T5X", "what its checkpoints do not say; --gin.ModelConfig.NAME=VALUE for the rest")
    t5x.add_argument("--vocabulary", metavar="FILE", help="the model's SentencePiece file, or 'bytes'")
    t5x.add_argument("--extra_ids", type=int, metavar="N", help="sentinels of --vocabulary (default: 100)")
    t5x.add_argument("--skip_optimizer", action="store_true", help="leave Adafactor's second moments")
    surgery = parser.add_argument_group("another vocabulary")
    surgery.add_argument("--new_vocabulary", metavar="FILE", help="SentencePiece file, or 'bytes' (default: the same)")
    surgery.add_argument("--new_extra_ids", type=int, metavar="N", help="its sentinels (default: as many)")
    surgery.add_argument("--mode_tokens", metavar="A,B", help="tokens to add, e.g. '[NLU],[NLG],[S2S]'")
    surgery.add_argument("--vocab_multiple", type=int, metavar="N", help="round the embedding's rows up to a multiple")
    surgery.add_argument(
        "--init_embedding",
        choices=("mean", "random"),
        help="rows of new pieces: the mean of the old pieces they are made of, or random (default: mean)",
    )
    decoder = parser.add_argument_group("a decoder", "for an encoder alone, which then can write")
    decoder.add_argument("--decoder", metavar="DIR", help="take that of an encoder-decoder of the same widths")
    decoder.add_argument("--new_decoder_layers", type=int, metavar="N", help="make N layers of the encoder's own")
    flags, bindings = cli.parse(parser, argv)
    cli.run("convert", lambda: _convert(flags, bindings))


def _convert(flags: argparse.Namespace, bindings: Sequence[str]) -> None:
    from t5x_domain.conversion import folders, formats
    from t5x_domain.conversion.rtd import discriminator

    cli.quiet_libraries()
    _require_use_of_flags(flags)
    folders.require_free(flags.target, "--to")
    source_format = flags.from_format or formats.detect(flags.source)
    if flags.skip_tokenizer and source_format != "huggingface":
        raise UserError(f"--skip_tokenizer is for Hugging Face folders; --from={flags.source} is {source_format}.")
    if flags.check:
        _require_checkable(flags, source_format)
    opened = formats.open_checkpoint(flags.source, source_format, **_options(flags, bindings, source_format))
    checkpoint = discriminator(opened)
    print(f"{flags.source}: {source_format}, {checkpoint.model.__name__}, {_size(checkpoint)}")
    for assumption in checkpoint.facts.get("assumed", ()) if source_format == "t5x" else ():
        print(f"assumed: {assumption}")
    known = len(checkpoint.facts.get("notes", ()))
    checkpoint = _with_decoder(_with_dtype(_with_vocabulary(checkpoint, flags), flags.dtype), flags)
    for note in checkpoint.facts.get("notes", ())[known:]:
        print(note)
    check = (lambda folder: _check(flags, checkpoint, folder)) if flags.check else (lambda folder: None)
    formats.write_checkpoint(checkpoint, flags.target, flags.to_format, check=check)
    print(f"{flags.target}: {flags.to_format}, complete")


_CHANGES = ("new_vocabulary", "new_extra_ids", "mode_tokens", "vocab_multiple")  # flags that change the vocabulary


def _require_use_of_flags(flags: argparse.Namespace) -> None:
    for flag, users in {
        "extra_ids": ("vocabulary",),
        "check_python": ("check",),
        "init_embedding": _CHANGES,
    }.items():
        if getattr(flags, flag) is not None and not any(getattr(flags, user) not in (None, False) for user in users):
            raise UserError(f"--{flag} has no effect without --{' or --'.join(users)}; add that or leave it out.")
    for flag, least in {"extra_ids": 0, "new_extra_ids": 0, "vocab_multiple": 1}.items():
        if getattr(flags, flag) is not None and getattr(flags, flag) < least:
            raise UserError(f"--{flag}={getattr(flags, flag)}: it must be at least {least}.")


def _options(flags: argparse.Namespace, bindings: Sequence[str], source_format: str) -> dict[str, Any]:
    if source_format != "t5x":
        if bindings or flags.gin_file or flags.vocabulary or flags.skip_optimizer:
            raise UserError(
                f"--from={flags.source} is {source_format}, which says all of its model itself; leave out gin "
                "settings, --vocabulary and --skip_optimizer (--new_vocabulary gives it another vocabulary)."
            )
        if source_format == "huggingface":
            return {"tokenizer": not flags.skip_tokenizer}
        return {}
    import gin

    cli.load_gin(flags.gin_file, bindings, flags.gin_search_path)
    extra_ids = 100 if flags.extra_ids is None else flags.extra_ids
    vocabulary = None if flags.vocabulary is None else _vocabulary("--vocabulary", flags.vocabulary, extra_ids)
    return {
        "overrides": gin.get_bindings("ModelConfig"),
        "vocabulary": vocabulary,
        "optimizer": not flags.skip_optimizer,
    }


def _vocabulary(flag: str, name: str, extra_ids: int) -> "Vocabulary | ByteVocabulary":
    from t5x_domain.data.vocabulary import ByteVocabulary, Vocabulary
    from t5x_domain.files import path

    if name != "bytes" and not path(name).is_file():
        raise UserError(f"{flag}={name}: there is no such file; give a SentencePiece model, or 'bytes'.")
    return ByteVocabulary(extra_ids) if name == "bytes" else Vocabulary(name, extra_ids)


def _with_vocabulary(checkpoint: "Checkpoint", flags: argparse.Namespace) -> "Checkpoint":
    """The checkpoint with the vocabulary and the number of rows that the flags ask for."""
    from t5x_domain.adaptation.transplant import add_special_tokens, padded_size
    from t5x_domain.data.vocabulary import Vocabulary
    from t5x_domain.files import scratch_folder

    if all(getattr(flags, change) is None for change in _CHANGES):
        return checkpoint
    old = checkpoint.vocabulary
    if old is None:
        raise UserError(
            f"{flags.source} does not say its vocabulary; put the tokenizer (spiece.model or tokenizer.json) into its "
            "folder, or of a T5X checkpoint name the file with --vocabulary."
        )
    extra_ids = old.extra_ids if flags.new_extra_ids is None else flags.new_extra_ids
    if flags.new_vocabulary:
        new = _vocabulary("--new_vocabulary", flags.new_vocabulary, extra_ids)
    else:
        new = Vocabulary(old.model_file, extra_ids) if isinstance(old, Vocabulary) else type(old)(extra_ids)
    if flags.mode_tokens:
        if not isinstance(new, Vocabulary):
            raise UserError("--mode_tokens: a vocabulary of bytes has no room for them; write them as text.")
        file = scratch_folder() / "vocabulary.model"  # the target gets a copy of its own
        tokens = flags.mode_tokens.split(",")
        if any(not token or token != "".join(token.split()) for token in tokens):
            raise UserError(
                f"--mode_tokens={flags.mode_tokens}: write tokens with commas between and no spaces, as A,B."
            )
        new = add_special_tokens(new, tokens, str(file))
    rows = max(new.vocab_size, checkpoint.config.vocab_size if not flags.new_vocabulary else 0)
    rows = padded_size(rows, flags.vocab_multiple or 1)
    return checkpoint.with_vocabulary(new, rows, init=flags.init_embedding or "mean")


def _with_decoder(checkpoint: "Checkpoint", flags: argparse.Namespace) -> "Checkpoint":
    from t5x_domain.adaptation.joining import with_decoder, with_new_decoder
    from t5x_domain.conversion.formats import open_checkpoint
    from t5x_domain.conversion.rtd import discriminator

    if flags.decoder is not None and flags.new_decoder_layers is not None:
        raise UserError("--decoder and --new_decoder_layers: an encoder has one decoder; leave one of them out.")
    if flags.decoder is not None:
        return with_decoder(checkpoint, discriminator(open_checkpoint(flags.decoder, flag="--decoder")))
    if flags.new_decoder_layers is not None:
        return with_new_decoder(checkpoint, flags.new_decoder_layers)
    return checkpoint


def _with_dtype(checkpoint: "Checkpoint", dtype: str | None) -> "Checkpoint":
    import dataclasses

    import ml_dtypes
    import numpy as np

    if dtype is None:
        return checkpoint
    to = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    tensors = {name: tensor.astype(to) for name, tensor in checkpoint.tensors.items()}
    return dataclasses.replace(checkpoint, tensors=tensors)


def _require_checkable(flags: argparse.Namespace, source_format: str) -> None:
    from t5x_domain.conversion.check import require_transformers

    if "huggingface" not in (source_format, flags.to_format):
        raise UserError(
            f"--check compares with transformers, and neither {source_format} nor {flags.to_format} runs there; "
            "convert to huggingface with --check."
        )
    changed = any(getattr(flags, c) is not None for c in ("dtype", "decoder", "new_decoder_layers", *_CHANGES))
    if flags.to_format == "native" and changed:
        raise UserError(
            "--check compares the result with --from, but another dtype, vocabulary or decoder is asked for; convert "
            "the result to huggingface with --check."
        )
    require_transformers(flags.check_python or sys.executable)


def _check(flags: argparse.Namespace, checkpoint: "Checkpoint", written: "Path") -> None:
    from t5x_domain.conversion.check import compare
    from t5x_domain.conversion.native import open_native

    ours, theirs = (checkpoint, written) if flags.to_format == "huggingface" else (open_native(written), flags.source)
    result = compare(ours, str(theirs), flags.check_python or sys.executable)
    print(
        f"check: largest difference of the outputs {result.difference:.3g} (outputs up to {result.largest:.3g}, "
        f"float32 rounding explains {result.bound:.3g}); the same first choice at {result.same_choice:.1%} of positions"
    )


def _size(checkpoint: "Checkpoint") -> str:
    import math

    count = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    ids = "no vocabulary, so the result has no tokenizer (T5X: name it with --vocabulary)"
    if checkpoint.vocabulary is not None:
        ids = f"a vocabulary of {checkpoint.vocabulary.vocab_size:,} ids"
    return f"{count:,} parameters, {checkpoint.config.vocab_size:,} rows of the embedding, {ids}"


if __name__ == "__main__":
    main()
