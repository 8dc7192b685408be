"""SANA's autoencoder: DC-AE, 32 pixels per latent position and 32 latent channels (f32c32).

Convolutions at the finer resolutions, linear attention at the coarser ones, and shortcuts that
move pixels into channels around every change of resolution. Source: diffusers' AutoencoderDC.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twinflow_jax.arrays import Images, Latents, Maps
from twinflow_jax.models import autoencoder, names, settings
from twinflow_jax.models.convolution import Depthwise, Grouped
from twinflow_jax.models.family import image_inputs
from twinflow_jax.models.linear_attention import linear_attention

CLASS = "AutoencoderDC"
RES_BLOCK, ATTENTION_BLOCK = "ResBlock", "EfficientViTBlock"

# What a config.json may say, alone or besides.
IMPLEMENTED = {
    "_class_name": CLASS,
    "in_channels": 3,
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "decoder_conv_act_fn": "relu",
}
FIELDS = {  # ours, and the class's default
    "latent_channels": ("latent_channels", 32),
    "attention_head_dim": ("head_dim", 32),
    "scaling_factor": ("scaling_factor", 1.0),
}
# What it leaves out has this value, which is not always SANA's.
CLASS_DEFAULTS = IMPLEMENTED | {
    "encoder_block_types": RES_BLOCK,
    "decoder_block_types": RES_BLOCK,
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "upsample_block_type": "pixel_shuffle",
    "downsample_block_type": "pixel_unshuffle",
}


@dataclasses.dataclass(frozen=True)
class Tower:
    """The encoder or the decoder, per resolution, finest first.

    blocks: the kind of its layers. multiscales: in attention blocks, the sizes of the depthwise
    kernels whose outputs attend beside the plain queries, keys and values.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    layers: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    blocks: tuple[str, ...] = (RES_BLOCK,) * 3 + (ATTENTION_BLOCK,) * 3
    multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))

    @classmethod
    def from_published(cls, config: dict, side: str) -> "Tower":
        """side: "encoder" or "decoder"."""
        widths, blocks = config[f"{side}_block_out_channels"], config[f"{side}_block_types"]
        return cls(
            tuple(widths),
            tuple(config[f"{side}_layers_per_block"]),
            (blocks,) * len(widths) if isinstance(blocks, str) else tuple(blocks),
            tuple(map(tuple, config[f"{side}_qkv_multiscales"])),
        )

    def problems(self, side: str) -> list[str]:
        """What in it is inconsistent or not implemented."""
        found = []
        if len({len(field) for field in dataclasses.astuple(self)}) > 1:
            found.append(
                f"{side}_block_out_channels, _block_types, _layers_per_block and _qkv_multiscales "
                "differ in length"
            )
        if min(self.layers) < 1:
            found.append(f"{side}_layers_per_block {self.layers} has a resolution without layers")
        for block in sorted(set(self.blocks) - {RES_BLOCK, ATTENTION_BLOCK}):
            found.append(f"{side}_block_types {block} is not implemented")
        return found


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are those of SANA's 1.1.

    head_dim: of the attention. scaling_factor: of the encoder's output, to a variance near 1.
    dtype: of the computation, "float32" or "bfloat16".
    """

    latent_channels: int = 32
    head_dim: int = 32
    encoder: Tower = Tower(layers=(2, 2, 2, 3, 3, 3))
    decoder: Tower = Tower()
    scaling_factor: float = 0.41407
    dtype: str = "float32"

    @property
    def downscale(self) -> int:
        """Pixels per latent position along each side."""
        return 2 ** (len(self.encoder.widths) - 1)

    @classmethod
    def from_published(cls, config: dict) -> "Config":
        """As `family.PublishedConfig` says; what it leaves out has the class's default."""
        config = CLASS_DEFAULTS | config
        same = {key: _same_throughout(config[key]) for key in IMPLEMENTED}
        values, mistyped, problems = settings.published(
            config | same, FIELDS, IMPLEMENTED, CLASS_DEFAULTS
        )
        encoder = Tower.from_published(config, "encoder")
        decoder = Tower.from_published(config, "decoder")
        problems += encoder.problems("encoder") + decoder.problems("decoder")
        if len(encoder.widths) != len(decoder.widths):
            problems.append(
                f"the encoder has {len(encoder.widths)} resolutions, the decoder "
                f"{len(decoder.widths)}"
            )
        settings.refuse("autoencoder's config.json", problems + mistyped)
        return cls(**values, encoder=encoder, decoder=decoder)


def _same_throughout(value):
    """What a list says for every resolution, or the list where that is not one thing."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return values[0] if values and all(item == values[0] for item in values) else value


class Norm(nn.Module):
    """Each position's channels scaled to a root mean square of 1, then an affine map."""

    dtype: str

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)
        scale, bias = (jax.lax.broadcast_to_rank(a, x.ndim) for a in (scale, bias))
        return (x * scale + bias).astype(self.dtype)


class ResBlock(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        channels = x.shape[-1]
        h = nn.silu(nn.Conv(channels, (3, 3), dtype=self.dtype, name="conv1")(x))
        h = nn.Conv(channels, (3, 3), use_bias=False, dtype=self.dtype, name="conv2")(h)
        return x + Norm(self.dtype, name="norm")(h)


class Neighbourhood(nn.Module):
    """Queries, keys and values gathered from size x size places, then mixed head by head."""

    size: int
    head_dim: int
    dtype: str

    @nn.compact
    def __call__(self, qkv: Maps) -> Maps:
        qkv = Depthwise(self.size, self.dtype, use_bias=False, name="proj_in")(qkv)
        return Grouped(qkv.shape[-1] // self.head_dim, self.dtype, name="proj_out")(qkv)


class MultiscaleAttention(nn.Module):
    """Linear attention, on neighbourhoods too.

    diffusers turns to quadratic attention where H*W <= head_dim: the same function, with its
    sums in the other order.
    """

    head_dim: int
    multiscales: tuple[int, ...]
    dtype: str

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        rows, height, width, channels = x.shape
        inner = channels // self.head_dim * self.head_dim
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
        qkv = jnp.concatenate([dense(inner, name=f"to_{part}")(x) for part in "qkv"], axis=-1)
        scales = [qkv] + [
            Neighbourhood(size, self.head_dim, self.dtype, name=f"to_qkv_multiscale_{i}")(qkv)
            for i, size in enumerate(self.multiscales)
        ]
        # A group takes its query, key and value from consecutive channels: whatever their names
        # say, the three projections are cut across.
        groups = jnp.concatenate(scales, axis=-1)
        groups = groups.reshape(rows, height * width, -1, 3 * self.head_dim)
        h = linear_attention(*jnp.split(groups, 3, axis=-1))
        h = dense(channels, name="to_out")(h.reshape(rows, height, width, -1))
        return x + Norm(self.dtype, name="norm_out")(h)


class GatedConv(nn.Module):
    """Channels expanded 4 times, mixed over 3 x 3 places, gated and projected back."""

    dtype: str

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        channels = x.shape[-1]
        conv = functools.partial(nn.Conv, dtype=self.dtype)
        h = nn.silu(conv(8 * channels, (1, 1), name="conv_inverted")(x))
        h = Depthwise(3, self.dtype, name="conv_depth")(h)
        h, gate = jnp.split(h, 2, axis=-1)
        h = conv(channels, (1, 1), use_bias=False, name="conv_point")(h * nn.silu(gate))
        return x + Norm(self.dtype, name="norm")(h)


class AttentionBlock(nn.Module):
    head_dim: int
    multiscales: tuple[int, ...]
    dtype: str

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        x = MultiscaleAttention(self.head_dim, self.multiscales, self.dtype, name="attn")(x)
        return GatedConv(self.dtype, name="conv_out")(x)


class Downsample(nn.Module):
    """A convolution by steps of 2, and pixels moved into channels, averaged to as many."""

    features: int
    dtype: str

    @nn.compact
    def __call__(self, x: Maps) -> Float[Array, "B H//2 W//2 {self.features}"]:
        rows, height, width, channels = x.shape
        pixels = x.reshape(rows, height // 2, 2, width // 2, 2, channels)
        pixels = pixels.transpose(0, 1, 3, 5, 2, 4)
        pixels = pixels.reshape(rows, height // 2, width // 2, self.features, -1)
        # "SAME" would pad on the right and at the bottom only.
        conv = nn.Conv(self.features, (3, 3), 2, padding=1, dtype=self.dtype, name="conv")
        return conv(x) + pixels.mean(-1)


class Upsample(nn.Module):
    """Nearest neighbours and a convolution, and channels, repeated, moved into pixels."""

    features: int
    dtype: str

    @nn.compact
    def __call__(self, x: Maps) -> Float[Array, "B 2*H 2*W {self.features}"]:
        rows, height, width, channels = x.shape
        pixels = x.repeat(4 * self.features // channels, axis=-1)
        pixels = pixels.reshape(rows, height, width, self.features, 2, 2)
        pixels = pixels.transpose(0, 1, 4, 2, 5, 3).reshape(rows, 2 * height, 2 * width, -1)
        nearest = x.repeat(2, axis=1).repeat(2, axis=2)
        return nn.Conv(self.features, (3, 3), dtype=self.dtype, name="conv")(nearest) + pixels


def layer(config: Config, tower: Tower, level: int, name: str) -> nn.Module:
    if tower.blocks[level] == RES_BLOCK:
        return ResBlock(config.dtype, name=name)
    return AttentionBlock(config.head_dim, tower.multiscales[level], config.dtype, name=name)


class Encoder(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Images) -> Latents:
        c, tower = self.config, self.config.encoder
        x = nn.Conv(tower.widths[0], (3, 3), dtype=c.dtype, name="conv_in")(x)
        for level, layers in enumerate(tower.layers):
            block = f"down_blocks_{level}"
            for i in range(layers):
                x = layer(c, tower, level, f"{block}_{i}")(x)
            if level + 1 < len(tower.widths):
                x = Downsample(tower.widths[level + 1], c.dtype, name=f"{block}_{layers}")(x)
        averaged = x.reshape(*x.shape[:-1], c.latent_channels, -1).mean(-1)
        return averaged + nn.Conv(c.latent_channels, (3, 3), dtype=c.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, z: Latents) -> Images:
        c, tower = self.config, self.config.decoder
        width, coarsest = tower.widths[-1], len(tower.widths) - 1
        z = z.astype(c.dtype)
        x = nn.Conv(width, (3, 3), dtype=c.dtype, name="conv_in")(z)
        x = x + z.repeat(width // c.latent_channels, axis=-1)
        for level in range(coarsest, -1, -1):
            block, resampled = f"up_blocks_{level}", level < coarsest
            if resampled:
                x = Upsample(tower.widths[level], c.dtype, name=f"{block}_0")(x)
            for i in range(tower.layers[level]):
                x = layer(c, tower, level, f"{block}_{i + resampled}")(x)
        x = nn.relu(Norm(c.dtype, name="norm_out")(x))
        return nn.Conv(3, (3, 3), dtype=c.dtype, name="conv_out")(x)


class Autoencoder(autoencoder.Autoencoder):
    """Of the published class."""

    config: Config

    def setup(self):
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def to_latents(self, images: Images) -> Latents:
        return self.encoder(images).astype(jnp.float32) * self.config.scaling_factor

    def to_images(self, latents: Latents) -> Images:
        return self.decoder(latents / self.config.scaling_factor)


def table(config: Config) -> names.NameTable:
    """Of the published checkpoint."""
    layout = lambda path, ndim: {1: "same", 2: "linear", 4: "conv"}[ndim]
    return names.NameTable(names.spelled(Autoencoder(config), image_inputs(config), layout))
