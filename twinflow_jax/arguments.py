"""What the verbs' command lines share. Imports nothing slow: `--help` answers at once."""

import argparse
import math
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath

from twinflow_jax import files
from twinflow_jax.errors import Parser, UserError

MOST = 10**6  # of what a command counts
SAMPLER = ("style", "stochastic", "gap", "warp", "extrapolation", "order")


def parser(verb: str, description: str) -> Parser:
    """The parser of a verb, which is called as `twinflow VERB` or `python -m twinflow_jax.VERB`."""
    called = pathlib.Path(sys.argv[0]).name == "twinflow"
    return Parser(
        prog=f"twinflow {verb}" if called else f"python -m twinflow_jax.{verb}",
        description=description,
    )


def add_sampler(parser: argparse.ArgumentParser) -> None:
    """Adds the sampler's settings; what is not given follows the recommendation."""
    group = parser.add_argument_group("sampler", "default: recommended for the number of steps")
    group.add_argument("--style", help="target time told to the network: few, any or mul")
    group.add_argument("--stochastic", type=_share, help="share of fresh noise in [0, 1], or SDE")
    group.add_argument("--gap", type=finite, nargs=2, metavar=("START", "END"),
                       help="part of the time axis left out at noise and at data")
    group.add_argument("--warp", type=finite, nargs=3, metavar=("A", "B", "C"),
                       help="Kumaraswamy warp of the time grid")
    group.add_argument("--extrapolation", type=finite, help="ratio against the step before")
    group.add_argument("--order", type=int,
                       help="1, or 2 with a corrector: two evaluations a step, one in the last")


def add_pipeline(parser: argparse._ActionsContainer, batch: bool = True) -> None:
    """Adds how pictures are drawn from prompts, beside the sampler's settings. batch: with how
    many at once."""
    parser.add_argument("--size", type=size,
                        help="pixels, like 1024 or 1328x800 (width x height)")
    if batch:
        parser.add_argument("--batch", type=whole, help="pictures denoised at once (default: the "
                            "least that uses all devices)")
    parser.add_argument(
        "--base", action="store_const", const=True,
        help="the base model's own sampling: many steps, its time grid and guidance",
    )
    parser.add_argument("--guidance", type=finite,
                        help="of --base, counted as the model's users do (default: its own)")
    parser.add_argument("--negative", help="negative prompt of --base (default: the model's own)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="of the computation (default: bfloat16, float32 on a CPU)")
    parser.add_argument("--tile", type=int, help="decode larger pictures in tiles of these pixels")
    parser.add_argument("--pipeline", type=files.path,
                        help="the imported checkpoint of a run (default: as it says)")
    parser.add_argument("--adapter", action="append", type=scaled, metavar="FILE[:SCALE]",
                        help="put adapters (LoRA) on: any tool's file, or an imported one; may be "
                        "given again, and they add up")


def sampler(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given, for `sampling.few_step`."""
    given = {name: getattr(args, name) for name in SAMPLER if getattr(args, name) is not None}
    if ("style" in given or "order" in given) and "stochastic" not in given:
        given["stochastic"] = None  # the default that goes with that style
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def overrides(rest: Sequence[str]) -> list[str]:
    """`["KEY=VALUE"]` of a command line's `--config.KEY=VALUE`.

    Raises:
      UserError: an argument is something else.
    """
    for flag in rest:
        if not flag.startswith("--config."):
            raise UserError(f"unknown argument {flag!r}; config keys are --config.KEY=VALUE")
    return [flag.removeprefix("--config.") for flag in rest]


def writable(flag: str, file: str | None) -> None:
    """Refuses a file that cannot be written, before there is something to write; None is none.

    Raises:
      UserError: it is a folder, or lies where nothing can be written; names the flag.
    """
    if file is None:
        return
    with files.writing(flag, file):
        if epath.Path(file).is_dir():
            raise UserError(f"{flag} {file} is a folder: choose a file")
    files.check_folder(flag, str(epath.Path(file).parent))


def refuse(args: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    """Raises UserError where one of these arguments was given."""
    flags = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    if flags:
        raise UserError(f"{', '.join(flags)} cannot be used: {reason}")


def evaluations(text: str) -> list[int]:
    """The numbers of `--steps 1,2,4`.

    Raises:
      UserError: there is something else.
    """
    try:
        return [whole(part) for part in text.split(",")]
    except UserError as error:
        raise UserError(f"--steps is {text!r}; give numbers like 1,2,4 ({error})") from error


def finite(text: str) -> float:
    """The number of an argument.

    Raises:
      UserError: it is none, infinite or NaN.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{text} is no finite number")
    return number


def whole(text: str) -> int:
    """How many of something an argument says.

    Raises:
      UserError: no whole number, or none from 1 to MOST.
    """
    number = int(text) if re.fullmatch(r"\+?\d{1,9}", text.strip()) else 0
    if not 1 <= number <= MOST:
        raise UserError(f"{text} is no whole number from 1 to {MOST:,}")
    return number


def scaled(text: str) -> tuple[str, float]:
    """The path and the factor, 1 where there is none, of "PATH:0.8".

    Raises:
      UserError: as `files.path` and `finite`.
    """
    path, _, factor = text.rpartition(":")
    if path and re.fullmatch(r"[-+.\d][-+.\deE]*", factor):
        return files.path(path), finite(factor)
    return files.path(text), 1.0


def size(text: str) -> tuple[int, int]:
    """`(width, height)` in pixels of "768x512", or of "512", a square.

    Raises:
      UserError: it is neither.
    """
    match = re.fullmatch(r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?", text.strip())
    if not match:
        raise UserError(
            f"{text!r} is no size; give pixels like 512 or 768x512 (width x height), up to 9999"
        )
    return int(match[1]), int(match[2] or match[1])


def _share(text: str) -> float | str:
    return "SDE" if text.upper() == "SDE" else finite(text)
