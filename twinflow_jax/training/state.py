"""Everything that a checkpoint holds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from twinflow_jax.training import ema


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: optimizer steps done. teacher: moving or frozen teacher, None where it is the
    student. average: what is sampled from, None where it is the student."""

    step: jax.Array
    params: Any
    opt_state: Any
    teacher: ema.Average | None
    average: ema.Average | None


def create(
    params, optimizer: optax.GradientTransformation, teacher_decay: float, ema_decay: float
) -> TrainState:
    """The state of step 0."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        teacher=ema.start(params) if teacher_decay > 0 else None,
        average=ema.start(params) if ema_decay > 0 else None,
    )


def sampling_params(state: TrainState):
    """The weights to sample from: the average where there is one."""
    return state.params if state.average is None else state.average.params


def to_parts(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint: each copy of the weights apart, and the rest as `progress`."""
    averages = {"teacher": state.teacher, "average": state.average}
    averages = {name: average for name, average in averages.items() if average is not None}
    decays = {name: average.decay for name, average in averages.items()}
    progress = {"optimizer": state.opt_state, "step": state.step, "decays": decays}
    weights = {name: average.params for name, average in averages.items()}
    return {"params": state.params, "progress": progress} | weights


def from_parts(parts: dict[str, Any]) -> TrainState:
    """The inverse of `to_parts`."""
    progress = parts["progress"]
    averages = {
        name: ema.Average(parts[name], decay) for name, decay in progress["decays"].items()
    }
    return TrainState(
        progress["step"], parts["params"], progress["optimizer"],
        averages.get("teacher"), averages.get("average"),
    )
