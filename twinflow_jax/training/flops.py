"""FLOPs that a step should take, counted from the network and the objective, not from a compiler.

FLOPs are of matrix products and convolutions, 2 for a multiplication and its addition.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import ad

from twinflow_jax.models import Model, Shape, remat
from twinflow_jax.models.attention import compiled_for
from twinflow_jax.objectives import STUDENT, Batch, Objective
from twinflow_jax.training.step import micro_batches


@dataclasses.dataclass(frozen=True)
class Forward:
    """Of one row through the network: matmul without attention kernels, attention in them."""

    matmul: int
    attention: int


@dataclasses.dataclass(frozen=True)
class Call:
    """One evaluation of the network in a step. rows: of it; trained: whether its weights have a
    gradient; through: whether its input alone has one; derived: whether its exact derivative is
    taken along."""

    rows: int
    trained: bool
    through: bool = False
    derived: bool = False


def forward(model: Model, shape: Shape, platform: str = "tpu") -> Forward:
    """The FLOPs of one row of a shape, as the network computes it on a platform."""
    null = model.abstract_null(shape)
    x = jax.ShapeDtypeStruct((1, *shape.sample), jnp.float32)
    time = jax.ShapeDtypeStruct((1,), jnp.float32)
    apply = lambda *arguments: model.apply(*arguments)  # what was traced for another is not reused
    with compiled_for(platform):
        jaxpr = jax.make_jaxpr(apply)(model.abstract_params(), x, time, time, null)
    return Forward(*map(int, _count(jaxpr.jaxpr)))


def calls(
    objective: Objective, rows: int, sample_shape: tuple[int, ...], micro_steps: int = 1
) -> list[Call]:
    """The evaluations that one step of `rows` rows makes."""
    found: list[Call] = []

    @jax.custom_vjp
    def network(weight, x):
        found.append(Call(x.shape[0], False))
        return jnp.zeros_like(x)

    def differentiated(weight, x):
        found.append(Call(x.value.shape[0], weight.perturbed, not weight.perturbed))
        return jnp.zeros_like(x.value), x.value

    def backward(x, gradient):
        return jnp.float32(0), jnp.zeros_like(x)

    network.defvjp(differentiated, backward, symbolic_zeros=True)

    def apply(params, x_t, t, r, cond):
        if not isinstance(x_t, ad.JVPTracer):
            return network(params["weight"], x_t)
        velocity = network(params["weight"], x_t.primal)
        found[-1] = dataclasses.replace(found[-1], derived=True)
        return velocity

    done = np.zeros(rows, np.int32)
    names = (STUDENT, *objective.config.auxiliary)

    def loss(learned, still, x, draws):
        networks = still | learned
        student = networks if objective.config.auxiliary else networks[STUDENT]
        teacher = still["teacher"] if objective.config.teacher_decay else student
        parts = micro_batches(objective, Batch(x, {}, {}, done, x), draws, micro_steps)
        return sum(objective.loss(apply, student, teacher, *part)[0] for part in parts)

    draws = jax.eval_shape(lambda key: objective.draw(key, rows, sample_shape), jax.random.key(0))
    x = jax.ShapeDtypeStruct((rows, *sample_shape), jnp.float32)
    weights = {name: {"weight": jnp.float32(0)} for name in (*names, "teacher")}
    learned = {name: weights.pop(name) for name in objective.learns}
    jax.eval_shape(jax.grad(loss), learned, weights, x, draws)
    return found


def worth(one: Forward, evaluations: list[Call]) -> int:
    """Model FLOPs of a step: each row's forward, twice that more where it is trained, once more for
    a derivative, and where a gradient goes through, the half of that which is of no weights: all of
    attention's. Nothing that is computed again counts, attention's scores in its backward pass
    included, and no rows that fill up a mesh."""
    return sum(
        call.rows * (
            one.matmul * (1 + 2 * call.trained + call.through + call.derived)
            + one.attention * (1 + 2 * (call.trained or call.through) + call.derived)
        )
        for call in evaluations
    )


def step(
    one: Forward, evaluations: list[Call], policy: str, row_parts: int = 1
) -> Forward:
    """The FLOPs that all devices execute in one step: rows filled up to the mesh's parts,
    gradients (twice a forward, once where only the input has one; in attention 2.5 times, which
    computes its scores again) and what remat.POLICIES[policy] computes again."""
    matmul = attention = 0
    again = remat.POLICIES[policy]
    for call in evaluations:
        rows = math.ceil(call.rows / row_parts) * row_parts
        back, more = call.trained or call.through, call.derived
        matmul += rows * one.matmul * (1 + back * (1 + again.matmul) + call.trained + more)
        attention += rows * one.attention * (1 + back * (2.5 + again.attention) + more)
    return Forward(int(matmul), int(attention))


def _count(jaxpr: core.Jaxpr) -> np.ndarray:
    """(matmul, attention) FLOPs of a jaxpr, loops multiplied out."""
    total = np.zeros(2)
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            total[0] += _dot(eqn)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            out = eqn.params["dimension_numbers"].rhs_spec[0]
            total[0] += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / kernel[out]
        elif name == "pallas_call":  # the splash kernel, its arrays (..., heads, tokens, depth)
            floating = [v.aval for v in eqn.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)]
            query, key = (array.shape for array in floating[:2])
            total[1] += 4 * math.prod(query) * key[-2]
        else:
            times = eqn.params["length"] if name == "scan" else 1
            for inner in core.jaxprs_in_params(eqn.params):
                total += times * _count(inner)
    return total


def _dot(eqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
