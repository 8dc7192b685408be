"""The Qwen-Image transformer: 60 double-stream blocks over image patches and text tokens.

The same function as diffusers' QwenImageTransformer2DModel, with TwinFlow's second time: the
modulation starts from E1(t) + (t - r) E2(r), or sees r otherwise (`conditioning.TIMES`). Two
things are laid out otherwise than there.
Images come first and text last in the joint sequence, so that one length per row masks the
padding; position comes from rotary angles alone, so the order makes no difference. And the
AdaLN projections, a third of the weights, act on one vector per row: they stand outside the
scan over blocks, and each block is given its own slice of their outputs.
"""

import dataclasses
import re

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from twinflow_jax.arrays import AnyArray, Latents, Lengths, Maps, TextTokens, Times
from twinflow_jax.keys import option
from twinflow_jax.models import names, patches, settings
from twinflow_jax.models.axes import tokens
from twinflow_jax.models.conditioning import SinusoidEmbedder, embedder_names
from twinflow_jax.models.heads import axes_problems, rotate
from twinflow_jax.models.projections import dense, rms_norm
from twinflow_jax.models.settings import TextSettings
from twinflow_jax.models.stack import run_layers
from twinflow_jax.models.streams import (
    EPSILON,
    TEXT,
    Modulation,
    Stream,
    attend,
    modulated,
    stream_names,
)

ROPE_BASE = 10_000.0

CLASS = "QwenImageTransformer2DModel"
# Keys of config.json: our field and the published class's default.
_FIELDS = {
    "num_layers": ("layers", 60),
    "num_attention_heads": ("heads", 24),
    "attention_head_dim": ("head_dim", 128),
    "joint_attention_dim": ("text_width", 3584),
    "axes_dims_rope": ("rope_axes", (16, 56, 56)),
    "zero_cond_t": ("zero_cond_t", False),
}
_ONLY = {
    "_class_name": CLASS, "patch_size": 2, "guidance_embeds": False,
    "use_additional_t_cond": False, "use_layer3d_rope": False,
}
_CHANNELS = {"in_channels": 64, "out_channels": 16}
_HARMLESS = ("pooled_projection_dim",)  # written by the published pipeline, read by nothing


@dataclasses.dataclass(frozen=True)
class Config(TextSettings):
    """The published values."""

    name: str = "qwen_image"
    sample_shape: tuple[int, ...] = (64, 64, 16)
    layers: int = option(60, "of the transformer", least=1)
    heads: int = option(24, "of attention", least=1)
    head_dim: int = option(128, "channels of a head", least=1)
    latent_channels: int = option(16, "of the autoencoder", least=1)
    patch: int = option(2, "latents a token covers along each side", least=1)
    text_width: int = option(3584, "of the text tokens", least=1)
    rope_axes: tuple[int, int, int] = option(
        (16, 56, 56), "channels of a head rotated by its token's frame, row and column", least=1
    )
    zero_cond_t: bool = option(
        False, "whether reference images are modulated as at t = 0 (Edit-2511)"
    )

    splits_tokens = True

    def problems(self) -> list[str]:
        return super().problems() + axes_problems(self.rope_axes, self.head_dim)

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @classmethod
    def from_published(cls, config: dict) -> "Config":
        """As `family.PublishedConfig` says."""
        values, mistyped, problems = settings.published(
            config, _FIELDS, _ONLY, (*_CHANNELS, *_HARMLESS)
        )
        packed, out = (config.get(key, value) for key, value in _CHANNELS.items())
        channels = out or packed  # the published class reads null as in_channels
        if packed != 4 * channels:
            problems.append(f"in_channels {packed} is not 4 times out_channels {channels}")
        settings.refuse("config.json of the transformer", problems + mistyped)
        return cls(**values, latent_channels=channels, sample_shape=(64, 64, channels))


def positions(grids: tuple[tuple[int, int], ...], text_length: int) -> Int[np.ndarray, "S 3"]:
    """(frame, row, column) of every token of the joint sequence.

    grids: token rows and columns of the target, then of each reference image. Rows and columns
    count from the image's centre; text goes on along the diagonal, outside the largest image.
    """
    tokens = []
    for frame, (height, width) in enumerate(grids):
        rows, columns = (np.arange(side) - (side - side // 2) for side in (height, width))
        mesh = np.meshgrid([frame], rows, columns, indexing="ij")
        tokens.append(np.stack(mesh, axis=-1).reshape(-1, 3))
    start = max(side // 2 for grid in grids for side in grid)
    tokens.append(np.repeat(start + np.arange(text_length)[:, None], 3, axis=1))
    return np.concatenate(tokens)


def rotary(
    places: Int[np.ndarray, "S 3"], axes: tuple[int, ...]
) -> tuple[Float[np.ndarray, "S half"], Float[np.ndarray, "S half"]]:
    """Cosines and sines, float32, of the angle of every pair of a head's channels."""
    frequencies = [ROPE_BASE ** (-np.arange(0, width, 2) / width) for width in axes]
    angles = np.concatenate(
        [places[:, i, None] * frequency for i, frequency in enumerate(frequencies)], axis=1
    )
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def pack(latents: Latents, patch: int) -> Float[Array, "B S c*{patch}**2"]:
    """Patches as tokens; their channels by latent channel, then row, then column."""
    rows, height, width, channels = latents.shape
    x = latents.reshape(rows, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(rows, -1, channels * patch * patch)


def unpack(tokens: Float[Array, "B S D"], grid: tuple[int, int], patch: int) -> Latents:
    """The inverse of `pack`."""
    x = tokens.reshape(tokens.shape[0], *grid, -1, patch, patch)
    rows, height, width, channels = x.shape[:4]
    x = x.transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(rows, height * patch, width * patch, channels)


class Block(nn.Module):
    """`(streams, ...) -> (streams, None)`; streams = (image, text)."""

    config: Config

    def setup(self):
        self.image = Stream(self.config)
        self.text = Stream(self.config)

    def __call__(
        self, streams: tuple[Float[Array, "B S D"], TextTokens],
        image_modulation: Float[Array, "B K 6*D"], text_modulation: Float[Array, "B 1 6*D"],
        lengths: Lengths,
        angles: tuple[Float[AnyArray, "S+L half"], Float[AnyArray, "S+L half"]],
        is_reference: Bool[AnyArray, "S"],
    ):
        image, text = (checkpoint_name(tokens(h), "block_input") for h in streams)
        image_terms, text_terms = (
            jnp.split(m, 6, axis=-1) for m in (image_modulation, text_modulation)
        )
        if image_modulation.shape[1] == 2:  # of the target, of the references
            image_terms = [
                jnp.where(is_reference[None, :, None], m[:, 1:], m[:, :1]) for m in image_terms
            ]
        parts = (
            self.image.heads(image, *image_terms[:2]), self.text.heads(text, *text_terms[:2])
        )
        angles = [a[None] for a in angles]
        attended = attend(parts, lengths, lambda heads: rotate(heads, *angles))
        first, last = attended[:, : image.shape[1]], attended[:, image.shape[1] :]
        image = self.image.update(image, first, *image_terms[2:])
        text = self.text.update(text, last, *text_terms[2:])
        return (tokens(image), tokens(text)), None


class Transformer(nn.Module):
    """Velocity of latents under text and, for editing, reference images.

    `(x_t (B, H, W, C), t (B,), r (B,), cond) -> (B, H, W, C)`, float32; H and W are multiples
    of the patch, t and r are in [-1, 1]. cond: {"tokens": (B, L, text_width), "mask": (B, L),
    true at each row's valid tokens, which come before its padding; "references": optional
    tuple of latents (B, h, w, C)}. Rows do not depend on L.

    Raises:
      UserError: latents whose sides are no multiples of the patch.
    """

    config: Config

    @nn.compact
    def __call__(self, x_t: Maps, t: Times, r: Times, cond: dict) -> Maps:
        c = self.config
        images = (x_t, *cond.get("references", ()))
        grids = tuple(patches.grid(image, c.patch) for image in images)
        packed = jnp.concatenate([pack(image, c.patch) for image in images], axis=1)
        image = dense(c, c.width, (None, None), name="image_in")(packed)
        text = rms_norm(EPSILON, c.dtype, name="text_norm")(cond["tokens"])
        text = dense(c, c.width, ("text", None), name="text_in")(text)

        times = c.times
        embedder = SinusoidEmbedder(c, scale=1000.0, name="time_embedder")
        context = embedder(times.first(t, r)).astype(jnp.float32)
        if times.second:
            second = SinusoidEmbedder(c, scale=1000.0, last=times.last, name=times.second)
            context += times.weight(t, r)[:, None] * second(r)
        context = nn.silu(context)[:, None]
        image_context = context
        if c.zero_cond_t and len(images) > 1:
            still = nn.silu(embedder(jnp.zeros_like(t)).astype(jnp.float32))[:, None]
            image_context = jnp.concatenate([context, still], axis=1)

        count, target = image.shape[1], grids[0][0] * grids[0][1]
        image, _ = run_layers(
            self, Block, c.layers, c.remat, (image, text),
            per_layer=Modulation(c, c.layers, name="modulation")(image_context, context),
            per_row=(count + cond["mask"].astype(jnp.int32).sum(1),),
            constants=(
                rotary(positions(grids, text.shape[1]), c.rope_axes), np.arange(count) >= target
            ),
        )

        zeros, channels = nn.initializers.zeros, c.latent_channels * c.patch**2
        final = dense(c, 2 * c.width, ("embed", "modulation"), "final_modulation", kernel=zeros)
        scale, shift = jnp.split(final(context), 2, axis=-1)
        out = dense(c, channels, ("embed", None), "out", kernel=zeros)
        velocity = out(modulated(image[:, :target], shift, scale)).astype(jnp.float32)
        return unpack(velocity, grids[0], c.patch)


_BLOCK = (*stream_names("image", "img_mlp"), *stream_names("text", "txt_mlp", TEXT))


def table(config: Config) -> names.NameTable:
    """The published tensors' names; TwinFlow's second embedder starts as a copy of the first."""
    name, times = "time_text_embed", config.times
    first = embedder_names(f"{name}.timestep_embedder", "time_embedder")
    second = embedder_names(f"{name}{times.suffix}.timestep_embedder", times.second)
    start = lambda key: {} if times.last else {"copy_of": key, "group": names.KNOWS_R}
    single = (
        *names.linear("img_in", "image_in"),
        ("txt_norm.weight", "text_norm/scale", "same"),
        *names.linear("txt_in", "text_in"),
        *first,
        *names.linear("norm_out.linear", "final_modulation"),
        *names.linear("proj_out", "out"),
    )
    of_r = (
        names.Rule(*rule, **start(source[0])) for rule, source in zip(second, first, strict=True)
    )
    modulation = names.linear("img_mod.1", "image") + names.linear("txt_mod.1", "text")
    rotated = re.compile("/(query|key)(_norm)?/")
    block = (
        dataclasses.replace(rule, pairs=config.head_dim) if rotated.search(rule.path) else rule
        for rule in names.stack("transformer_blocks", _BLOCK, "layers", config.layers)
    )
    return names.NameTable(
        rules=(
            *(names.Rule(*rule) for rule in single),
            *(of_r if times.second else ()),
            *names.stack("transformer_blocks", modulation, "modulation", config.layers),
            *block,
        ),
        prefixes=names.TRAINERS,
    )
