"""The autoencoder of FLUX and Stable Diffusion 3, which differ in two numbers.

Its group norms and its attention see the whole picture: decoding in tiles only comes close to it.
Source: diffusers' AutoencoderKL.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from twinflow_jax.arrays import Images, Latents, Maps
from twinflow_jax.models import autoencoder, names, settings
from twinflow_jax.models.attention import attention
from twinflow_jax.models.family import image_inputs

CLASS = "AutoencoderKL"
GROUPS, EPSILON = 32, 1e-6  # of every norm

# Keys of config.json: our field and the published class's default.
_FIELDS = {
    "block_out_channels": ("widths", (64,)),
    "layers_per_block": ("res_blocks", 1),
    "latent_channels": ("latent_channels", 4),
    "scaling_factor": ("scaling", 0.18215),
    "shift_factor": ("shift", 0.1),  # the class has none, and we no network without
}
_ONLY = {
    "_class_name": CLASS, "act_fn": "silu", "in_channels": 3, "out_channels": 3,
    "norm_num_groups": GROUPS, "latents_mean": None, "latents_std": None,
    "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": True,
}
_ASSUMED = {"shift_factor": None, "use_quant_conv": True, "use_post_quant_conv": True}
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
_HARMLESS = ("force_upcast", "sample_size")


@dataclasses.dataclass(frozen=True)
class Config:
    """FLUX's. widths: at each resolution, finest first.

    res_blocks: per resolution in the encoder; the decoder has one more. scaling, shift: latents
    are (mean - shift) scaling. dtype: of the computation, "float32" or "bfloat16".
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    res_blocks: int = 2
    latent_channels: int = 16
    scaling: float = 0.3611
    shift: float = 0.1159
    dtype: str = "float32"

    @property
    def downscale(self) -> int:
        """Pixels per latent position along each side."""
        return 2 ** (len(self.widths) - 1)

    @classmethod
    def from_published(cls, config: dict) -> "Config":
        """As `family.PublishedConfig` says."""
        config = _ASSUMED | config
        values, mistyped, problems = settings.published(
            config, _FIELDS, _ONLY, (*_BLOCKS, *_HARMLESS)
        )
        problems += [
            f"{key} has others than {only!r}" for key, only in _BLOCKS.items()
            if set(config.get(key, ())) - {only}
        ]
        settings.refuse("autoencoder's config.json", problems + mistyped)
        return cls(**values)


def _norm(config: Config, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(
        GROUPS, epsilon=EPSILON, dtype=config.dtype, use_fast_variance=False, name=name
    )


def _conv(config: Config, features: int, name: str, size: int = 3, **how) -> nn.Conv:
    return nn.Conv(features, (size, size), dtype=config.dtype, name=name, **how)


class ResBlock(nn.Module):
    config: Config
    features: int

    @nn.compact
    def __call__(self, x: Maps) -> Float[Array, "B H W {self.features}"]:
        c = self.config
        h = _conv(c, self.features, "conv1")(nn.silu(_norm(c, "norm1")(x)))
        h = _conv(c, self.features, "conv2")(nn.silu(_norm(c, "norm2")(h)))
        if x.shape[-1] != self.features:
            x = _conv(c, self.features, "conv_shortcut", size=1)(x)
        return x + h


class AttentionBlock(nn.Module):
    """Every position attends to all, with one head."""

    config: Config

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        rows, height, width, channels = x.shape
        dense = lambda name: nn.Dense(channels, dtype=self.config.dtype, name=name)
        h = _norm(self.config, "group_norm")(x).reshape(rows, height * width, 1, channels)
        h = attention(*(dense(name)(h) for name in ("to_q", "to_k", "to_v")))
        return x + dense("to_out_0")(h.reshape(x.shape))


class MidBlock(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        x = ResBlock(self.config, x.shape[-1], name="resnets_0")(x)
        x = AttentionBlock(self.config, name="attentions_0")(x)
        return ResBlock(self.config, x.shape[-1], name="resnets_1")(x)


class Downsample(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Maps) -> Float[Array, "B H//2 W//2 C"]:
        right_and_below = ((0, 1), (0, 1))
        return _conv(
            self.config, x.shape[-1], "conv", strides=2, padding=right_and_below
        )(x)


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution."""

    config: Config

    @nn.compact
    def __call__(self, x: Maps) -> Float[Array, "B 2*H 2*W C"]:
        return _conv(self.config, x.shape[-1], "conv")(x.repeat(2, axis=1).repeat(2, axis=2))


class Level(nn.Module):
    """One resolution: its blocks and, where another one follows, the way to that.

    leave: Downsample or Upsample, or None; name of either in `leaving`.
    """

    config: Config
    features: int
    res_blocks: int
    leave: type[nn.Module] | None
    leaving: str

    @nn.compact
    def __call__(self, x: Maps) -> Float[Array, "B h w {self.features}"]:
        for i in range(self.res_blocks):
            x = ResBlock(self.config, self.features, name=f"resnets_{i}")(x)
        return x if self.leave is None else self.leave(self.config, name=self.leaving)(x)


class Encoder(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Images) -> Latents:
        c, last = self.config, len(self.config.widths) - 1
        x = _conv(c, c.widths[0], "conv_in")(x)
        for i, width in enumerate(c.widths):
            leave = Downsample if i < last else None
            x = Level(
                c, width, c.res_blocks, leave, "downsamplers_0", name=f"down_blocks_{i}"
            )(x)
        x = nn.silu(_norm(c, "conv_norm_out")(MidBlock(c, name="mid_block")(x)))
        return _conv(c, 2 * c.latent_channels, "conv_out")(x)


class Decoder(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, z: Latents) -> Images:
        c, last = self.config, len(self.config.widths) - 1
        x = MidBlock(c, name="mid_block")(_conv(c, c.widths[-1], "conv_in")(z))
        for i, width in enumerate(reversed(c.widths)):
            leave = Upsample if i < last else None
            x = Level(
                c, width, c.res_blocks + 1, leave, "upsamplers_0", name=f"up_blocks_{i}"
            )(x)
        return _conv(c, 3, "conv_out")(nn.silu(_norm(c, "conv_norm_out")(x)))


class Autoencoder(autoencoder.Autoencoder):
    """Of the published class; the posterior's mean is taken."""

    config: Config

    def setup(self):
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def to_latents(self, images: Images) -> Latents:
        mean, _ = jnp.split(self.encoder(images).astype(jnp.float32), 2, axis=-1)
        return (mean - self.config.shift) * self.config.scaling

    def to_images(self, latents: Latents) -> Images:
        return self.decoder(latents / self.config.scaling + self.config.shift)


def table(config: Config) -> names.NameTable:
    """Of the published checkpoint."""
    layout = lambda path, ndim: {1: "same", 2: "linear", 4: "conv"}[ndim]
    return names.NameTable(names.spelled(Autoencoder(config), image_inputs(config), layout))
