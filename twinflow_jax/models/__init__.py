"""Networks, all behind one contract: `apply(params, x_t, t, r, cond) -> velocity`.

A family is a module with a Config dataclass and a Flax class; FAMILIES finds it by name, and
adding one touches its own file and one line here. Flax lives only in this room.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from twinflow_jax.errors import UserError
from twinflow_jax.models import dit, mlp, unet

FAMILIES = {
    "mlp": (mlp.Config, mlp.MLP),
    "unet": (unet.Config, unet.UNet),
    "dit": (dit.Config, dit.DiT),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A network as pure functions.

    apply(params, x_t (B, ...), t (B,), r (B,), cond) -> velocity of x_t's shape.
    init(key) -> params. null_cond(rows) -> the condition that stands for none.
    """

    config: Any
    init: Callable[[jax.Array], Any]
    apply: Callable[..., jax.Array]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.config.sample_shape

    def cond(self, labels) -> dict[str, jax.Array]:
        """The condition for class labels (B,); {} for a network without classes."""
        return {"label": jnp.asarray(labels, jnp.int32)} if self.config.num_classes else {}

    def null_cond(self, rows: int) -> dict[str, jax.Array]:
        return self.cond(jnp.full((rows,), self.config.num_classes))

    def abstract_params(self):
        """Shapes and dtypes of the parameters, without computing any."""
        return jax.eval_shape(self.init, jax.random.key(0))


def create(config: dict[str, Any], cond: dict[str, jax.Array] | None = None) -> Model:
    """The network that a config's `model` fields describe.

    cond: an example condition, where it is not a class label.
    Raises:
      UserError: unknown family or field, or a sample shape that the network cannot take.
    """
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(config).items()}
    name = fields.get("name")
    if name not in FAMILIES:
        raise UserError(f"model.name is {name!r}; choose from {', '.join(FAMILIES)}")
    config_class, module_class = FAMILIES[name]
    known = [field.name for field in dataclasses.fields(config_class)]
    for field in fields:
        if field not in known:
            raise UserError(f"model {name!r} has no field {field!r}; it has {', '.join(known)}")
    settings = config_class(**fields)
    module = module_class(settings)

    def init(key: jax.Array):
        x = jnp.zeros((1, *settings.sample_shape), jnp.float32)
        example = cond if cond is not None else model.null_cond(1)
        times = jnp.zeros((1,), jnp.float32)
        return module.init(key, x, times, times, example)["params"]

    def apply(params, x_t, t, r, cond):
        return module.apply({"params": params}, x_t, t, r, cond)

    model = Model(settings, init, apply)
    return model
