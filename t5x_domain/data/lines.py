"""Lines of plain, gzip and Zstandard files; a truncated file is an error, never a short file."""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import zstandard

from t5x_domain import files
from t5x_domain.errors import UserError

_BLOCK_BYTES = 1 << 20


def read_lines(path: str) -> Iterator[bytes]:
    """Lines of a file, of this machine or in a bucket, without their line ends; .gz and .zst are decompressed.

    Raises:
      UserError: the file is empty, truncated or damaged. Lines before the damage have been yielded.
    """
    number = 0
    try:
        with files.path(path).open("rb") as file:
            for number, line in enumerate(_split_lines(_blocks(path, file)), 1):  # noqa: B007
                yield line
    except EOFError as error:
        raise UserError(f"{path}: truncated after line {number}; fetch the file again.") from error
    except (OSError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path}: cannot be read after line {number} ({error}); fetch the file again.") from error
    if number == 0:
        raise UserError(f"{path}: the file is empty; take it out of the source's `files` in gin.")


def _blocks(path: str, file: BinaryIO) -> Iterator[bytes]:
    """Decompressed blocks of bytes. Raises EOFError when compressed data end before their end mark."""
    if path.endswith(".zst"):
        yield from _zstd_blocks(file)
        return
    stream = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
    while block := stream.read(_BLOCK_BYTES):
        yield block


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    # zstandard's own stream reader ends quietly at a truncated frame, so the frames are followed here.
    frame = None
    while block := file.read(_BLOCK_BYTES):
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError


def _split_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest
