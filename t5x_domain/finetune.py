"""`python -m t5x_domain.finetune --gin_file=… --init_from=… --out_dir=…`: fine-tunes a model on a labelled task."""

from collections.abc import Sequence

from t5x_domain import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, then builds the fine-tuning that gin describes and carries it out."""
    parser = cli.parser("finetune")
    parser.add_argument("--init_from", help="the model to start from: a run, a converted or Hugging Face folder")
    parser.add_argument("--out_dir", help="where predictions, scores and models go; the same command goes on there")
    parser.add_argument("--seeds", help="numbers with commas between them, e.g. 0,1,2: one fine-tuning for each")
    flags, bindings = cli.parse(parser, argv)
    if not flags.gin_file:
        parser.error("--gin_file is needed, for example --gin_file=gin/runs/finetune.gin")
    for name, value in (("FineTuning.init_from", flags.init_from), ("FineTuning.out_dir", flags.out_dir)):
        if value is not None:
            bindings.append(f"{name} = {value!r}")
    if flags.seeds is not None:
        try:
            bindings.append(f"FineTuning.seeds = {[int(seed) for seed in flags.seeds.split(',')]}")
        except ValueError:
            parser.error(f"--seeds={flags.seeds}: write numbers with commas between them, e.g. 0,1,2")

    def body() -> int:
        # Known before the gin file is read, hence imported first.
        from t5x_domain.adaptation.finetune_config import FineTuning
        from t5x_domain.adaptation.finetuning import finetune

        cli.load_gin(flags.gin_file, bindings, flags.gin_search_path)
        return finetune(cli.build(FineTuning))

    cli.run("finetune", body)


if __name__ == "__main__":
    main()
