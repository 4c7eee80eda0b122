"""Command line shared by every verb: gin files, gin bindings, and errors a user can read.

Only the standard library is imported here, and in what is imported, so that `--help` and flag errors answer at once.
"""

import argparse
import importlib
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from t5x_domain.errors import StorageError, UserError
from t5x_domain.parallel.processes import require_one

VERBS = {
    "prepare": "train a vocabulary and tokenise corpora into the token cache",
    "compile": "what a run needs of machines that are not there: memory, networks, time, cost",
    "train": "train a model from a prepared token cache",
    "evaluate": "perplexity of a run's held-out text by corpus and metadata, or a model's scores on tasks",
    "infer": "what a model writes for inputs, or which answer it chooses",
    "finetune": "fine-tune a model on a labelled task, over several seeds",
    "compare": "a domain model against its base: verdict.json and report.html",
    "convert": "take a model from Hugging Face or T5X, or to Hugging Face",
    "demo": "prepare, train and evaluate on the shipped sample",
}
_PACKAGE = Path(__file__).parent


def gin_search_paths() -> list[str]:
    """Where a relative gin file or data file is looked for: the working directory, then beside the package."""
    installed = [_PACKAGE, _PACKAGE.parent]  # installed: t5x_domain/gin/…; in a checkout: gin/… beside t5x_domain/
    return [str(Path.cwd()), *(str(root) for root in installed)] + [
        str(root / "gin") for root in [Path.cwd(), *installed]
    ]


def parser(verb: str) -> argparse.ArgumentParser:
    """The flags every verb takes. A verb may add its own before calling `parse`."""
    result = argparse.ArgumentParser(
        prog=f"t5x-domain {verb}",
        description=VERBS[verb],
        epilog="Any gin binding or macro can be set with --gin.NAME=VALUE, e.g. --gin.TRAIN_STEPS=200.",
        allow_abbrev=False,
    )
    result.add_argument("--gin_file", action="append", default=[], metavar="FILE", help="gin file; repeat to combine")
    result.add_argument("--gin_search_path", action="append", default=[], metavar="DIR", help="more folders to look in")
    return result


def parse(
    arguments: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Splits `argv` into ordinary flags and gin bindings (`--gin.NAME=VALUE` -> `NAME = VALUE`)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    bindings = []
    for flag in [a for a in argv if a.startswith("--gin.")]:
        name, separator, value = flag.removeprefix("--gin.").partition("=")
        if not separator:
            arguments.error(f"{flag}: a gin binding is written --gin.NAME=VALUE")
        bindings.append(f"{name} = {value}")
    return arguments.parse_args([a for a in argv if not a.startswith("--gin.")]), bindings


def show_messages() -> None:
    """What the library's own loggers say goes to stderr, a line each."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("t5x_domain").setLevel(logging.INFO)


def quiet_libraries() -> None:
    """Keeps back what Orbax logs: its warnings are of no concern to a user, its errors are raised as well."""
    import absl.logging

    absl.logging.set_verbosity(absl.logging.FATAL)


def load_gin(files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str] = ()) -> None:
    """Parses gin files and bindings.

    Raises:
      UserError: a file is not found, does not parse, or names something that does not exist.
    """
    import gin

    from t5x_domain import configurables  # noqa: F401  so that every name a gin file may use is known

    quiet_libraries()
    logging.disable(logging.ERROR)  # gin calls every place in which it has looked in vain an error
    gin.clear_config()
    for path in [*search_paths, *gin_search_paths()]:
        gin.add_config_file_search_path(path)
    try:
        gin.parse_config_files_and_bindings(list(files), list(bindings), finalize_config=False)
    except OSError as error:
        raise UserError(
            f"gin file not found: {error}. Looked in {', '.join(dict.fromkeys([*search_paths, *gin_search_paths()]))}; "
            "add a folder with --gin_search_path=DIR."
        ) from error
    except (ValueError, SyntaxError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise UserError(
            f"gin: {' '.join(str(error).split())} Check the name, and the value (text stands in quotes), in --gin_file "
            "or --gin.NAME=VALUE."
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def build(configurable: Callable[[], Any]) -> Any:
    """Calls a gin-configured class or function whose arguments all come from gin.

    Raises:
      UserError: an argument is missing, not bound, or refused.
    """
    try:
        return configurable()
    except UserError as error:
        raise UserError(_first_line(error)) from error
    except (TypeError, ValueError, RuntimeError) as error:
        if unset := re.search(r"In call to configurable 'macro' .*in scope '(\w+)'", str(error)):
            raise UserError(
                f"{unset[1]} is not set; bind it in a --gin_file or with --gin.{unset[1]}=VALUE."
            ) from error
        raise UserError(f"gin: {_first_line(error)} Bind it in a --gin_file or with --gin.NAME=VALUE.") from error


def _first_line(error: Exception) -> str:
    """An error's own words, without the trail of configurables that gin appends."""
    return " ".join(str(error).split("\n  In call to configurable")[0].split())


def run(verb: str, body: Callable[[], int | None]) -> None:
    """Calls `body`; a `UserError` becomes a line on stderr and exit status 2, a `StorageError` a line and status 1."""
    show_messages()
    try:
        if verb != "train":
            require_one(verb)
        status = body()
    except UserError as error:
        print(f"t5x-domain {verb}: error: {_first_line(error)}", file=sys.stderr)
        sys.exit(2)
    except StorageError as error:
        print(f"t5x-domain {verb}: error: {_first_line(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"t5x-domain {verb}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(status or 0)


def main() -> None:
    """`t5x-domain VERB …` is the same call as `python -m t5x_domain.VERB …`."""
    arguments = argparse.ArgumentParser(
        prog="t5x-domain",
        description="Pretrain and adapt transformers to a domain.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {verb:10} {text}" for verb, text in VERBS.items())
        + "\n\n`t5x-domain VERB --help` shows the flags.",
    )
    arguments.add_argument("verb", choices=VERBS, metavar="VERB", help="one of: " + ", ".join(VERBS))
    verb = arguments.parse_args(sys.argv[1:2]).verb
    importlib.import_module(f"t5x_domain.{verb}").main(sys.argv[2:])
