"""Optimizers by name, from a config's `optimizer` fields."""

import optax

from twinflow_jax.errors import UserError


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


def create(config, steps: int) -> optax.GradientTransformation:
    """The optimizer that `config` describes, gradients clipped by global norm first.

    config: name ("adamw", "adam" or "radam"), learning_rate, betas, eps, weight_decay,
    clip_norm (0: off), warmup, decay_to. Paper Table 6: AdamW or RAdam, constant, no decay.
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
    if config.clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), chosen)
    return chosen
