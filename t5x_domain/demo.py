"""`python -m t5x_domain.demo`: prepares the shipped sample, trains on it, and ends with a report to read."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from t5x_domain import cli

if TYPE_CHECKING:
    from etils import epath

    from t5x_domain.evaluation.fill import Filled
    from t5x_domain.evaluation.perplexity import Measure
    from t5x_domain.training.run import Run

_FILLED_PER_CORPUS = 4


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags and goes the whole way from documents to the report."""
    parser = cli.parser("demo")
    parser.add_argument("--run_dir", default="runs/demo", help="where everything goes (default: %(default)s)")
    flags, bindings = cli.parse(parser, argv)
    cli.run("demo", lambda: _demo(flags.gin_file, flags.run_dir, bindings, flags.gin_search_path))


def _demo(gin_files: Sequence[str], run_dir: str, bindings: Sequence[str], search_paths: Sequence[str]) -> int:
    tails = {"RUN_DIR": "", "CACHE_DIR": "/cache", "VOCABULARY_FILE": "/cache/vocabulary.model"}
    places = [f"{name} = {run_dir + tail!r}" for name, tail in tails.items()]
    cli.load_gin(["gin/runs/demo.gin", *gin_files], [*places, *bindings], search_paths)
    from t5x_domain import files
    from t5x_domain.data.preparation import prepare
    from t5x_domain.evaluation.perplexity import measures
    from t5x_domain.evaluation.report import write_report
    from t5x_domain.training.loop import train
    from t5x_domain.training.run import Run

    print("1. Documents become a vocabulary and a token cache.", flush=True)
    cli.build(prepare)
    print("\n2. The cache becomes a model.", flush=True)
    run = cli.build(Run)
    status = train(run)
    if status:
        return status
    summary = json.loads((files.path(run.run_dir) / "eval.json").read_text(encoding="utf-8"))
    measure = measures(next(scores for corpus, scores in summary["after"].items() if corpus != "step"))[0]
    print(f"\n3. What was learned ({measure.name} of held-out text: the smaller, the better).")
    write_report(run.run_dir, filled=_fill(run))
    _print_summary(files.path(run.run_dir), summary, measure)
    return 0


def _fill(run: "Run") -> list["Filled"]:
    """A handful of held-out documents of each corpus with the model's words in the blanks."""
    import numpy as np

    from t5x_domain.evaluation.fill import fill_spans
    from t5x_domain.training.loop import open_trained

    feed, blueprint, params = open_trained(run)
    rng = np.random.default_rng(run.seed)
    filled = []
    for component in feed.eval_components:
        if not component.objective.sentinels_needed(64):  # it leaves no blanks
            continue
        examples = [
            component.objective(tokens, rng, run.vocabulary)
            for tokens in feed.held_out_documents(component.corpus, 24, 64, _FILLED_PER_CORPUS)
        ]
        most = run.lengths["targets"]
        filled += fill_spans(blueprint, params, examples, run.vocabulary, max_targets=most, component=component)
    return filled


def _print_summary(run_dir: "epath.Path", summary: Mapping[str, Any], measure: "Measure") -> None:
    before, after = summary["before"], summary["after"]
    form = ",.1f" if measure.key == "perplexity" else measure.form
    for corpus in after:
        if corpus != "step":
            was, became = (format(scores[corpus][measure.key], form) for scores in (before, after))
            right = f"({after[corpus]['accuracy']:.0%} of the targets guessed right)"
            print(f"   {corpus:12} {was:>8} -> {became}   {right}")
    print(f"\nOpen {run_dir / 'report.html'}.")
    print(
        f"In {run_dir}/ are also metrics.jsonl, evaluations.jsonl, eval.json, config.gin, checkpoints/, tensorboard/."
    )


if __name__ == "__main__":
    main()
