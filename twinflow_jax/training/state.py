"""Everything that a checkpoint holds."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from twinflow_jax.training import ema


@flax.struct.dataclass
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
