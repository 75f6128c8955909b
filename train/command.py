"""How the commands of this repository end: a user's mistake is one sentence on stderr, not a traceback."""

import sys
from collections.abc import Callable
from typing import Any

from transformers.utils import logging

from train.collate import TooManyBadPairsError

logger = logging.get_logger("train")

# What this project raises for what a user gives: arguments, files, packages that are missing, data that are broken.
MISTAKES = (ValueError, OSError, ImportError, TooManyBadPairsError)


def run_command(main: Callable[[], Any]) -> None:
    """
    Runs a command's `main`. A documented error is printed as its message, and the exit status is 1.

    With `TRANSFORMERS_VERBOSITY=debug` the traceback is printed before it.
    """
    try:
        main()
    except MISTAKES as error:
        logger.debug("where the error below was raised", exc_info=True)
        sys.exit(f"error: {error or type(error).__name__}")
    except KeyboardInterrupt:
        sys.exit(130)
