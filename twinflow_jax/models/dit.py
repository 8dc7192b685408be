"""A small diffusion transformer with stacked, scanned layers.

Patches and, where there are any, text tokens share one sequence (joint attention); times and
the class (or mean text token) modulate every block (AdaLN-zero). Layers are one set of
parameters with a leading `layers` axis, so that compile time does not grow with depth.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from twinflow_jax.errors import UserError
from twinflow_jax.models import conditioning, remat
from twinflow_jax.models.stack import run_layers


@dataclasses.dataclass(frozen=True)
class Config:
    """sample_shape: (H, W, C), H and W divisible by patch. remat: one of remat.POLICIES."""

    name: str = "dit"
    sample_shape: tuple[int, ...] = (28, 28, 1)
    patch: int = 4
    width: int = 96
    depth: int = 4
    heads: int = 4
    num_classes: int = 10
    remat: str = "none"

    def __post_init__(self):
        shape = self.sample_shape
        if len(shape) != 3 or shape[0] % self.patch or shape[1] % self.patch:
            raise UserError(
                f"model 'dit' with patch {self.patch} cannot take samples of shape {shape}: "
                "height and width must divide by model.patch"
            )
        if self.width % (4 * self.heads):
            raise UserError(
                f"model.width {self.width} must divide by 4 and by model.heads {self.heads}"
            )
        remat.check(self.remat)


def position_features(height: int, width: int, channels: int) -> Float[Array, "HW channels"]:
    """Fixed 2-D sine and cosine features: half the channels for rows, half for columns."""
    def axis(n):
        frequencies = 1.0 / 100.0 ** (jnp.arange(channels // 4) / (channels // 4))
        angles = jnp.arange(n)[:, None] * frequencies
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    rows = jnp.repeat(axis(height), width, axis=0)
    columns = jnp.tile(axis(width), (height, 1))
    return jnp.concatenate([rows, columns], axis=-1)


class Block(nn.Module):
    """Attention and feed-forward, both modulated; `(h, ...) -> (h, None)`."""

    config: Config

    @nn.compact
    def __call__(
        self, h: Float[Array, "B S D"], context: Float[Array, "B D"],
        mask: Bool[Array, "B 1 1 S"] | None,
    ):
        c = self.config
        norm = nn.LayerNorm(use_bias=False, use_scale=False)
        modulation = nn.Dense(6 * c.width, kernel_init=nn.initializers.zeros)(context)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(
            modulation[:, None], 6, axis=-1
        )
        attended = nn.MultiHeadDotProductAttention(c.heads, qkv_features=c.width)(
            norm(h) * (1 + scale_1) + shift_1, mask=mask
        )
        h = h + gate_1 * attended
        inner = nn.gelu(nn.Dense(4 * c.width)(norm(h) * (1 + scale_2) + shift_2))
        return h + gate_2 * nn.Dense(c.width)(inner), None


class DiT(nn.Module):
    config: Config

    @nn.compact
    def __call__(
        self, x_t: Float[Array, "B H W C"], t: Float[Array, "B"], r: Float[Array, "B"], cond: dict
    ) -> Float[Array, "B H W C"]:
        c = self.config
        rows, (height, width, channels), p = x_t.shape[0], c.sample_shape, c.patch
        grid = (height // p, width // p)
        patches = x_t.reshape(rows, grid[0], p, grid[1], p, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(rows, grid[0] * grid[1], -1)
        h = nn.Dense(c.width)(patches) + position_features(*grid, c.width)

        times = conditioning.SinusoidTime(c.width)(t) + conditioning.SinusoidTime(c.width)(t - r)
        context = times + conditioning.Condition(c.width, c.num_classes)(cond, rows)
        mask = None
        if "tokens" in cond:
            h = jnp.concatenate([nn.Dense(c.width)(cond["tokens"]), h], axis=1)
            image = jnp.ones((rows, grid[0] * grid[1]), bool)
            mask = jnp.concatenate([cond["mask"].astype(bool), image], axis=1)[:, None, None]

        h = run_layers(self, Block, c.depth, c.remat, h, per_row=(nn.silu(context), mask))
        h = nn.LayerNorm()(h[:, -grid[0] * grid[1] :])
        out = nn.Dense(p * p * channels, kernel_init=nn.initializers.zeros)(h)
        out = out.reshape(rows, *grid, p, p, channels).transpose(0, 1, 3, 2, 4, 5)
        return x_t - out.reshape(x_t.shape)
