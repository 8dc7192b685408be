"""Time grids of the any-step sampler: float64 NumPy on the host, fixed before anything runs.

A Grid holds, per step, the time where the network is evaluated, the target time r that it is
told, the time that the step goes to, and the share of fresh noise mixed in. It is hashable, so
that a compiled sampler is specialised to it.
"""

import dataclasses
import math
import warnings
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from twinflow_jax.errors import UserError

STYLES = ("few", "any", "mul")
Number = float | np.generic  # NumPy's of any width
MOST_STEPS = 1000  # each picture says the time of every one


@dataclasses.dataclass(frozen=True)
class Grid:
    """times: (n + 1,), of the real trajectory 1 -> 0, of the fake one -1 -> -0.

    stochastic: (n,), the share of fresh noise in each step, 0 for a deterministic one.
    style: which target time the network is told, "few" 0, "any" the next time, "mul" the same
    time. extrapolation: ratio against the step before. order: 1, or 2 for a corrector.
    """

    times: tuple[float, ...]
    stochastic: tuple[float, ...]
    style: str = "few"
    extrapolation: float = 0.0
    order: int = 1

    def told(self) -> dict[str, Any]:
        """What a picture says of its sampler."""
        return {"nfe": self.nfe} | dataclasses.asdict(self)

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def nfe(self) -> int:
        """Network evaluations: one a step, and one more for each corrected step (not the last)."""
        return self.steps if self.order == 1 else 2 * self.steps - 1

    def target(self, i: int) -> float:
        """The time r that the network is told at times[i]."""
        return {"few": 0.0, "any": self.times[min(i + 1, self.steps)], "mul": self.times[i]}[
            self.style
        ]


def check_steps(steps: int) -> None:
    """Raises UserError for a number of steps that sampling does not take."""
    if not 1 <= steps <= MOST_STEPS:
        raise UserError(f"steps is {steps}; sampling takes at least 1 and at most {MOST_STEPS}")


def few_step(steps: int, **overrides: Any) -> Grid:
    """The recommended grid for a trained one- to few-step generator (see RECOMMENDED)."""
    return make_grid(steps, **recommended(steps) | overrides)


RECOMMENDED = {
    1: {"style": "few", "stochastic": 0.0, "gap": (0.0, 0.0)},
    2: {"style": "few", "stochastic": 1.0, "gap": (0.001, 0.6)},
    4: {"style": "few", "stochastic": 1.0, "gap": (0.001, 0.5)},
    8: {"style": "any", "stochastic": 0.0, "gap": (0.001, 0.5)},
    30: {"style": "mul", "stochastic": 0.0, "gap": (0.001, 0.0), "warp": (1.17, 0.8, 1.1)},
}


def recommended(steps: int) -> dict[str, Any]:
    """The authors' settings for a number of steps: those of the next larger entry."""
    return dict(RECOMMENDED[next((n for n in RECOMMENDED if steps <= n), 30)])


def kumaraswamy(
    u: Float[np.ndarray, "steps"], a: Number, b: Number, c: Number
) -> Float[np.ndarray, "steps"]:
    """`(1 - (1 - u^a)^b)^c`: moves grid points where a trajectory bends; (1, 1, 1) is identity."""
    return (1 - (1 - u**a) ** b) ** c


def make_grid(
    steps: int, style: str = "few", stochastic: float | str | None = None,
    gap: tuple[float, float] = (0.0, 0.0), warp: tuple[float, float, float] = (1.0, 1.0, 1.0),
    extrapolation: float = 0.0, order: int = 1, fake: bool = False, dtype: str = "float64",
    released_sde: bool = False,
) -> Grid:
    """The grid of UCGM-S (`sampling_loop` of the released code).

    With n = steps (order 1) or (steps + 1) // 2 (order 2): n points from gap[0] to 1 - gap[1],
    warped by Kumaraswamy's (a, b, c), read as distances from noise, then 0. A gap end of 0
    takes n + 1 points and drops the last, which would be a step of no length.

    stochastic: share of fresh noise, in [0, 1], or "SDE" for
        `min((sqrt|dt| sqrt(2 t) / t_next)^2, 1)` of each step. Default: 1 for the few style with
        several steps, where it is needed, otherwise 0.
    fake: the fake trajectory: the same times with the sign changed (paper figure 12 uses the
        mul style).
    dtype: "bfloat16" reproduces the released grid, which takes the dtype of the noise.
    released_sde: the released code computes the SDE share at step 0 and keeps it.
    Raises:
      UserError: a value outside its range, or order 2 with fresh noise, which its corrector
        cannot follow (the released code ignores the noise there).
    Warns: few-style sampling in several steps without noise, which gets worse with every step;
      order 2 with another style than mul, whose jumps are not velocities to be averaged, and with
      a number of steps that its pairs of evaluations and the last, single one do not add up to.
    """
    check_steps(steps)
    if style not in STYLES:
        raise UserError(f"style is {style!r}; choose from {', '.join(STYLES)}")
    if order not in (1, 2):
        raise UserError(f"order is {order}; choose 1 or 2")
    if not all(0 <= g < 1 for g in gap) or sum(gap) >= 1:
        raise UserError(
            f"gap is {tuple(gap)}; both ends lie in [0, 1) and leave something between them"
        )
    if len(warp) != 3 or not all(0 < w < math.inf for w in warp):
        raise UserError(f"warp is {tuple(warp)}; give three numbers (a, b, c) above 0")
    if not math.isfinite(extrapolation):
        raise UserError(f"extrapolation is {extrapolation}; give a ratio, 0 for none")
    if stochastic is None:
        stochastic = 1.0 if style == "few" and steps > 1 and order == 1 else 0.0
    if stochastic != "SDE" and not (
        isinstance(stochastic, int | float) and 0 <= stochastic <= 1
    ):
        raise UserError(f"stochastic is {stochastic!r}; give a share in [0, 1] or 'SDE'")
    if order == 2 and stochastic != 0:
        raise UserError(
            f"stochastic is {stochastic} with order 2, whose corrector follows a deterministic "
            "trajectory: set stochastic to 0, or order to 1"
        )

    n = steps if order == 1 else (steps + 1) // 2
    float_type = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    one = float_type.type(1)
    points = n + 1 if gap[1] == 0 else n
    u = np.linspace(gap[0], 1 - gap[1], points).astype(float_type)
    u = u[:n]
    if tuple(warp) != (1.0, 1.0, 1.0):
        u = kumaraswamy(u, *(float_type.type(w) for w in warp))
    times = np.append((one - u).astype(np.float64), 0.0)

    if stochastic == "SDE":
        now, then = times[:-1], times[1:]
        with np.errstate(divide="ignore"):
            shares = np.clip(np.abs(then - now) * 2 * now / then**2, 0, 1)
        if released_sde:
            shares = np.full_like(shares, shares[0])
    else:
        shares = np.full(n, float(stochastic))
    shares[-1] = 0.0  # the last step ends at data, where noise has no weight
    if style == "few" and n > 1 and stochastic == 0 and order == 1:
        warnings.warn(
            f"few-style sampling in {n} steps without fresh noise gets worse with every step: "
            "use stochastic 1, or style 'any'",
            stacklevel=2,
        )
    if order == 2 and style != "mul" and n > 1:
        warnings.warn(
            f"order 2 averages instantaneous velocities; with style {style!r}, which predicts "
            "jumps, it makes samples worse: use style 'mul', or order 1",
            stacklevel=2,
        )
    if order == 2 and steps % 2 == 0:
        warnings.warn(
            f"order 2 evaluates twice a step and once in the last: of {steps} evaluations it takes "
            f"{steps - 1}; give an odd number",
            stacklevel=2,
        )
    if fake:
        times = -times
    return Grid(tuple(times.tolist()), tuple(shares.tolist()), style, extrapolation, order)
