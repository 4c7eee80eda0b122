"""`python -m t5x_domain.evaluate --gin_file=… --run_dir=…`: held-out scores of a checkpoint, by corpus."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from t5x_domain import cli
from t5x_domain.errors import UserError

if TYPE_CHECKING:
    from t5x_domain.objectives.prefix import Mode
    from t5x_domain.training.run import Run


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags and prints a JSON object {corpus: scores}, see `evaluation.perplexity`."""
    parser = cli.parser("evaluate")
    parser.add_argument("--run_dir", required=True, help="the run whose newest checkpoint is evaluated")
    parser.add_argument(
        "--metadata",
        help="put before every document: 'own' for its own, or a JSON object of fields, e.g. "
        '\'{"source": "GO"}\' (default: none)',
    )
    parser.add_argument(
        "--mode", help="mode token instead of the trained ones, e.g. '[S2S]', or 'none' (default: as trained)"
    )
    flags, bindings = cli.parse(parser, argv)
    if not flags.gin_file:
        # The run says itself how it was configured.
        flags.gin_file = [f"{flags.run_dir}/config.gin"]
    cli.run("evaluate", lambda: _evaluate(flags, bindings))


def _evaluate(flags: argparse.Namespace, bindings: Sequence[str]) -> None:
    cli.load_gin(flags.gin_file, [*bindings, f"RUN_DIR = {flags.run_dir!r}"], flags.gin_search_path)
    metadata = _metadata(flags.metadata)
    from t5x_domain.training.loop import open_trained
    from t5x_domain.training.run import Run
    from t5x_domain.training.step import make_eval_step

    run = cli.build(Run)
    feed, blueprint, params = open_trained(run)
    asked = {"metadata": metadata}
    if flags.mode is not None:
        asked["mode"] = None if flags.mode == "none" else _mode(flags.mode, run)
    print(json.dumps(feed.held_out(make_eval_step(blueprint, feed.loss), params, **asked), indent=1))


def _metadata(flag: str | None) -> str | dict | None:
    if flag in (None, "own"):
        return flag
    try:
        fields = json.loads(flag)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise UserError(f"--metadata={flag}: write 'own' or a JSON object of fields, e.g. '{{\"source\": \"GO\"}}'.")
    return fields


def _mode(token: str, run: "Run") -> "Mode":
    """The mode as some component of the run writes it; a new one as text."""
    from t5x_domain.objectives.prefix import Mode

    mixtures = [phase.mixture for phase in run.phases] + ([run.eval_mixture] if run.eval_mixture else [])
    trained = {c.mode.token: c.mode for mixture in mixtures for c in mixture.components if c.mode}
    if token not in trained:
        known = ", ".join(trained) or "none"
        print(f"--mode={token}: the run was not trained with it (but with {known}); written as text", file=sys.stderr)
    return trained.get(token, Mode(token))


if __name__ == "__main__":
    main()
