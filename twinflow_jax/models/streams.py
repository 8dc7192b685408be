"""Two streams of tokens, image and text, that attend to each other (MMDiT, arXiv 2403.03206).

What the blocks of Qwen-Image and of Stable Diffusion 3 have in common.
"""

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from twinflow_jax.arrays import Lengths
from twinflow_jax.models import names
from twinflow_jax.models.adapters import adapted
from twinflow_jax.models.attention import attention
from twinflow_jax.models.axes import contract_in_place
from twinflow_jax.models.heads import HeadProjection
from twinflow_jax.models.int8 import is_quantised
from twinflow_jax.models.projections import dense, rms_norm

EPSILON = 1e-6  # of every norm


def modulated(
    h: Float[Array, "B S D"], shift: Float[Array, "B #S D"], scale: Float[Array, "B #S D"]
) -> Float[Array, "B S D"]:
    """h with zero mean and unit variance, scaled by 1 + scale and shifted; float32."""
    h = h.astype(jnp.float32)
    centred = h - h.mean(-1, keepdims=True)
    normal = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + EPSILON)
    return normal * (1.0 + scale.astype(jnp.float32)) + shift


class StackedDense(nn.Module):
    """The AdaLN projection of several layers at once, for one stream.

    Outside the scan over layers: a third of a network's weights, which act on one vector per row.
    terms: of a layer, each of the model's width.
    """

    config: Any
    layers: int
    terms: int

    @nn.compact
    def __call__(
        self, context: Float[Array, "B K D"]
    ) -> Float[Array, "{self.layers} B K {self.terms}*D"]:
        c, zeros = self.config, nn.initializers.zeros
        features = self.terms * c.width
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(zeros, (None, "embed", "modulation")),
            (self.layers, c.width, features),
        )
        bias = self.param(
            "bias", nn.with_logical_partitioning(zeros, (None, "modulation")),
            (self.layers, features),
        )
        context, bias = context.astype(c.dtype), bias.astype(c.dtype)
        # Over a mesh the small outputs travel, never the kernel.
        if is_quantised(kernel):  # nor is it multiplied out: its products are
            out = contract_in_place(context, kernel.values.astype(c.dtype))
            out = (out * kernel.scale[:, None]).astype(c.dtype)
        else:
            out = contract_in_place(context, kernel.astype(c.dtype))
        out += bias[:, None, None]
        return adapted(self, out, context, kernel.shape, stacked=True)


class Modulation(nn.Module):
    """The modulation vectors of both streams, of several layers.

    terms: of the image and of the text.
    """

    config: Any
    layers: int
    terms: tuple[int, int] = (6, 6)

    def setup(self):
        self.image, self.text = (
            StackedDense(self.config, self.layers, terms) for terms in self.terms
        )

    def __call__(self, image: Float[Array, "B K D"], text: Float[Array, "B 1 D"]):
        return self.image(image), self.text(text)


class Stream(nn.Module):
    """What a block does with one of its streams, before and after an attention.

    Only parts that are called have weights. qk_norm: whether each head's query and key are
    normalised.
    """

    config: Any
    qk_norm: bool = True

    def setup(self):
        c = self.config
        self.query = HeadProjection(c)
        self.key = HeadProjection(c)
        self.value = HeadProjection(c)
        self.out = dense(c, c.width, ("heads", "embed"))
        norm = lambda: rms_norm(EPSILON, "float32") if self.qk_norm else lambda x: x
        self.query_norm, self.key_norm = norm(), norm()
        self.mlp_hidden = dense(c, 4 * c.width, ("embed", "mlp"))
        self.mlp_out = dense(c, c.width, ("mlp", "embed"))

    def heads(self, h: Float[Array, "B S D"], shift, scale) -> tuple[Array, Array, Array]:
        """Queries and keys, float32 where normalised, and values: (B, heads, S, head_dim)."""
        h = modulated(h, shift, scale).astype(self.config.dtype)
        return self.query_norm(self.query(h)), self.key_norm(self.key(h)), self.value(h)

    def update(
        self, h: Float[Array, "B S D"], attended: Float[Array, "B S D"], gate_1, shift, scale,
        gate_2,
    ) -> Float[Array, "B S D"]:
        """The stream after the two residual branches, attention and feed-forward."""
        h = h + gate_1 * self.out(attended)
        hidden = self.mlp_hidden(modulated(h, shift, scale))
        hidden = nn.gelu(checkpoint_name(hidden, "mlp_hidden"), approximate=True)
        return h + gate_2 * self.mlp_out(hidden)


def attend(
    parts: Iterable[tuple[Array, Array, Array]], lengths: Lengths | None,
    turn: Callable[[Array], Array] = lambda heads: heads,
) -> Float[Array, "B S D"]:
    """What all tokens of several streams see of each other, one stream after the other.

    parts: what `Stream.heads` gives of each. lengths: of each row's valid tokens, which are its
    first ones. turn: rotates queries and keys.
    """
    query, key, value = (jnp.concatenate(part, axis=2) for part in zip(*parts, strict=True))
    query, key = (turn(a).astype(value.dtype) for a in (query, key))
    query, key, value = (jnp.swapaxes(a, 1, 2) for a in (query, key, value))
    attended = attention(
        checkpoint_name(query, "query"), checkpoint_name(key, "key"),
        checkpoint_name(value, "value"), lengths=lengths,
    )
    attended = checkpoint_name(attended, "attention_output")
    return attended.reshape(*attended.shape[:2], -1)


# The published names of an attention's tensors: of the image, and of the text in a joint one.
IMAGE = ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")
TEXT = (
    "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k",
)


def stream_names(
    path: str, mlp: str, of: tuple[str, ...] = IMAGE, attention: str = "attn",
    qk_norm: bool = True, goes_on: bool = True,
) -> tuple[tuple[str, str, str], ...]:
    """(key, path, layout) of a stream's tensors.

    mlp: the name of its feed-forward part, "" without one. goes_on: whether the stream has more
    than the part of a joint attention that others see.
    """
    query, key, value, out, query_norm, key_norm = of
    return (
        *names.linear(f"{attention}.{query}", f"{path}/query"),
        *names.linear(f"{attention}.{key}", f"{path}/key"),
        *names.linear(f"{attention}.{value}", f"{path}/value"),
        *(names.linear(f"{attention}.{out}", f"{path}/out") if goes_on else ()),
        *((
            (f"{attention}.{query_norm}.weight", f"{path}/query_norm/scale", "same"),
            (f"{attention}.{key_norm}.weight", f"{path}/key_norm/scale", "same"),
        ) if qk_norm else ()),
        *((
            *names.linear(f"{mlp}.net.0.proj", f"{path}/mlp_hidden"),
            *names.linear(f"{mlp}.net.2", f"{path}/mlp_out"),
        ) if mlp else ()),
    )
