"""`python -m t5x_domain.compile --topology=v5e:16x16 --gin_file=…`: what a run needs of machines that are not there."""

import argparse
import re
from collections.abc import Sequence

from t5x_domain import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, then compiles the run's program for the topology and says what it takes."""
    parser = cli.parser("compile")
    parser.add_argument("--topology", help="v5e:16x16, v5p:4x4x4, tpu7x:4x4x4, h200:8, h200:8x2 (two nodes), cpu:8, …")
    parser.add_argument("--slices", type=int, default=1, help="so many TPU slices, joined by the data-center network")
    parser.add_argument("--decode", action="store_true", help="the program that writes answers, not the train step")
    parser.add_argument("--price", type=float, help="of a chip for an hour, for bounds of the cost")
    parser.add_argument("--json", metavar="FILE", help="write all that is known there")
    parser.add_argument("--advice_limit", type=int, default=4, help="changes to try, where it does not fit")
    parser.add_argument("--search", action="store_true", help="try meshes, --batch_sizes and --remats, and rank them")
    parser.add_argument("--search_limit", type=int, default=8, help="compile so many of them at most")
    parser.add_argument("--batch_sizes", type=_numbers, help="256,512: rows of an update; the run's own without")
    parser.add_argument("--remats", type=_remats, help="none,minimal,full; the run's own without")
    parser.add_argument("--compile_timeout", type=float, help="seconds that a compilation may take")
    flags, bindings = cli.parse(parser, argv)
    if not flags.gin_file:
        parser.error("--gin_file is needed, for example --gin_file=gin/runs/pretrain.gin")
    if not flags.topology:
        parser.error("--topology is needed, for example --topology=v5e:4x4")

    def body() -> int:
        from t5x_domain.planning.verb import run

        return run(flags, bindings)

    cli.run("compile", body)


def _numbers(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of positive numbers like 256,512")
    return [int(word) for word in text.split(",")]


def _remats(text: str) -> list[str]:
    words = text.split(",")
    if unknown := set(words) - {"none", "minimal", "full"}:
        raise argparse.ArgumentTypeError(f"{unknown.pop()!r} is not one of none, minimal, full")
    return words


if __name__ == "__main__":
    main()
