"""`python -m t5x_domain.infer --model=DIR --input=FILE.jsonl --output=FILE.jsonl`: what a model writes for inputs."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from t5x_domain import cli
from t5x_domain.errors import UserError

if TYPE_CHECKING:
    from t5x_domain.inference.opened import Opened
    from t5x_domain.inference.records import Request

_BATCHES_A_SAVE = 8


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, then answers a file or a user."""
    parser = cli.parser("infer")
    parser.add_argument("--model", required=True, metavar="DIR", help="a run, or a folder of a model in any format")
    parser.add_argument("--input", metavar="FILE", help="JSON lines (.gz and .zst welcome)")
    parser.add_argument(
        "--text_field",
        metavar="NAME",
        help="its field that the model reads (default: of a fine-tuned model what its task reads, else text)",
    )
    parser.add_argument("--seqio_task", metavar="NAME", help="a registered SeqIO task instead of --input")
    parser.add_argument("--seqio_module", metavar="MODULE", help="module that registers it")
    parser.add_argument("--split", metavar="NAME", help="its split (default: test)")
    parser.add_argument("--output", metavar="FILE", help="JSON lines; the same command goes on after an interruption")
    parser.add_argument("--interactive", action="store_true", help="read texts from the terminal; ___ is a blank")
    parser.add_argument("--choices", metavar="A|B|C", help="choose among these answers by their probability")
    parser.add_argument("--embed", action="store_true", help="write a unit vector for each text")
    parser.add_argument("--mode", metavar="TOKEN", help="mode token before every input, e.g. '[S2S]'")
    parser.add_argument("--metadata", metavar="TEMPLATE", help=r"before every input, e.g. 'Source: {source}\n\n'")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="inputs at once (default: 8)")
    flags, bindings = cli.parse(parser, argv)
    cli.run("infer", lambda: _infer(flags, bindings))


def _infer(flags: argparse.Namespace, bindings: Sequence[str]) -> None:
    _require_one_source(flags)
    cli.quiet_libraries()
    cli.load_gin(flags.gin_file, bindings, flags.gin_search_path)
    from t5x_domain.inference.conditions import Conditions
    from t5x_domain.inference.decoding import Decoding
    from t5x_domain.inference.generator import Generator
    from t5x_domain.inference.opened import open_model

    decoding = cli.build(Decoding)
    if flags.choices is not None and len(set(flags.choices.split("|"))) < 2:
        raise UserError(f"--choices={flags.choices}: give at least two different answers with | between.")
    reads_plain_texts = _reads_plain_texts(flags)
    # Not `!= Decoding()`, which gin would configure as well.
    changed = [field.name for field in dataclasses.fields(decoding) if getattr(decoding, field.name) != field.default]
    if changed and (reads_plain_texts or flags.choices):
        raise UserError(f"Decoding.{changed[0]} is set, but nothing is written here; leave it out.")
    if reads_plain_texts:
        model, answer = _embedder(flags) if flags.embed else _predictor(flags)
        _answer_file(flags, model, answer, decoding)
        return
    model = open_model(flags.model)
    # A shell gives "\n" as two characters.
    template = None if flags.metadata is None else flags.metadata.replace("\\n", "\n")
    conditions = Conditions(model.vocabulary, mode=flags.mode, template=template)
    if not flags.interactive:
        answer = _chooser(flags, model) if flags.choices else _writer(flags, model, decoding)
        read = lambda request: model.inputs(request.text, conditions.prefix(request.fields))  # noqa: E731
        _answer_file(flags, model, lambda asked, first: answer([read(request) for request in asked], first), decoding)
        return
    from t5x_domain.inference.interactive import HELP, converse

    if template is not None:
        raise UserError("--metadata is for records with fields; leave it out of --interactive.")
    print(HELP)
    generator = Generator(model, decoding, batch_size=1)
    converse(model, generator, conditions.prefix({}), _typed(), lambda text: print(text, flush=True))


def _require_one_source(flags: argparse.Namespace) -> None:
    sources = [name for name in ("input", "seqio_task", "interactive") if getattr(flags, name)]
    if len(sources) != 1:
        raise UserError("give one of --input=FILE, --seqio_task=NAME and --interactive.")
    if flags.interactive and (flags.output or flags.choices):
        raise UserError("--interactive prints its answers; leave out --output and --choices.")
    if not flags.interactive and not flags.output:
        raise UserError("--output=FILE is missing: where are the answers to go?")
    for flag, user in {"text_field": "input", "seqio_module": "seqio_task", "split": "seqio_task"}.items():
        if getattr(flags, flag) is not None and not getattr(flags, user):
            raise UserError(f"--{flag} has no effect without --{user}; add that or leave it out.")


def _reads_plain_texts(flags: argparse.Namespace) -> bool:
    """Whether texts are embedded or answered by a head: nothing is written, and nothing stands before them."""
    from t5x_domain.inference.heads import HEAD_FILE, has_head

    if not (flags.embed or has_head(flags.model)):
        return False
    why = "--embed" if flags.embed else f"a model with {HEAD_FILE}, which answers with its head"
    for flag in ("interactive", "choices", "mode", "metadata"):
        if getattr(flags, flag):
            raise UserError(f"--{flag} does not go with {why}; leave it out.")
    return True


def _answer_file(
    flags: argparse.Namespace,
    model: "Opened",
    answer: "Callable[[list[Request], int], list[dict[str, Any]]]",
    decoding: Any,
) -> None:
    """Writes what `answer` says to requests and the number of the first of them."""
    import itertools

    from tqdm import tqdm

    from t5x_domain.conversion.formats import state_of
    from t5x_domain.inference.records import Answers, fingerprint

    requests = list(_requests(flags, model))
    asked = {
        "model": state_of(flags.model, "--model"),
        "input": fingerprint(requests),
        "mode": flags.mode,
        "metadata": flags.metadata,
        "choices": flags.choices,
        "embed": flags.embed,
        "decoding": repr(decoding),
    }
    answers = Answers(flags.output, asked)
    if answers.done:
        print(f"{answers.done:,} of {len(requests):,} are answered already; going on")
    left = enumerate(requests[answers.done :], answers.done)
    with tqdm(total=len(requests), initial=answers.done, unit="input", file=sys.stderr) as bar:
        while chunk := list(itertools.islice(left, flags.batch_size * _BATCHES_A_SAVE)):
            found = answer([request for _, request in chunk], chunk[0][0])
            answers.add({**request.fields, **said} for (_, request), said in zip(chunk, found, strict=True))
            bar.update(len(chunk))
    answers.finish()
    print(f"{flags.output}: {len(requests):,} answers")


def _requests(flags: argparse.Namespace, model: "Opened") -> "Iterable[Request]":
    from t5x_domain.inference.records import Request, read_requests

    if flags.input:
        learnt = model.facts.get("input_template", "{text}")
        if not flags.text_field and learnt != "{text}":
            print(f"inputs are made as in fine-tuning: {learnt!r}; --text_field=NAME takes those of a field")
        return read_requests(flags.input, f"{{{flags.text_field}}}" if flags.text_field else learnt)
    from t5x_domain.data.labelled import SeqioTask

    task = SeqioTask(flags.seqio_task, flags.seqio_module)
    examples = task.examples(flags.split or "test")
    return (Request(e.inputs, {"id": e.id, "inputs": e.inputs, "target": e.target}) for e in examples)


def _writer(flags: argparse.Namespace, model: "Opened", decoding: Any) -> Any:
    from t5x_domain.inference.generator import Generator

    generator = Generator(model, decoding, batch_size=flags.batch_size)

    def answer(inputs: list, first: int) -> list[dict[str, Any]]:
        found = generator(inputs, first=first)
        return [{"outputs": [{"text": o.text, "score": o.score} for o in outputs]} for outputs in found]

    return answer


def _chooser(flags: argparse.Namespace, model: "Opened") -> Any:
    from t5x_domain.inference.scoring import Scorer

    scorer, choices = Scorer(model, batch_size=flags.batch_size), flags.choices.split("|")

    def answer(inputs: list, first: int) -> list[dict[str, Any]]:
        del first
        scores = scorer.choose(inputs, choices)
        return [
            {"choice": choices[int(row.argmax())], "scores": dict(zip(choices, row.tolist(), strict=True))}
            for row in scores
        ]

    return answer


def _predictor(flags: argparse.Namespace) -> "tuple[Opened, Any]":
    from t5x_domain.inference.heads import Predictor, open_head

    headed = open_head(flags.model)
    predict = Predictor(headed, batch_size=flags.batch_size)

    def answer(requests: "list[Request]", first: int) -> list[dict[str, Any]]:
        del first
        return [{"prediction": prediction} for prediction in predict([request.text for request in requests])]

    return headed.model, answer


def _embedder(flags: argparse.Namespace) -> "tuple[Opened, Any]":
    from t5x_domain.inference.embedding import Embedder
    from t5x_domain.inference.heads import has_head, open_head
    from t5x_domain.inference.opened import open_model

    model = open_head(flags.model).model if has_head(flags.model) else open_model(flags.model)
    embed = Embedder(model, batch_size=flags.batch_size)

    def answer(requests: "list[Request]", first: int) -> list[dict[str, Any]]:
        del first
        return [{"embedding": vector.tolist()} for vector in embed([request.text for request in requests])]

    return model, answer


def _typed() -> Iterable[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


if __name__ == "__main__":
    main()
