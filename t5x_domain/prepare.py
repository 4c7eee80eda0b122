"""`python -m t5x_domain.prepare`: documents -> vocabulary and token cache."""

import argparse
from collections.abc import Sequence

from t5x_domain import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and gin files, then calls `t5x_domain.data.preparation.prepare`."""
    parser = cli.parser("prepare")
    parser.add_argument("--overwrite", action="store_true", help="write caches again that are there already")
    beam = parser.add_argument_group("Apache Beam, for large corpora")
    beam.add_argument("--runner", help="e.g. DirectRunner, FlinkRunner; without it one process does the work")
    beam.add_argument("--num_workers", type=int, default=1, help="worker processes of the DirectRunner")
    beam.add_argument(
        "--beam_flag", action="append", default=[], help="a flag handed to Beam as it is; may be repeated"
    )
    flags, bindings = cli.parse(parser, argv)
    if not flags.gin_file:
        parser.error("--gin_file is needed, e.g. --gin_file=gin/mixtures/sample.gin")
    if not flags.runner and (flags.num_workers != 1 or flags.beam_flag):
        parser.error("--num_workers and --beam_flag go with --runner, e.g. --runner=DirectRunner")
    cli.run("prepare", lambda: _prepare(flags, bindings))


def _prepare(flags: argparse.Namespace, bindings: Sequence[str]) -> None:
    from t5x_domain.data.preparation import prepare

    cli.load_gin(flags.gin_file, bindings, flags.gin_search_path)
    prepare(overwrite=flags.overwrite, beam_flags=_beam_flags(flags))


def _beam_flags(flags: argparse.Namespace) -> list[str] | None:
    if not flags.runner:
        return None
    workers = []
    if flags.runner == "DirectRunner":
        mode = "multi_processing" if flags.num_workers > 1 else "in_memory"
        workers = [f"--direct_num_workers={flags.num_workers}", f"--direct_running_mode={mode}"]
    return [f"--runner={flags.runner}", *workers, *flags.beam_flag]


if __name__ == "__main__":
    main()
