"""The vision tower of Qwen2.5-VL: pictures to tokens for the language tower.

A token is of 28x28 pixels: 2x2 patches, which stand one after the other. Most layers attend within
windows of 112x112 pixels, some within a whole picture, none across pictures. transformers' module
brings the patches of a window together; here they stay where they are, and a mask says who sees
whom.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from twinflow_jax.arrays import TextTokens
from twinflow_jax.models import names, settings
from twinflow_jax.models.attention import attention
from twinflow_jax.models.axes import init_of, rows
from twinflow_jax.models.decoder import Angles, GatedMLP, rotate
from twinflow_jax.models.projections import UNIT_VARIANCE, dense, rms_norm
from twinflow_jax.models.stack import run_layers

EPSILON = 1e-6  # of every norm
ROPE_BASE = 10_000.0
STACK = "vision_layers"

# Of a published vision_config: our field and the default of transformers' class.
FIELDS = {
    "depth": ("layers", 32),
    "hidden_size": ("width", 3584),
    "num_heads": ("heads", 16),
    "intermediate_size": ("hidden", 3420),
    "out_hidden_size": ("out", 3584),
    "patch_size": ("patch", 14),
    "temporal_patch_size": ("frames", 2),
    "spatial_merge_size": ("merge", 2),
    "window_size": ("window", 112),
    "fullatt_block_indexes": ("whole", (7, 15, 23, 31)),
}
ONLY = {"hidden_act": "silu", "in_channels": 3, "in_chans": 3}
# Of videos, said elsewhere, or checked below.
OTHERS = (
    "tokens_per_second", "spatial_patch_size", "model_type", "initializer_range", "dtype",
    "torch_dtype", "rope_parameters",
)
ROPE = {"rope_theta": ROPE_BASE, "rope_type": "axial"}


@dataclasses.dataclass(frozen=True)
class Config:
    """The published Qwen2.5-VL-7B's. window, patch: pixels a side. merge: patches a side that make
    a token. whole: the layers that attend within a whole picture. out: width of the tokens.
    dtype: of the computation, "float32" or "bfloat16"."""

    layers: int = 32
    width: int = 1280
    heads: int = 16
    hidden: int = 3420
    out: int = 3584
    patch: int = 14
    frames: int = 2
    merge: int = 2
    window: int = 112
    whole: tuple[int, ...] = (7, 15, 23, 31)
    dtype: str = "float32"

    @property
    def unit(self) -> int:
        """Pixels a side of a token."""
        return self.patch * self.merge

    @classmethod
    def from_published(cls, config: dict) -> "Config":
        """From the "vision_config" of a text encoder's config.json; raises as
        `family.PublishedConfig` says."""
        values, mistyped, problems = settings.published(config, FIELDS, ONLY, OTHERS)
        problems += settings.other_values(config.get("rope_parameters") or {}, ROPE)
        if not mistyped:
            made = cls(**values)
            if made.width % (4 * made.heads):
                problems.append("hidden_size is no multiple of 4 num_heads")
            if made.window % made.unit:
                problems.append("window_size is no multiple of patch_size x spatial_merge_size")
        settings.refuse("vision_config of the text encoder", problems + mistyped)
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Places:
    """Of every patch of some pictures, in the order in which the layers have them: row and column
    in its picture, and which window and which picture it is of."""

    where: Int[np.ndarray, "S 2"]
    window: Int[np.ndarray, "S"]
    picture: Int[np.ndarray, "S"]


def places(config: Config, grids: tuple[tuple[int, int], ...]) -> Places:
    """grids: rows and columns of each picture's patches, multiples of `merge`."""
    side = config.window // config.unit  # tokens of a window
    where, window, picture, windows = [], [], [], 0
    for number, (height, width) in enumerate(grids):
        index = _merged(np.stack(np.indices((height, width)), -1)[None], config.merge)[0]
        token = index // config.merge // side
        across = -(-width // config.merge // side)
        where.append(index)
        window.append(windows + token[:, 0] * across + token[:, 1])
        picture.append(np.full(len(index), number))
        windows = window[-1].max() + 1
    return Places(*map(np.concatenate, (where, window, picture)))


def angles(config: Config, where: Int[np.ndarray, "S 2"]) -> Float[np.ndarray, "S half"]:
    """Of rotation: of half of a head's channels by the patch's row, then by its column."""
    quarter = config.width // config.heads // 4
    frequencies = ROPE_BASE ** (-np.arange(quarter, dtype=np.float32) / np.float32(quarter))
    return (where[:, :, None] * frequencies.astype(np.float32)).reshape(len(where), -1).astype(
        np.float32
    )


def _merged(maps, merge: int):
    """(B, h, w, D) -> (B, h w, D): the patches of a token one after the other."""
    rows, height, width, channels = maps.shape
    x = maps.reshape(rows, height // merge, merge, width // merge, merge, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(rows, -1, channels)


class Block(nn.Module):
    """Attention where it may look, then SwiGLU; `(h, ...) -> (h, None)`. config: has `vision`."""

    config: object

    @nn.compact
    def __call__(
        self, h: TextTokens, is_whole: Bool[Array, "B"], turns: Angles,
        window: Int[np.ndarray, "S"], picture: Int[np.ndarray, "S"],
    ):
        c, h = self.config.vision, rows(h)
        x = rms_norm(EPSILON, c.dtype, "attention_norm")(h)
        qkv = dense(c, 3 * c.width, ("embed", None), "qkv")(x)
        query, key, value = jnp.split(qkv.reshape(*x.shape[:2], 3 * c.heads, -1), 3, axis=2)
        alike = lambda group: group[:, None] == group[None]
        seen = jnp.where(is_whole[:1, None, None, None], alike(picture), alike(window))
        attended = attention(
            rotate(query, turns), rotate(key, turns), value,
            bias=jnp.where(seen, 0.0, -1e30).astype(x.dtype),
        )
        h = h + dense(c, c.width, (None, "embed"), "out")(attended.reshape(x.shape))
        inner = rms_norm(EPSILON, c.dtype, "mlp_norm")(h)
        return h + GatedMLP(c, nn.silu, bias=True, name="mlp")(inner), None


def tokens(
    module: nn.Module, pictures: tuple[Float[Array, "B _ _ 3"], ...]
) -> Float[Array, "B L D"]:
    """The tokens of all pictures of a row, one picture after the other, row by row in each.

    module: whose parameters these are; its config has `vision`. pictures: as `edit.pixels` makes
    them, sides multiples of `unit`.
    """
    c, p = module.config.vision, module.config.vision.patch
    kernel = module.param(
        "patches", init_of(UNIT_VARIANCE, None, None, None, None, None),
        (c.frames, p, p, 3, c.width),
    ).sum(0)  # a still is the same at all frames
    parts, grids = [], []
    for picture in pictures:
        count, height, width, _ = picture.shape
        grids.append((height // p, width // p))
        x = picture.reshape(count, height // p, p, width // p, p, 3).astype(c.dtype)
        parts.append(_merged(jnp.einsum("bhywxc,yxcd->bhwd", x, kernel.astype(c.dtype)), c.merge))
    h, at = jnp.concatenate(parts, axis=1), places(c, tuple(grids))
    is_whole = np.isin(np.arange(c.layers), c.whole)[:, None] & np.ones((1, len(h)), bool)
    h = run_layers(
        module, Block, c.layers, "none", h, per_layer=(jnp.asarray(is_whole),),
        constants=(angles(c, at.where), at.window, at.picture), name=STACK,
    )
    h = rms_norm(EPSILON, c.dtype, "merger_norm")(h)
    h = h.reshape(len(h), -1, c.merge**2 * c.width)
    h = jax.nn.gelu(
        dense(c, c.merge**2 * c.width, ("embed", "mlp"), "merger_in")(h), approximate=False
    )
    return dense(c, c.out, ("mlp", "embed"), "merger_out")(h)


def rules(config: Config) -> tuple[names.Rule, ...]:
    """The names in the published folder."""
    layer = (
        ("norm1.weight", "attention_norm/scale", "same"),
        ("norm2.weight", "mlp_norm/scale", "same"),
        *names.linear("attn.qkv", "qkv"),
        *names.linear("attn.proj", "out"),
        *names.linear("mlp.gate_proj", "mlp/gate"),
        *names.linear("mlp.up_proj", "mlp/up"),
        *names.linear("mlp.down_proj", "mlp/down"),
    )
    merger = (
        ("ln_q.weight", "merger_norm/scale", "same"),
        *names.linear("mlp.0", "merger_in"), *names.linear("mlp.2", "merger_out"),
    )
    return (
        names.Rule("visual.patch_embed.proj.weight", "patches", "conv3d"),
        *names.stack("visual.blocks", layer, STACK, config.layers),
        *(names.Rule(f"visual.merger.{key}", path, how) for key, path, how in merger),
    )
