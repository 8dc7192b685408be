"""The layers that networks are made of, with names for their parameters' axes.

`config` has the dtype of computation.
"""

from collections.abc import Callable

import flax.linen as nn

UNIT_VARIANCE = nn.initializers.lecun_normal()


def init_of(init: Callable, *axes: str | None) -> Callable:
    """An initialiser whose parameter's axes have names."""
    return nn.with_logical_partitioning(init, axes)


def dense(
    config, features: int, axes: tuple[str | None, str | None], name: str | None = None,
    bias: bool = True, kernel: Callable = UNIT_VARIANCE,
) -> nn.Dense:
    """A projection whose kernel has these logical axes; a bias of the model's width has none."""
    bias_axis = None if axes[1] == "embed" else axes[1]
    return nn.Dense(
        features, use_bias=bias, dtype=config.dtype, name=name, kernel_init=init_of(kernel, *axes),
        bias_init=init_of(nn.initializers.zeros, bias_axis),
    )


def rms_norm(epsilon: float, dtype: str, name: str | None = None, scale: float = 1.0) -> nn.RMSNorm:
    """scale: that its parameter starts from."""
    scale_init = init_of(nn.initializers.constant(scale), None)
    return nn.RMSNorm(epsilon, dtype=dtype, scale_init=scale_init, name=name)
