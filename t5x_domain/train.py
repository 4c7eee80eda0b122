"""`python -m t5x_domain.train --gin_file=gin/runs/pretrain.gin --gin.NAME=VALUE …`: trains a model."""

import time
from collections.abc import Sequence

from t5x_domain import cli
from t5x_domain.parallel import processes


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, then builds the run that gin describes and trains it."""
    began = time.time()
    parser = cli.parser("train")
    parser.add_argument("--run_dir", help="where metrics and checkpoints go; the same as --gin.RUN_DIR")
    parser.add_argument("--init_from", help="a model to start from: a run, a converted or Hugging Face folder")
    parser.add_argument("--export_on_finish", metavar="DIR", help="write the trained model there for Hugging Face")
    parser.add_argument(
        "--compilation_cache",
        metavar="DIR",
        help="where compiled programs are kept for the next start; "
        "by default JAX_COMPILATION_CACHE_DIR, else RUN_DIR/compilation_cache",
    )
    parser.add_argument(
        "--heartbeat_seconds",
        type=float,
        default=processes.HEARTBEAT_SECONDS,
        metavar="N",
        help="of several processes, one that is not heard of for so long is lost, and the others end (default: 60)",
    )
    flags, bindings = cli.parse(parser, argv)
    if not flags.gin_file:
        parser.error("--gin_file is needed, for example --gin_file=gin/runs/pretrain.gin")
    for name, value in (
        ("RUN_DIR", flags.run_dir),
        ("Run.init_from", flags.init_from),
        ("Run.export_on_finish", flags.export_on_finish),
    ):
        if value is not None:
            bindings.append(f"{name} = {value!r}")

    def body() -> int:
        processes.start(flags.heartbeat_seconds)
        with processes.together():
            from t5x_domain.training.compilation_cache import use_compilation_cache
            from t5x_domain.training.loop import train
            from t5x_domain.training.run import Run

            cli.load_gin(flags.gin_file, bindings, flags.gin_search_path)
            run = cli.build(Run)
            use_compilation_cache(flags.compilation_cache, run.run_dir)
            return train(run, began)

    cli.run("train", body)


if __name__ == "__main__":
    main()
