"""The time grids that base models were published with: float64 NumPy, from 1 down to 0."""

from typing import Any

import numpy as np

from twinflow_jax.errors import UserError

# Of a scheduler_config.json: what we compute, and what the published class assumes where a
# config leaves it out.
IMPLEMENTED = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
    "use_dynamic_shifting": True, "time_shift_type": "exponential", "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "stochastic_sampling": False,
    "invert_sigmas": False,
}
SHIFTS = {
    "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15,
    "shift_terminal": None,
}
DEFAULTS = IMPLEMENTED | SHIFTS | {"use_dynamic_shifting": False}


def dynamic_shift(
    steps: int, tokens: int, base_tokens: int = 256, max_tokens: int = 8192,
    base_shift: float = 0.5, max_shift: float = 0.9, terminal: float | None = 0.02,
) -> tuple[float, ...]:
    """More time near noise the larger the image (FlowMatchEulerDiscreteScheduler, exponential).

    `t' = e^mu / (e^mu + 1/t - 1)` of t equally spaced from 1 to 1/steps, where mu grows from
    base_shift at base_tokens to max_shift at max_tokens; then stretched so that the last time
    before 0 is `terminal`.
    """
    if steps < 1:
        raise UserError(f"steps is {steps}; sampling takes at least 1")
    mu = base_shift + (tokens - base_tokens) * (max_shift - base_shift) / (max_tokens - base_tokens)
    t = np.linspace(1.0, 1.0 / steps, steps)
    t = np.exp(mu) / (np.exp(mu) + 1 / t - 1)
    if terminal and steps > 1:
        t = 1 - (1 - t) * (1 - terminal) / (1 - t[-1])
    return (*t.tolist(), 0.0)


def published_times(scheduler: dict[str, Any], steps: int, tokens: int) -> tuple[float, ...]:
    """The times that a published scheduler_config.json asks for.

    tokens: of the image, on which dynamic shifting depends.
    Raises:
      UserError: a scheduler that we do not compute, with everything in it that we do not.
    """
    config = DEFAULTS | scheduler
    problems = [
        f"{key} is {config[key]!r}, only {value!r} is implemented"
        for key, value in IMPLEMENTED.items()
        if config[key] != value
    ]
    problems += [
        f"{key} is {config[key]!r}, not a number"
        for key, default in SHIFTS.items()
        if config[key] != default and not isinstance(config[key], int | float)
    ]
    if problems:
        raise UserError(f"scheduler_config.json: {'; '.join(problems)}")
    return dynamic_shift(steps, tokens, *(config[key] for key in SHIFTS))
