"""The one exception that a user's mistake raises, and how a verb reports it."""

import argparse
import contextlib
import glob
import os
import pathlib
import re
import signal
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from typing import NoReturn


class UserError(ValueError, argparse.ArgumentTypeError):
    """Something that the user can put right: one line saying what, where, and what to do.

    The second base lets argparse tell it as it is, where an argument's type raises it. status: that
    a verb exits with.
    """

    status = 2


@contextlib.contextmanager
def noted(problems: list[str]) -> Iterator[None]:
    """Adds a mistake that is found inside to others, for `tell`."""
    try:
        yield
    except UserError as error:
        problems.append(str(error))


def tell(problems: list[str]) -> None:
    """Raises UserError of them all, where there are any."""
    if problems:
        raise UserError("; ".join(problems))


def few(problems: list[str], most: int = 3) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


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


class Terminated(KeyboardInterrupt):
    """SIGTERM, after which everything is left as after Ctrl-C."""


def _stop(number: int, frame: types.FrameType | None) -> None:
    """Raises what ends a verb. While a module is imported it ends here: modules that were imported
    by half crash, or swallow what is raised."""
    error = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
    files = [outer.f_code.co_filename for outer, _ in traceback.walk_stack(frame)]
    if "<frozen importlib._bootstrap>" in files:
        end(report(error))
    raise error


def _number(error: KeyboardInterrupt) -> int:
    """Of the signal that an interrupt stands for."""
    return signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT


def _unraisable(lost) -> None:
    """Sends an interrupt again that came in a destructor or a callback of the garbage collector,
    where Python drops what is raised."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    to = threading.main_thread().ident, _number(lost.exc_value)
    again = threading.Timer(0.05, signal.pthread_kill, to)
    again.daemon = True
    again.start()


def run_verb(main: Callable[[], int | None]) -> None:
    """Runs a verb's `main` and exits with its status.

    A `UserError` becomes one line on stderr and status 2, Ctrl-C status 130, SIGTERM 143; every
    other exception is a bug and keeps its traceback. `main` returns the exit status (None means 0).
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as of a shell's background jobs
            signal.signal(number, _stop)
    hook, sys.unraisablehook = sys.unraisablehook, _unraisable
    try:
        with warnings.catch_warnings():
            warnings.showwarning = one_line
            insist_on_tpus()
            status = main()
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        end(report(error))
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
    sys.exit(status)


def insist_on_tpus() -> None:
    """Has JAX use the TPUs of this machine, where nobody says otherwise, or say why it cannot: by
    itself it takes the CPU where libtpu is not there."""
    vendors = map(pathlib.Path, glob.glob("/sys/bus/pci/devices/*/vendor"))
    if "JAX_PLATFORMS" in os.environ or all("0x1ae0" not in file.read_text() for file in vendors):
        return
    import jax  # slow, and needed on Google's machines only
    from jax._src import hardware_utils

    if hardware_utils.num_available_tpu_chips_and_device_id()[0]:  # no network cards
        jax.config.update("jax_platforms", "tpu,cpu")


def report(error: BaseException) -> int:
    """Says on stderr what ended a verb; returns the exit status."""
    error = explained(error)
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return error.status
    if isinstance(error, KeyboardInterrupt):
        number = _number(error)
        what = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}[number]
        print(f"{what}; {error}" if str(error) else what, file=sys.stderr)
        return 128 + number
    if isinstance(error, BrokenPipeError):  # whoever read what is printed has enough, as `head`
        return 128 + signal.SIGPIPE
    traceback.print_exception(error)
    return 1


def end(status: int) -> NoReturn:
    """Ends this process at once, whatever its threads do: a save that failed leaves some of orbax's
    that never end, and XLA's crash when the interpreter goes while they compile."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(status)


PACKAGES = {  # by the backend that they bring
    **dict.fromkeys(("cuda", "gpu"), "pip install 'jax[cuda13]' beside an NVIDIA GPU's driver"),
    "tpu": "in a virtual environment of a TPU machine pip install -e '.[pod]' -c constraints.txt",
}


def explained(error: BaseException) -> BaseException:
    """A UserError in place of what JAX raises where a backend is not there or does not start, what
    a bucket answers, and epath where gs:// lacks a package."""
    if isinstance(error, ImportError) and "gcsfs" in str(error):
        return UserError("gs:// takes more packages: pip install -e '.[gcs]' -c constraints.txt")
    from twinflow_jax import buckets  # which has errors of its own

    if answered := buckets.explained(error):
        return answered
    if not isinstance(error, RuntimeError | AssertionError) or "jax" not in sys.modules:
        return error
    import jax

    asked = jax.config.jax_platforms
    try:
        jax.devices()
        return error
    except (RuntimeError, AssertionError) as failure:
        says = r"Unable to initialize backend '(\w+)': (.*?)(?: \((?:set|you may) |$)"
        found = re.match(says, str(failure), re.DOTALL)
        name, why = found.groups() if found else (asked, "no such device is to be seen")
    jax.config.update("jax_platforms", "" if asked else "cpu")
    try:
        there = ", ".join({device.platform: None for device in jax.devices()})
    except Exception:  # another does not start either
        there = "cpu"
    ways = [PACKAGES[key] for key in PACKAGES if key in (name, asked)]
    return UserError(
        f"JAX's backend {name} does not start ({reason(ValueError(why))}); JAX_PLATFORMS is "
        f"{asked!r}, and there is {there}: " + "; or ".join([*ways, f"set JAX_PLATFORMS={there}"])
    )
