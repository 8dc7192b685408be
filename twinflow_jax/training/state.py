"""Everything that a checkpoint holds."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import optax

from twinflow_jax.models import int8, names
from twinflow_jax.training import ema


class Auxiliary(NamedTuple):
    """A network that learns beside the student: of its weights those that are trained."""

    params: Any
    opt_state: Any


@no_type_check  # shapes and layouts of states, and what JAX fills trees with, are built as states
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: optimizer steps done. teacher: moving or frozen teacher, None where it is the
    student. average: what is sampled from, None where it is the student. fixed: patterns of the
    paths of weights that are not trained, of which moments and averages hold nothing. on_base:
    whether those are a base that checkpoints leave to where it came from. auxiliary: by name."""

    step: jax.Array
    params: Any
    opt_state: Any
    teacher: ema.Average | None
    average: ema.Average | None
    fixed: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    on_base: bool = dataclasses.field(default=False, metadata={"static": True})
    auxiliary: dict[str, Auxiliary] = dataclasses.field(default_factory=dict)


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
    dtype: str = "float32", fixed: tuple[str, ...] = (), on_base: bool = False,
    auxiliary: Mapping[str, optax.GradientTransformation] = {},
) -> TrainState:
    """The state of step 0. dtype: of the weights, of the base alone where there is one, where it
    may be "int8" (`models.int8`); moments and averages have their own. auxiliary: the optimizers
    of networks that start as the student."""
    part = trained(params, fixed)
    if dtype == int8.NAME:
        cast = int8.base(params)
    else:
        cast = jax.tree.map(lambda a: a.astype(dtype), params)
    weights = whole(part, cast) if on_base else cast
    copy = lambda: jax.tree.map(jnp.copy, trained(weights, fixed))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=weights,
        opt_state=optimizer.init(part),
        teacher=ema.start(part) if teacher_decay > 0 else None,
        average=ema.start(part) if ema_decay > 0 else None,
        fixed=fixed,
        on_base=on_base,
        auxiliary={name: Auxiliary(copy(), own.init(part)) for name, own in auxiliary.items()},
    )


def layouts(
    state: TrainState, optimizer: optax.GradientTransformation, params: Any, rest: Any,
    auxiliary: Mapping[str, optax.GradientTransformation] = {},
) -> TrainState:
    """Where everything of a state lies: copies of the weights, averages and moments, as `params`
    says, scalars as `rest` says. state: abstract or not; made with these optimizers."""
    part = trained(params, state.fixed)
    average = lambda average: None if average is None else ema.Average(part, rest)
    moments = lambda optimizer, opt_state: optax.tree.map_params(
        optimizer, lambda _, layout: layout, opt_state, part, transform_non_params=lambda _: rest,
    )
    return TrainState(
        rest, params, moments(optimizer, state.opt_state), average(state.teacher),
        average(state.average), state.fixed, state.on_base,
        {
            name: Auxiliary(part, moments(auxiliary[name], one.opt_state))
            for name, one in state.auxiliary.items()
        },
    )


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
    if state.auxiliary:
        progress["auxiliary"] = {name: one.opt_state for name, one in state.auxiliary.items()}
    copies = averages | state.auxiliary
    weights = {name: one.params for name, one in copies.items()}
    weights["params"] = trained(state.params, state.fixed)
    if state.on_base:
        return {"progress": progress} | {name: present(part) for name, part in weights.items()}
    return {"progress": progress} | {
        name: whole(part, state.params) for name, part in weights.items()
    }


def from_parts(
    parts: dict[str, Any], fixed: tuple[str, ...] = (), base: Any = None
) -> TrainState:
    """The inverse of `to_parts`. base: the weights that it left out, in a tree of all."""
    progress, on_base = parts["progress"], base is not None
    complete = lambda part: completed(part, base) if on_base else part
    part = lambda name: trained(complete(parts[name]), fixed)
    averages = {name: ema.Average(part(name), d) for name, d in progress["decays"].items()}
    return TrainState(
        progress["step"], complete(parts["params"]), progress["optimizer"],
        averages.get("teacher"), averages.get("average"), fixed, on_base,
        {name: Auxiliary(part(name), own) for name, own in progress.get("auxiliary", {}).items()},
    )


def present(part) -> dict[str, Any]:
    """A tree without its leaves that are None."""
    leaves = names.flatten(part).items()
    return names.unflatten({path: leaf for path, leaf in leaves if leaf is not None})


def completed(part: dict[str, Any], base):
    """The tree of the base with the leaves of `part`, which may have fewer."""
    return names.unflatten(names.flatten(base) | names.flatten(part))
