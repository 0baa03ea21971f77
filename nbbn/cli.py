"""The way in from the command line, for `nbbn` and `python -m nbbn` alike.

Nothing is imported at the top that nbbn itself does not need: a missing extra is told in one line.
"""

import sys
from collections.abc import Sequence

NOT_STARTED = 2
"""The exit status of a command line that cannot be carried out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command and its options; by default the process's own. Help is shown when there are none.

    Returns
    -------
    int
        0 if all went well, 1 if the command found something wrong, 2 if it could not be started.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        if given == ["info"]:  # what one asks first where something is missing, so it needs no extra
            from nbbn.info import tell

            return tell()
        from nbbn.commands import invoke

        outcome = invoke(given)
        return refuse(outcome) if isinstance(outcome, str) else outcome
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("nbbn"):
            raise
        extra = "bench" if given[:1] == ["bench"] else "demo"
        return refuse(
            f"this command needs {error.name}, which is not installed; it comes with nbbn's extra {extra!r}: "
            f'pip install ".[{extra}]" where nbbn\'s sources are'
        )


def refuse(reason: str) -> int:
    """Print one line to stderr and return the exit status of a command that was not started."""
    print("nbbn:", " ".join(reason.split()), file=sys.stderr)
    return NOT_STARTED
