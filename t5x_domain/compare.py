"""`python -m t5x_domain.compare --base=DIR --adapted=DIR --gin_file=…`: does the adapted model beat its base?"""

import json
from collections.abc import Sequence

from t5x_domain import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, compares as gin describes, and prints the counts of wins, ties and losses."""
    parser = cli.parser("compare")
    parser.add_argument("--base", required=True, metavar="DIR", help="the model before: run or folder in any format")
    parser.add_argument("--adapted", required=True, metavar="DIR", help="the model after, in any format")
    parser.add_argument("--out_dir", metavar="DIR", help="where verdict.json and report.html go (HeadToHead.out_dir)")
    flags, bindings = cli.parse(parser, argv)
    if not flags.gin_file:
        parser.error("--gin_file is needed, for example --gin_file=gin/runs/compare.gin")
    if flags.out_dir is not None:
        bindings.append(f"HeadToHead.out_dir = {flags.out_dir!r}")

    def body() -> None:
        from t5x_domain import files

        # Known before the gin file is read, hence imported first.
        from t5x_domain.evaluation.head_to_head import HeadToHead, head_to_head

        cli.load_gin(flags.gin_file, bindings, flags.gin_search_path)
        report = head_to_head(cli.build(HeadToHead), flags.base, flags.adapted)
        summary = json.loads((files.path(report).parent / "verdict.json").read_text(encoding="utf-8"))["summary"]
        for group, tally in summary.items():
            print(f"{group}: {tally['win']} won, {tally['tie']} tied, {tally['loss']} lost")
        print(report)

    cli.run("compare", body)


if __name__ == "__main__":
    main()
