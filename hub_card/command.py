"""How the commands of this folder end."""

import sys
from collections.abc import Callable


def command(main: Callable[[], object]) -> None:
    """Runs a command; a user's mistake ends it by one sentence and status 1, in place of a traceback."""
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
