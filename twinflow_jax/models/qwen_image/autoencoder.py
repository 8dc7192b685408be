"""The autoencoder of Qwen-Image, for single images.

The published network is a causal video autoencoder. A first frame has only zeros before it, so
that each 3-D convolution reduces to the last temporal tap of its kernel: here it is a 2-D
network which keeps the published kernels whole. Source: diffusers' AutoencoderKLQwenImage.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twinflow_jax.arrays import Images, Latents, Maps
from twinflow_jax.models import autoencoder, names, settings
from twinflow_jax.models.attention import attention
from twinflow_jax.models.family import image_inputs

CLASS = "AutoencoderKLQwenImage"


@dataclasses.dataclass(frozen=True)
class Config:
    """base_width times each multiplier is the width at each resolution, finest first.

    res_blocks: per resolution in the encoder; the decoder has one more. latents_mean,
    latents_std: per latent channel, over the training data of the publishers. dtype: of the
    computation, "float32" or "bfloat16".
    """

    base_width: int = 96
    latent_channels: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )
    dtype: str = "float32"

    @property
    def downscale(self) -> int:
        """Pixels per latent position along each side."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.base_width * multiplier for multiplier in self.multipliers)

    @classmethod
    def from_published(cls, config: dict) -> "Config":
        """As `family.PublishedConfig` says; what it leaves out has the published value."""
        ours = {
            "base_dim": "base_width", "z_dim": "latent_channels", "dim_mult": "multipliers",
            "num_res_blocks": "res_blocks", "latents_mean": "latents_mean",
            "latents_std": "latents_std",
        }
        # Dropout acts in training only, and a single frame never meets the temporal resampling.
        values, mistyped, problems = settings.published(
            config, {key: (field, getattr(cls, field)) for key, field in ours.items()},
            {"_class_name": CLASS, "attn_scales": [], "input_channels": 3},
            ("dropout", "temperal_downsample"),
        )
        channels = values["latent_channels"]
        problems += [
            f"{field} is not of z_dim {channels} values"
            for field in ("latents_mean", "latents_std") if len(values[field]) != channels
        ]
        settings.refuse("autoencoder's config.json", problems + mistyped)
        return cls(**values)


class CausalConv(nn.Module):
    """A causal 3-D convolution on a single frame, as a 2-D one; the kernel is size^3."""

    features: int
    size: int
    dtype: str

    @nn.compact
    def __call__(self, x: Maps) -> Float[Array, "B H W {self.features}"]:
        shape = (self.size, self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(batch_axis=0), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel[-1], bias, dtype=self.dtype)
        return jax.lax.broadcast_to_rank(bias, x.ndim) + jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


class Norm(nn.Module):
    """Each position's channels scaled to a root mean square of 1, then by gamma."""

    dtype: str

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        channels = x.shape[-1]
        gamma = self.param("gamma", nn.initializers.ones, (channels,))
        x = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
        unit = x / jnp.maximum(length, 1e-12)
        return (unit * channels**0.5 * jax.lax.broadcast_to_rank(gamma, x.ndim)).astype(self.dtype)


class ResBlock(nn.Module):
    features: int
    dtype: str

    @nn.compact
    def __call__(self, x: Maps) -> Float[Array, "B H W {self.features}"]:
        h = nn.silu(Norm(self.dtype, name="norm1")(x))
        h = CausalConv(self.features, 3, self.dtype, name="conv1")(h)
        h = nn.silu(Norm(self.dtype, name="norm2")(h))
        h = CausalConv(self.features, 3, self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = CausalConv(self.features, 1, self.dtype, name="conv_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Every position attends to all, with one head."""

    dtype: str

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        rows, height, width, channels = x.shape
        h = Norm(self.dtype, name="norm")(x).reshape(rows, height * width, 1, channels)
        qkv = nn.Dense(3 * channels, dtype=self.dtype, name="to_qkv")(h)
        h = attention(*jnp.split(qkv, 3, axis=-1)).reshape(x.shape)
        return x + nn.Dense(channels, dtype=self.dtype, name="proj")(h)


class MidBlock(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        x = ResBlock(x.shape[-1], self.dtype, name="resnets_0")(x)
        x = AttentionBlock(self.dtype, name="attentions_0")(x)
        return ResBlock(x.shape[-1], self.dtype, name="resnets_1")(x)


class Downsample(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, x: Maps) -> Float[Array, "B H//2 W//2 C"]:
        return nn.Conv(
            x.shape[-1], (3, 3), strides=2, padding=((0, 1), (0, 1)), dtype=self.dtype,
            name="resample_1",
        )(x)


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution to half the channels."""

    dtype: str

    @nn.compact
    def __call__(self, x: Maps) -> Float[Array, "B 2*H 2*W C//2"]:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return nn.Conv(x.shape[-1] // 2, (3, 3), dtype=self.dtype, name="resample_1")(x)


class UpBlock(nn.Module):
    features: int
    res_blocks: int
    upsample: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Maps) -> Float[Array, "B h w c"]:
        for i in range(self.res_blocks):
            x = ResBlock(self.features, self.dtype, name=f"resnets_{i}")(x)
        return Upsample(self.dtype, name="upsamplers_0")(x) if self.upsample else x


class Encoder(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Images) -> Latents:
        c = self.config
        x = CausalConv(c.base_width, 3, c.dtype, name="conv_in")(x)
        for level, width in enumerate(c.widths):
            first = level * (c.res_blocks + 1)  # one list of blocks for all levels
            if level:
                x = Downsample(c.dtype, name=f"down_blocks_{first - 1}")(x)
            for i in range(c.res_blocks):
                x = ResBlock(width, c.dtype, name=f"down_blocks_{first + i}")(x)
        x = MidBlock(c.dtype, name="mid_block")(x)
        x = nn.silu(Norm(c.dtype, name="norm_out")(x))
        return CausalConv(2 * c.latent_channels, 3, c.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, z: Latents) -> Images:
        c = self.config
        x = CausalConv(c.widths[-1], 3, c.dtype, name="conv_in")(z)
        x = MidBlock(c.dtype, name="mid_block")(x)
        for i, width in enumerate(reversed(c.widths)):
            finest = i == len(c.widths) - 1
            block = UpBlock(width, c.res_blocks + 1, not finest, c.dtype, name=f"up_blocks_{i}")
            x = block(x)
        x = nn.silu(Norm(c.dtype, name="norm_out")(x))
        return CausalConv(3, 3, c.dtype, name="conv_out")(x)


class Autoencoder(autoencoder.Autoencoder):
    """Of the published class; the posterior's mean is taken."""

    config: Config

    def setup(self):
        c = self.config
        self.encoder = Encoder(c)
        self.quant_conv = CausalConv(2 * c.latent_channels, 1, c.dtype)
        self.post_quant_conv = CausalConv(c.latent_channels, 1, c.dtype)
        self.decoder = Decoder(c)

    def to_latents(self, images: Images) -> Latents:
        mean, _ = jnp.split(self.quant_conv(self.encoder(images)), 2, axis=-1)
        shift, scale = self._statistics()
        return (mean.astype(jnp.float32) - shift) / scale

    def to_images(self, latents: Latents) -> Images:
        shift, scale = self._statistics()
        return self.decoder(self.post_quant_conv(latents * scale + shift))

    def _statistics(self) -> tuple[Float[Array, "1 1 1 c"], Float[Array, "1 1 1 c"]]:
        """Mean and standard deviation of each latent channel."""
        c = self.config
        return tuple(jnp.array(a)[None, None, None] for a in (c.latents_mean, c.latents_std))


def _layout(path: str, ndim: int) -> str:
    if path.endswith("gamma"):
        return "channel_2" if "attentions" in path else "channel_3"
    return {1: "same", 2: "pointwise", 4: "conv", 5: "conv3d"}[ndim]


def table(config: Config) -> names.NameTable:
    """Of the published checkpoint; its temporal resampling is carried."""
    return names.NameTable(
        names.spelled(Autoencoder(config), image_inputs(config), _layout),
        carried=(r".*\.time_conv\.(weight|bias)",),
    )
