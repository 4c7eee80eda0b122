"""`python -m t5x_domain.evaluate --run_dir=…`: held-out scores of a checkpoint, by corpus and metadata.

`python -m t5x_domain.evaluate --model=… --gin_file=… --task=…`: scores of a model of any format on labelled tasks.
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from t5x_domain import cli
from t5x_domain.errors import UserError

if TYPE_CHECKING:
    from t5x_domain.evaluation.by_metadata import SomeDocuments
    from t5x_domain.objectives.prefix import Mode
    from t5x_domain.training.feed import Feed
    from t5x_domain.training.run import Run


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags and prints a JSON object {corpus: scores}, see `evaluation.perplexity`.

    With --by=FIELD the scores of a corpus have in addition {"by": {FIELD: {value: scores}}}. With --model it is
    {task: scores}, see `evaluation.downstream`.
    """
    parser = cli.parser("evaluate")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--run_dir", help="the run whose newest checkpoint is scored on held-out text")
    asked.add_argument("--model", metavar="DIR", help="a model of any format to ask the tasks of --task")
    parser.add_argument(
        "--task",
        action="append",
        metavar="NAME",
        help="with --model: a task as the --gin_file names it, e.g. '@claims/LabelledTask()'; repeat for several "
        "(default: TaskEvaluation.tasks)",
    )
    parser.add_argument(
        "--metadata",
        help="put before every document: 'own' for its own, or a JSON object of fields, e.g. "
        '\'{"source": "GO"}\' (default: none)',
    )
    parser.add_argument(
        "--mode", help="mode token instead of the trained ones, e.g. '[S2S]', or 'none' (default: as trained)"
    )
    parser.add_argument(
        "--by",
        metavar="FIELD",
        help="also score the documents of each value of this metadata field by themselves, e.g. source; values of "
        "fewer than ten documents together as '(other)'",
    )
    flags, bindings = cli.parse(parser, argv)
    if flags.run_dir is not None and not flags.gin_file:
        # The run says itself how it was configured.
        flags.gin_file = [f"{flags.run_dir}/config.gin"]
    cli.run("evaluate", lambda: (_evaluate if flags.model is None else _evaluate_tasks)(flags, bindings))


def _evaluate(flags: argparse.Namespace, bindings: Sequence[str]) -> None:
    if flags.task:
        raise UserError("--task is for --model=DIR; give it instead of --run_dir.")
    cli.load_gin(flags.gin_file, [*bindings, f"RUN_DIR = {flags.run_dir!r}"], flags.gin_search_path)
    metadata = _metadata(flags.metadata)
    from t5x_domain.evaluation.by_metadata import scores_by_value
    from t5x_domain.training.loop import open_trained
    from t5x_domain.training.run import Run
    from t5x_domain.training.step import make_eval_step

    run = cli.build(Run)
    feed, blueprint, params = open_trained(run)
    asked = {"metadata": metadata}
    if flags.mode is not None:
        asked["mode"] = None if flags.mode == "none" else _mode(flags.mode, run)
    groups = {} if flags.by is None else _groups(run, feed, flags.by)
    eval_step = make_eval_step(blueprint, feed.loss)
    scores = feed.held_out(eval_step, params, **asked)
    for name, component in zip(scores, feed.eval_components, strict=True):
        if component.corpus.name in groups:
            batches = functools.partial(feed.of_documents, component, **asked)
            values = scores_by_value(groups[component.corpus.name], eval_step, params, batches, run.vocabulary)
            scores[name]["by"] = {flags.by: values}
    print(json.dumps(scores, indent=1, ensure_ascii=False))


def _evaluate_tasks(flags: argparse.Namespace, bindings: Sequence[str]) -> None:
    for name in ("by", "metadata", "mode"):
        if getattr(flags, name) is not None:
            raise UserError(f"--{name} is for held-out text: give --run_dir instead of --model.")
    # Known before the gin file is read, hence imported first.
    from t5x_domain.evaluation.downstream import TaskEvaluation
    from t5x_domain.inference.opened import open_model

    named = [f"TaskEvaluation.tasks = [{', '.join(flags.task)}]"] if flags.task else []
    cli.load_gin(flags.gin_file, [*bindings, *named], flags.gin_search_path)
    evaluation = cli.build(TaskEvaluation)
    print(json.dumps(evaluation.scores(open_model(flags.model)), indent=1, ensure_ascii=False))


def _groups(run: "Run", feed: "Feed", field: str) -> dict[str, dict[str, "SomeDocuments"]]:
    """The documents of each value, by corpus; of the corpora that have the field."""
    from t5x_domain.data.cache import TokenCache
    from t5x_domain.evaluation.by_metadata import documents_by_value

    names = [component.corpus.name for component in feed.eval_components]
    splits = {name: TokenCache.open(run.cache_dir, name).split(run.eval_split) for name in names}
    having = {name: split for name, split in splits.items() if field in split.metadata_fields}
    # If none has it, the first says what it has instead.
    return {name: documents_by_value(split, field) for name, split in (having or splits).items()}


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
