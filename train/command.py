"""How the commands of this repository end: a user's mistake is one sentence on stderr, not a traceback."""

import difflib
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.utils import logging

from train.collate import TooManyBadPairsError

logger = logging.get_logger("train")

# What this project raises for what a user gives: arguments, files, packages that are missing, data that are broken.
MISTAKES = (ValueError, OSError, ImportError, TooManyBadPairsError)

DTYPES = ("auto", "bfloat16", "float16", "float32")  # that --dtype takes


def run_command(main: Callable[[], Any]) -> None:
    """
    Runs a command's `main`. A documented error is printed as its message, and the exit status is 1.

    With `TRANSFORMERS_VERBOSITY=debug` the traceback is printed before it.
    """
    try:
        main()
    except MISTAKES as error:
        logger.debug("where the error below was raised", exc_info=True)
        sys.exit(f"error: {sentence(error)}")
    except KeyboardInterrupt:
        sys.exit(130)


def sentence(error: Exception) -> str:
    """An error's message; of the system's own about a file: its name, and what to do."""
    if isinstance(error, OSError) and error.filename is not None:
        if isinstance(error, FileNotFoundError):
            return f"{error.filename} does not exist: give the path of a file that does"
        if isinstance(error, FileExistsError | NotADirectoryError):
            return f"{error.filename}: a file lies where a folder is needed; give another folder"
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def require(extra: str, *packages: str) -> None:
    """
    Ends a command, before it imports them, where packages are missing that an extra installs.

    Args:
        extra: the one of `pyproject.toml` that has them all.
        packages: as they are imported.
    """
    absent = [package for package in packages if find_spec(package) is None]
    if absent:
        sys.exit(f"error: {' and '.join(absent)} must be installed for this: pip install -e '.[{extra}]'")


class Parser(HfArgumentParser):
    """transformers' parser of dataclasses, whose errors are a `ValueError` each."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists every argument")

    def known(self) -> set[str]:
        """The names of all arguments."""
        return {action.dest for action in self._actions}


def unknown(argument: str, known: Iterable[str], what: str | None = None) -> ValueError:
    """The error of an argument `--name`, `--name=value` or `name` that is none; `what` describes it, itself by default."""
    close = difflib.get_close_matches(argument.partition("=")[0].lstrip("-"), known, n=1)
    hint = f": did you mean {close[0]}?" if close else "; --help lists every argument"
    return ValueError(f"{what or argument} is not known{hint}")
