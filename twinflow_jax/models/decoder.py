"""What the text encoders share: the parts of a causal language model and of its settings.

`config` has width, heads, kv_heads, head_dim, hidden, rope_theta, norm_eps and dtype.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from twinflow_jax.arrays import AnyArray, Lengths, TextIds, TextMask, TextTokens
from twinflow_jax.models import names, settings
from twinflow_jax.models.attention import attention
from twinflow_jax.models.axes import init_of, rows
from twinflow_jax.models.projections import dense, layer_norm, rms_norm
from twinflow_jax.models.stack import run_layers

Angles = Float[AnyArray, "*B L half"]  # of each place, for half of a head's channels

# What may stand in a text encoder's config.json, without effect on the states of a text.
HARMLESS = (
    "attention_dropout", "dtype", "initializer_range", "tie_word_embeddings", "torch_dtype",
    "transformers_version", "use_cache",
)
ROPE = ("rope_parameters", "rope_scaling", "rope_type", "type")

# The names of one layer's tensors, (key, path, layout), apart from its norms.
MLP_NAMES = (
    *names.linear("mlp.gate_proj", "mlp/gate", bias=False),
    *names.linear("mlp.up_proj", "mlp/up", bias=False),
    *names.linear("mlp.down_proj", "mlp/down", bias=False),
)
CLIP_NAMES = (  # of a layer of `after_norms`, these with its norms
    *names.norm("layer_norm1", "attention_norm"),
    *names.linear("self_attn.q_proj", "query"),
    *names.linear("self_attn.k_proj", "key"),
    *names.linear("self_attn.v_proj", "value"),
    *names.linear("self_attn.out_proj", "out"),
    *names.norm("layer_norm2", "mlp_norm"),
    *names.linear("mlp.fc1", "up"),
    *names.linear("mlp.fc2", "down"),
)


def attention_names(bias: bool, qk_norm: bool = False) -> tuple[tuple[str, str, str], ...]:
    """bias, qk_norm: as `Attention` has them."""
    norms = (
        ("self_attn.q_norm.weight", "attention/query_norm/scale", "same"),
        ("self_attn.k_norm.weight", "attention/key_norm/scale", "same"),
    )
    return (
        *(norms if qk_norm else ()),
        *names.linear("self_attn.q_proj", "attention/query", bias),
        *names.linear("self_attn.k_proj", "attention/key", bias),
        *names.linear("self_attn.v_proj", "attention/value", bias),
        *names.linear("self_attn.o_proj", "attention/out", bias=False),
    )


def published(
    config: Mapping[str, Any], table: Mapping[str, tuple[str, Any]], only: Mapping[str, Any],
    others: Iterable[str], rope_types: tuple[str, ...],
) -> tuple[dict[str, Any], list[str], list[str]]:
    """As `settings.published`, of a language model, with the settings of its rotary positions.

    rope_types: the kinds of these that are plain ones.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    values, mistyped, problems = settings.published(
        {**config, **rope}, table, only, (*others, *HARMLESS, *ROPE)
    )
    kinds = {rope.get("type"), rope.get("rope_type")} - {None, *rope_types}
    plain = " or ".join(map(repr, rope_types))
    problems += [f"the rope's type is {kind!r}, not {plain}" for kind in sorted(kinds, key=str)]
    if not mistyped and values["heads"] % values["kv_heads"]:
        problems.append("num_attention_heads is no multiple of num_key_value_heads")
    return values, mistyped, problems


def rope_angles(config, length: int) -> Float[np.ndarray, "{length} {config.head_dim}//2"]:
    """Of positions 0..length-1."""
    return np.arange(length, dtype=np.float32)[:, None] * frequencies(config)


def frequencies(config) -> Float[np.ndarray, "{config.head_dim}//2"]:
    """Of rotation. On the host: a power on the device is not exact enough."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    return 1 / np.float32(config.rope_theta) ** exponents


def rotate(
    x: Float[Array, "B L heads D"], angles: Angles
) -> Float[Array, "B L heads D"]:
    """Turns the i-th channel of the first half with the i-th of the second, in float32."""
    angles = angles[None] if angles.ndim == 2 else angles  # the same for all rows
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def embedded(module: nn.Module, ids: TextIds) -> TextTokens:
    """The tokens' rows of the module's parameter `embedding`."""
    c = module.config
    init = init_of(nn.initializers.normal(0.02), "vocab", "embed")
    embedding = module.param("embedding", init, (c.vocab, c.width))
    return jnp.take(embedding, ids, axis=0).astype(c.dtype)


def attended(
    config, h: TextTokens, inner: int, biased: bool = True, **how: Any
) -> Float[Array, "B L D"]:
    """What tokens see of each other, with as many heads of keys as of queries.

    Its projections are the calling module's. inner: width of all heads together. biased: whether
    projections have a bias. how: the rest of `attention`'s arguments.
    """
    parts = (
        dense(config, inner, ("embed", "heads"), name, biased)(h)
        for name in ("query", "key", "value")
    )
    split = (*h.shape[:2], config.heads, inner // config.heads)
    out = attention(*(part.reshape(split) for part in parts), **how).reshape(*h.shape[:2], inner)
    return dense(config, config.width, ("heads", "embed"), "out", biased)(out)


def after_norms(config, h: TextTokens, activation: Callable, **how: Any) -> TextTokens:
    """h with what attention and an MLP add, each after a norm: a layer of CLIP. Its parameters are
    the calling module's. how: of `attention`."""
    norm = lambda name: layer_norm(config.norm_eps, config.dtype, name)
    h = h + attended(config, norm("attention_norm")(h), config.width, **how)
    inner = dense(config, config.hidden, ("embed", "mlp"), "up")(norm("mlp_norm")(h))
    return h + dense(config, config.width, ("mlp", "embed"), "down")(activation(inner))


class Attention(nn.Module):
    """Causal attention with rotary positions; several query heads share one of keys and values.

    bias: of the projections to queries, keys and values. softcap: of the scores. qk_norm: whether
    each head's query and key are normalised.
    """

    config: Any
    bias: bool = False
    softcap: float | None = None
    qk_norm: bool = False

    @nn.compact
    def __call__(self, x: TextTokens, angles: Angles, lengths: Lengths) -> TextTokens:
        c = self.config

        def heads(count, axis, name):
            flat = dense(c, count * c.head_dim, ("embed", axis), name, self.bias)(x)
            each = flat.reshape(*flat.shape[:2], count, c.head_dim)
            if self.qk_norm and name != "value":
                each = rms_norm(c.norm_eps, c.dtype, f"{name}_norm")(each)
            return each

        query = rotate(heads(c.heads, "heads", "query"), angles)
        key = rotate(heads(c.kv_heads, "kv_heads", "key"), angles)
        value = heads(c.kv_heads, "kv_heads", "value")
        attended = attention(query, key, value, lengths, causal=True, softcap=self.softcap)
        attended = attended.reshape(*attended.shape[:2], -1)
        return dense(c, c.width, ("heads", "embed"), "out", bias=False)(attended)


class GatedMLP(nn.Module):
    config: Any
    activation: Callable
    bias: bool = False

    @nn.compact
    def __call__(self, x: TextTokens) -> TextTokens:
        c = self.config
        project = lambda features, axes, name: dense(c, features, axes, name, self.bias)
        gate = self.activation(project(c.hidden, ("embed", "mlp"), "gate")(x))
        up = project(c.hidden, ("embed", "mlp"), "up")(x)
        return project(c.width, ("mlp", "embed"), "down")(gate * up)


class QwenBlock(nn.Module):
    """Causal grouped-query attention, then SwiGLU; `(h, ...) -> (h, None)`.

    config: has bias and qk_norm too, which are `Attention`'s.
    """

    config: Any

    @nn.compact
    def __call__(self, h: TextTokens, lengths: Lengths, angles: Angles):
        c, h = self.config, rows(h)
        attended = Attention(c, bias=c.bias, qk_norm=c.qk_norm, name="attention")(
            rms_norm(c.norm_eps, c.dtype, "attention_norm")(h), angles, lengths
        )
        h = h + attended
        inner = rms_norm(c.norm_eps, c.dtype, "mlp_norm")(h)
        return h + GatedMLP(c, nn.silu, name="mlp")(inner), None


def qwen_names(config) -> tuple[tuple[str, str, str], ...]:
    """(key, path, layout) of a QwenBlock's tensors."""
    return (
        ("input_layernorm.weight", "attention_norm/scale", "same"),
        *attention_names(config.bias, config.qk_norm),
        ("post_attention_layernorm.weight", "mlp_norm/scale", "same"),
        *MLP_NAMES,
    )


def through_layers(
    module: nn.Module, block: type[nn.Module], h: TextTokens, mask: TextMask,
    angles: Float[Array, "B L half"] | None = None,
) -> TextTokens:
    """h after all blocks of a text encoder, `(h, lengths, angles) -> (h, None)`.

    mask: of each row the valid tokens, which are its first ones and at least one. angles: of
    rotation, of each row (default: of places 0, 1, ...).
    """
    config, given = module.config, () if angles is None else (angles,)
    return run_layers(
        module, block, config.layers, "none", h, per_row=(mask.sum(axis=-1), *given),
        constants=() if given else (rope_angles(config, h.shape[1]),),
    )
