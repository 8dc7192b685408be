"""The layers that networks are made of, with names for their parameters' axes.

`config` has the dtype of computation.
"""

from collections.abc import Callable
from typing import no_type_check

import flax.linen as nn
from jaxtyping import Array, Float

from twinflow_jax.models.adapters import adapted
from twinflow_jax.models.axes import init_of

UNIT_VARIANCE = nn.initializers.lecun_normal()


@no_type_check  # Flax's own annotations cannot be checked at run time
class Dense(nn.Dense):
    """A projection that may have an adapter."""

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return adapted(self, super().__call__(x), x, (x.shape[-1], self.features))


def dense(
    config, features: int, axes: tuple[str | None, str | None], name: str | None = None,
    bias: bool = True, kernel: Callable = UNIT_VARIANCE,
) -> Dense:
    """A projection whose kernel has these logical axes; a bias of the model's width has none."""
    bias_axis = None if axes[1] == "embed" else axes[1]
    return Dense(
        features, use_bias=bias, dtype=config.dtype, name=name,
        kernel_init=init_of(kernel, *axes), bias_init=init_of(nn.initializers.zeros, bias_axis),
    )


def rms_norm(epsilon: float, dtype: str, name: str | None = None, scale: float = 1.0) -> nn.RMSNorm:
    """scale: that its parameter starts from."""
    scale_init = init_of(nn.initializers.constant(scale), None)
    return nn.RMSNorm(epsilon, dtype=dtype, scale_init=scale_init, name=name)


def layer_norm(epsilon: float, dtype: str, name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon, dtype=dtype, use_fast_variance=False, name=name,
        scale_init=init_of(nn.initializers.ones, None),
        bias_init=init_of(nn.initializers.zeros, None),
    )
