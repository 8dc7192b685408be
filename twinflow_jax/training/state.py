"""Everything that a checkpoint holds."""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax

from twinflow_jax.training import ema


@no_type_check  # shapes and layouts of states, and what JAX fills trees with, are built as states
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
    params, optimizer: optax.GradientTransformation, teacher_decay: float, ema_decay: float,
    dtype: str = "float32",
) -> TrainState:
    """The state of step 0. dtype: of the trained weights; moments and averages have their own."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(lambda a: a.astype(dtype), params),
        opt_state=optimizer.init(params),
        teacher=ema.start(params) if teacher_decay > 0 else None,
        average=ema.start(params) if ema_decay > 0 else None,
    )


def layouts(
    state: TrainState, optimizer: optax.GradientTransformation, params: Any, rest: Any
) -> TrainState:
    """Where everything of a state lies: copies of the weights, averages and moments, as `params`
    says, scalars as `rest` says. state: abstract or not."""
    average = lambda average: None if average is None else ema.Average(params, rest)
    opt_state = optax.tree.map_params(
        optimizer, lambda _, layout: layout, state.opt_state, params,
        transform_non_params=lambda _: rest,
    )
    return TrainState(rest, params, opt_state, average(state.teacher), average(state.average))


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
