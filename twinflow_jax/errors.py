"""The one exception that a user's mistake raises, and how a verb reports it."""

import argparse
import sys
import traceback
import warnings
from collections.abc import Callable


class UserError(ValueError, argparse.ArgumentTypeError):
    """Something that the user can put right: one line saying what, where, and what to do.

    The second base lets argparse tell it as it is, where an argument's type raises it.
    """


class TextCut(UserWarning):
    """A text is longer than a network takes: its end is left out."""


class Parser(argparse.ArgumentParser):
    """Of a verb's arguments: no abbreviations, help as it was written, mistakes in one line."""

    def __init__(self, **options):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **options)

    def error(self, message: str):
        raise UserError(f"{message} ({self.prog} --help)")


def reason(error: BaseException, length: int = 300) -> str:
    """What an exception says, on one line of at most so many characters; its kind, if nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[: length - 3] + "..."


def one_line(message: Warning | str, *_, **__) -> None:
    """Shows a warning to somebody who does not read our source."""
    print(f"warning: {message}", file=sys.stderr)


def run_verb(main: Callable[[], int | None]) -> None:
    """Runs a verb's `main` and exits with its status.

    A `UserError` becomes one line on stderr and status 2, Ctrl-C status 130; every other
    exception is a bug and keeps its traceback. `main` returns the exit status (None means 0).
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = one_line
            status = main()
    except (UserError, KeyboardInterrupt) as error:
        status = report(error)
    sys.exit(status)


def report(error: BaseException) -> int:
    """Says on stderr what ended a verb; returns the exit status."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    traceback.print_exception(error)
    return 1
