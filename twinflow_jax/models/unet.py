"""The tutorial's U-Net: two levels, times and class added as a bias at the bottleneck.

Source: `DiffusionUNet` of the released tutorials/mnist/networks.py; output `x - net(...)`.
At hidden 64, time 64, label 64, one class more than the tutorial's ten (class 10 is "none").
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from twinflow_jax.arrays import Maps, Times
from twinflow_jax.errors import UserError
from twinflow_jax.keys import option
from twinflow_jax.models import conditioning
from twinflow_jax.models.projections import Dense
from twinflow_jax.models.settings import Settings


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Images whose height and width divide by 4."""

    name: str = "unet"
    sample_shape: tuple[int, ...] = (28, 28, 1)
    num_classes: int = 10
    hidden: int = option(64, "channels of the first level", least=1)
    time_width: int = option(64, "of the embeddings of t and r", least=1)
    label_width: int = option(64, "of the class embedding", least=1)

    def __post_init__(self):
        super().__post_init__()
        shape = self.sample_shape
        if len(shape) != 3 or shape[0] % 4 or shape[1] % 4:
            raise UserError(
                f"model 'unet' halves its input twice and cannot take samples of shape {shape}: "
                "height and width must divide by 4"
            )


class UNet(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x_t: Maps, t: Times, r: Times, cond: dict) -> Maps:
        c = self.config
        conv = lambda n: nn.Conv(n, (3, 3), padding=1)
        down = lambda n: nn.Conv(n, (4, 4), strides=2, padding=1)
        up = lambda n: nn.ConvTranspose(n, (4, 4), strides=(2, 2), padding="SAME")
        context = jnp.concatenate(
            [
                conditioning.RawTime(c.time_width)(t),
                conditioning.RawTime(c.time_width)(r),
                conditioning.Condition(c.label_width, c.num_classes)(cond, x_t.shape[0]),
            ],
            axis=-1,
        )
        skip_1 = down(c.hidden)(nn.relu(conv(c.hidden)(x_t)))
        skip_2 = down(2 * c.hidden)(nn.relu(conv(2 * c.hidden)(nn.relu(skip_1))))
        h = conv(4 * c.hidden)(nn.relu(skip_2))
        h = h + Dense(4 * c.hidden)(context)[:, None, None, :]
        h = up(2 * c.hidden)(jnp.concatenate([h, skip_2], axis=-1))
        h = conv(2 * c.hidden)(nn.relu(h))
        h = up(c.hidden)(nn.relu(jnp.concatenate([h, skip_1], axis=-1)))
        h = conv(c.hidden)(nn.relu(h))
        return x_t - conv(c.sample_shape[-1])(h)
