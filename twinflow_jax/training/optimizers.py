"""Optimizers by name, from a config's `optimizer` fields."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from twinflow_jax.errors import UserError

DTYPES = ("float32", "bfloat16")  # of moments and of master weights


def schedule(learning_rate: float, warmup: int, decay_to: float, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup` steps, then a cosine to `decay_to` times the rate at `steps`.

    decay_to = 1 keeps the rate constant, as the paper's runs do.
    """
    if decay_to == 1.0:
        after = optax.constant_schedule(learning_rate)
    else:
        after = optax.cosine_decay_schedule(learning_rate, max(steps - warmup, 1), decay_to)
    if warmup == 0:
        return after
    before = optax.linear_schedule(0.0, learning_rate, warmup)
    return optax.join_schedules([before, after], [warmup])


def looks_ahead(config) -> bool:
    """Whether the rate of a step depends on how many there will be."""
    return config.decay_to != 1.0


def create(config, steps: int) -> optax.GradientTransformation:
    """The optimizer that `config` describes, gradients clipped by global norm first.

    config: name ("adamw", "adam" or "radam"), learning_rate, betas, eps, weight_decay,
    clip_norm (0: off), warmup, decay_to, moments (a dtype that they are kept in). Paper Table 6:
    AdamW or RAdam, constant, no decay.
    """
    rate = schedule(config.learning_rate, config.warmup, config.decay_to, steps)
    b1, b2 = config.betas
    if config.name == "adamw":
        chosen = optax.adamw(rate, b1, b2, config.eps, weight_decay=config.weight_decay)
    elif config.name in ("adam", "radam"):
        if config.weight_decay:
            raise UserError(
                f"optimizer.weight_decay is {config.weight_decay}, but {config.name!r} has none: "
                "use optimizer.name=adamw"
            )
        chosen = {"adam": optax.adam, "radam": optax.radam}[config.name](rate, b1, b2, config.eps)
    else:
        raise UserError(
            f"optimizer.name is {config.name!r}; choose from 'adamw', 'adam', 'radam'"
        )
    if config.moments not in DTYPES:
        raise UserError(
            f"optimizer.moments is {config.moments!r}; choose from {', '.join(DTYPES)}"
        )
    if config.moments != "float32":
        if b2 > 0.995:
            raise UserError(
                f"optimizer.moments is {config.moments!r}, whose three digits a beta of {b2} never "
                "moves: use optimizer.betas up to .995, or optimizer.moments=float32"
            )
        chosen = kept_in(config.moments, chosen)
    if config.clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), chosen)
    return chosen


def kept_in(dtype: str, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer, its moments rounded to `dtype` between steps: half their memory."""
    def cast(state, dtype):
        is_moment = lambda leaf: leaf.ndim > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.tree.map(lambda a: a.astype(dtype) if is_moment(a) else a, state)

    def update(gradient, state, params):
        updates, state = optimizer.update(gradient, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(optimizer.init(params), dtype), update)


def stochastic_round(key: jax.Array, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """float32 to bfloat16, up or down with the chances that make it right on average.

    Updates smaller than the distance of two bfloat16 numbers then still count.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = (bits + noise) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(rounded, jnp.float32).astype(jnp.bfloat16)


def apply_updates(key: jax.Array, params, updates):
    """The weights after an update, each in its own dtype; bfloat16 is rounded stochastically."""
    def one(key, weight, update):
        new = weight.astype(jnp.float32) + update
        return stochastic_round(key, new) if weight.dtype == jnp.bfloat16 else new

    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.map(one, tree.unflatten(list(keys)), params, updates)
