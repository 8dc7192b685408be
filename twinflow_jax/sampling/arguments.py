"""The sampler's settings as command-line arguments, the same for every verb."""

import argparse
from collections.abc import Sequence
from typing import Any

from twinflow_jax.errors import UserError
from twinflow_jax.sampling.grids import STYLES, Grid, few_step

NAMES = ("style", "stochastic", "gap", "warp", "extrapolation", "order")


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the settings; what is not given follows the recommendation for the step count."""
    group = parser.add_argument_group("sampler", "default: recommended for the number of steps")
    group.add_argument("--style", choices=STYLES, help="target time told to the network")
    group.add_argument("--stochastic", type=_share, help="share of fresh noise in [0, 1], or SDE")
    group.add_argument("--gap", type=float, nargs=2, metavar=("START", "END"),
                       help="part of the time axis left out at noise and at data")
    group.add_argument("--warp", type=float, nargs=3, metavar=("A", "B", "C"),
                       help="Kumaraswamy warp of the time grid")
    group.add_argument("--extrapolation", type=float, help="ratio against the step before")
    group.add_argument("--order", type=int, help="1, or 2 with a corrector")


def grid(args: argparse.Namespace, steps: int) -> Grid:
    """The grid that parsed arguments ask for."""
    named: dict[str, Any] = {n: getattr(args, n) for n in NAMES if getattr(args, n) is not None}
    if ("style" in named or "order" in named) and "stochastic" not in named:
        named["stochastic"] = None  # the default that goes with that style
    return few_step(steps, **{k: tuple(v) if isinstance(v, list) else v for k, v in named.items()})


def refuse(args: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    """Raises UserError where one of these arguments was given."""
    flags = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    if flags:
        raise UserError(f"{', '.join(flags)} cannot be used: {reason}")


def _share(text: str) -> float | str:
    if text.upper() == "SDE":
        return "SDE"
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no share in [0, 1] and not SDE") from error
