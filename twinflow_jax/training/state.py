"""Everything that a checkpoint holds."""

import dataclasses
import re
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax

from twinflow_jax.models import names
from twinflow_jax.training import ema


@no_type_check  # shapes and layouts of states, and what JAX fills trees with, are built as states
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: optimizer steps done. teacher: moving or frozen teacher, None where it is the
    student. average: what is sampled from, None where it is the student. fixed: patterns of the
    paths of weights that are not trained, of which moments and averages hold nothing."""

    step: jax.Array
    params: Any
    opt_state: Any
    teacher: ema.Average | None
    average: ema.Average | None
    fixed: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})


def trained(params, fixed: tuple[str, ...]):
    """The weights, with None in the place of those that are not trained."""
    if not fixed:
        return params
    pattern = re.compile("|".join(fixed))
    return names.unflatten({
        path: None if pattern.fullmatch(path) else leaf
        for path, leaf in names.flatten(params).items()
    })


def whole(part, params):
    """What `trained` gave, perhaps changed since, with those of `params` that it left out."""
    left_out = lambda leaf: leaf is None
    return jax.tree.map(lambda a, b: b if a is None else a, part, params, is_leaf=left_out)


def create(
    params, optimizer: optax.GradientTransformation, teacher_decay: float, ema_decay: float,
    dtype: str = "float32", fixed: tuple[str, ...] = (),
) -> TrainState:
    """The state of step 0. dtype: of the weights; moments and averages have their own."""
    part = trained(params, fixed)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(lambda a: a.astype(dtype), params),
        opt_state=optimizer.init(part),
        teacher=ema.start(part) if teacher_decay > 0 else None,
        average=ema.start(part) if ema_decay > 0 else None,
        fixed=fixed,
    )


def layouts(
    state: TrainState, optimizer: optax.GradientTransformation, params: Any, rest: Any
) -> TrainState:
    """Where everything of a state lies: copies of the weights, averages and moments, as `params`
    says, scalars as `rest` says. state: abstract or not."""
    part = trained(params, state.fixed)
    average = lambda average: None if average is None else ema.Average(part, rest)
    opt_state = optax.tree.map_params(
        optimizer, lambda _, layout: layout, state.opt_state, part,
        transform_non_params=lambda _: rest,
    )
    averages = average(state.teacher), average(state.average)
    return TrainState(rest, params, opt_state, *averages, state.fixed)


def sampling_params(state: TrainState):
    """The weights to sample from: the average where there is one."""
    return state.params if state.average is None else whole(state.average.params, state.params)


def to_parts(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint: each copy of the weights apart and whole, since samplers read
    one alone, and the rest as `progress`."""
    averages = {"teacher": state.teacher, "average": state.average}
    averages = {name: average for name, average in averages.items() if average is not None}
    decays = {name: average.decay for name, average in averages.items()}
    progress = {"optimizer": state.opt_state, "step": state.step, "decays": decays}
    weights = {name: whole(average.params, state.params) for name, average in averages.items()}
    return {"params": state.params, "progress": progress} | weights


def from_parts(parts: dict[str, Any], fixed: tuple[str, ...] = ()) -> TrainState:
    """The inverse of `to_parts`."""
    progress = parts["progress"]
    averages = {
        name: ema.Average(trained(parts[name], fixed), decay)
        for name, decay in progress["decays"].items()
    }
    return TrainState(
        progress["step"], parts["params"], progress["optimizer"],
        averages.get("teacher"), averages.get("average"), fixed,
    )
