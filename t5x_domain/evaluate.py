"""`python -m t5x_domain.evaluate --gin_file=… --run_dir=…`: held-out scores of a checkpoint, by corpus."""

import json
from collections.abc import Sequence

from t5x_domain import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags and prints a JSON object {corpus: scores}, see `evaluation.perplexity`."""
    parser = cli.parser("evaluate")
    parser.add_argument("--run_dir", required=True, help="the run whose newest checkpoint is evaluated")
    flags, bindings = cli.parse(parser, argv)
    if not flags.gin_file:
        # The run says itself how it was configured.
        flags.gin_file = [f"{flags.run_dir}/config.gin"]
    cli.run("evaluate", lambda: _evaluate(flags.gin_file, flags.run_dir, bindings, flags.gin_search_path))


def _evaluate(gin_files: Sequence[str], run_dir: str, bindings: Sequence[str], search_paths: Sequence[str]) -> None:
    cli.load_gin(gin_files, [*bindings, f"RUN_DIR = {run_dir!r}"], search_paths)
    from t5x_domain.training.loop import open_trained
    from t5x_domain.training.run import Run
    from t5x_domain.training.step import make_eval_step

    feed, blueprint, params = open_trained(cli.build(Run))
    print(json.dumps(feed.held_out(make_eval_step(blueprint, feed.loss), params), indent=1))


if __name__ == "__main__":
    main()
