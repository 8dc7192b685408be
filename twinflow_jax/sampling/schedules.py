"""How base models were published to be sampled: times in float64 NumPy, from 1 down to 0."""

import dataclasses
from functools import partial
from typing import Any

import numpy as np

from twinflow_jax.errors import UserError
from twinflow_jax.sampling.grids import check_steps


@dataclasses.dataclass(frozen=True)
class Schedule:
    """times: (n + 1,). told: (n,), what the network is given at times[:-1].

    solver: "euler", or "dpm" for DPM-Solver++(2M).
    """

    times: tuple[float, ...]
    told: tuple[float, ...]
    solver: str


# Of a scheduler_config.json: the values that we compute; the numbers we read; and what the
# published class assumes where a config leaves a key out and that is neither.
EULER = {
    "num_train_timesteps": 1000, "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False, "stochastic_sampling": False, "invert_sigmas": False,
}
STATIC = EULER | {"use_dynamic_shifting": False, "shift_terminal": None}
STATIC_NUMBERS = {"shift": 1.0}
DYNAMIC = EULER | {"use_dynamic_shifting": True, "time_shift_type": "exponential"}
DYNAMIC_NUMBERS = {
    "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15,
    "shift_terminal": None,
}
DPM = {
    "num_train_timesteps": 1000, "algorithm_type": "dpmsolver++", "solver_order": 2,
    "solver_type": "midpoint", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
    "final_sigmas_type": "zero", "thresholding": False, "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False,
    "use_dynamic_shifting": False,
}
DPM_NUMBERS = {"flow_shift": 1.0}
DPM_ASSUMED = {"prediction_type": "epsilon", "use_flow_sigmas": False}
CLASSES = ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler")


def static_shift(steps: int, shift: float = 3.0, twice: bool = False) -> Schedule:
    """More time near noise (FlowMatchEulerDiscreteScheduler): `t' = shift t / (1 + (shift - 1) t)`.

    Of t equally spaced from 1 to 0; or, twice, from 1 to what the shift makes of 1/1000, with 0
    after it: what the published class does where its pipeline leaves the times to it.
    """
    shifted = lambda t: shift * t / (1 + (shift - 1) * t)
    if twice:
        t = [*shifted(np.linspace(1.0, shifted(0.001), steps)).tolist(), 0.0]
    else:
        t = shifted(np.linspace(1.0, 0.0, steps + 1)).tolist()
    return Schedule(tuple(t), tuple(t[:-1]), "euler")


def dynamic_shift(
    steps: int, tokens: int, base_tokens: int = 256, max_tokens: int = 8192,
    base_shift: float = 0.5, max_shift: float = 0.9, terminal: float | None = 0.02,
) -> Schedule:
    """More time near noise the larger the image (FlowMatchEulerDiscreteScheduler, exponential).

    `t' = e^mu / (e^mu + 1/t - 1)` of t equally spaced from 1 to 1/steps, where mu grows from
    base_shift at base_tokens to max_shift at max_tokens; then stretched so that the last time
    before 0 is `terminal`.
    """
    mu = base_shift + (tokens - base_tokens) * (max_shift - base_shift) / (max_tokens - base_tokens)
    t = np.linspace(1.0, 1.0 / steps, steps)
    t = np.exp(mu) / (np.exp(mu) + 1 / t - 1)
    if terminal and steps > 1:
        t = 1 - (1 - t) * (1 - terminal) / (1 - t[-1])
    return Schedule((*t.tolist(), 0.0), tuple(t.tolist()), "euler")


def flow_shift(steps: int, shift: float = 3.0) -> Schedule:
    """`t' = shift t / (1 + (shift - 1) t)` of t equally spaced from .999 (DPM-Solver, flow).

    The network is told thousandths, rounded down, as the published scheduler stores them.
    """
    t = np.linspace(0.999, 0.0, steps + 1)
    t = shift * t / (1 + (shift - 1) * t)
    told = np.floor(t[:-1] * 1000) / 1000
    return Schedule(tuple(t.tolist()), tuple(told.tolist()), "dpm")


def published(
    scheduler: dict[str, Any], steps: int, tokens: int, shifted_twice: bool = False
) -> Schedule:
    """The schedule that a published scheduler_config.json asks for.

    tokens: of the image, on which dynamic shifting depends. shifted_twice: how its pipeline uses
    static shifting, see `static_shift`.
    Raises:
      UserError: a scheduler that we do not compute, with everything in it that we do not.
    """
    check_steps(steps)
    name = scheduler.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if name not in CLASSES:
        raise UserError(f"the scheduler is of class {name!r}; known are {', '.join(CLASSES)}")
    if name == "DPMSolverMultistepScheduler":
        implemented, numbers, schedule = DPM, DPM_NUMBERS, partial(flow_shift, steps)
        scheduler = DPM_ASSUMED | scheduler
    elif scheduler.get("use_dynamic_shifting"):
        implemented, numbers = DYNAMIC, DYNAMIC_NUMBERS
        schedule = partial(dynamic_shift, steps, tokens)
    else:
        implemented, numbers = STATIC, STATIC_NUMBERS
        schedule = partial(static_shift, steps, twice=shifted_twice)
    config = implemented | numbers | scheduler
    problems = [
        f"{key} is {config[key]!r}, only {value!r} is implemented"
        for key, value in implemented.items()
        if config[key] != value
    ]
    problems += [
        f"{key} is {config[key]!r}, not a number"
        for key, default in numbers.items()
        if config[key] != default and not isinstance(config[key], int | float)
    ]
    if problems:
        raise UserError(f"scheduler_config.json: {'; '.join(problems)}")
    return schedule(*(config[key] for key in numbers))
