"""Attention over a batch of sequences, on whatever device there is."""

import contextvars
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from twinflow_jax.arrays import Lengths
from twinflow_jax.models import axes
from twinflow_jax.models.context import setting

LANES = 128  # of a TPU's vectors, whole ones of which its kernel takes

_platform = contextvars.ContextVar("platform", default=None)
_plain = contextvars.ContextVar("attention without kernels", default=False)


def compiled_for(platform: str):
    """What is traced inside is for that platform ("tpu", "gpu", "cpu"), not for this machine."""
    return setting(_platform, platform)


def plain():
    """What is traced inside has no kernels: those have a gradient, but no derivative forwards."""
    return setting(_plain, True)


def attention(
    query: Float[Array, "B T heads D"], key: Float[Array, "B S kv_heads D"],
    value: Float[Array, "B S kv_heads D"], lengths: Lengths | None = None, causal: bool = False,
    softcap: float | None = None, bias: Float[Array, "#B #heads T S"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T heads D"]:
    """Softmax attention with float32 scores.

    lengths: keys from this one on are padding and get no weight (default: all count); a row
    needs at least one. Fewer key heads are shared among the query heads, whose number is
    a multiple of theirs. causal: a query sees the keys up to its own place. softcap: bounds the
    scores s, as softcap tanh(s / softcap). bias: added to the scores, which are then held whole.
    scale: of the scores (default: 1/sqrt(D)).
    """
    platform, width = _platform.get() or jax.default_backend(), query.shape[-1]
    scale = width**-0.5 if scale is None else scale
    if softcap is not None:
        if bias is not None:
            raise ValueError("softcap bounds scores without a bias")
        return _softcapped(query, key, value, lengths, causal, softcap, scale)
    alike = key.shape[2] == query.shape[2] and not causal and bias is None
    kernels = not _plain.get()
    if platform == "tpu" and width % (LANES // 2) == 0 and alike and kernels:
        if lengths is None:
            lengths = jnp.full(query.shape[:1], key.shape[1], jnp.int32)
        whole = ("rows", None, "heads", None)
        return axes.locally(
            functools.partial(splash, scale=scale), (query, ("rows", "tokens", "heads", None)),
            (key, whole), (value, whole), (lengths, ("rows",)),
        )
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    # What every cuDNN kernel takes.
    fits = half and width <= 128 and width % 8 == 0 and bias is None
    flash = "cudnn" if fits and platform == "gpu" and kernels else "xla"
    return jax.nn.dot_product_attention(
        query, key, value, bias, scale=scale, key_value_seq_lengths=lengths, is_causal=causal,
        implementation=flash,
    )


def splash(
    query: Float[Array, "B T heads D"], key: Float[Array, "B S heads D"],
    value: Float[Array, "B S heads D"], lengths: Lengths, scale: float, interpret: bool = False,
) -> Float[Array, "B T heads D"]:
    """The TPU's kernel, which never holds the scores. interpret: on any device, slowly.

    Heads that are not a multiple of 128 wide are filled up to one with zeros, which change nothing.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (  # half a second to import
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    tokens, width, (keys, heads) = query.shape[1], query.shape[3], key.shape[1:3]
    filled = ((0, 0), (0, 0), (0, 0), (0, -width % LANES))
    query, key, value = (jnp.pad(a, filled) for a in (query, key, value))
    (query, block_q), (key, block_kv), (value, _) = map(_blocks, (query, key, value))
    shape = query.shape[1], key.shape[1]
    attend = kernels.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask(shape)] * heads), head_shards=1, q_seq_shards=1,
        block_sizes=kernels.BlockSizes(
            block_q=block_q, block_kv=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv,
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name="attention_output", interpret=interpret,
    )
    # Keys of another segment than the queries' are not seen: the padding.
    own = jnp.zeros((shape[0],), jnp.int32)
    padding = (np.arange(shape[1])[None] >= jnp.minimum(lengths, keys)[:, None]).astype(jnp.int32)
    segments = jax.vmap(lambda kv: kernels.SegmentIds(own, kv))(padding)
    scaled = (query.astype(jnp.float32) * scale).astype(query.dtype)
    heads_first = [jnp.swapaxes(a, 1, 2) for a in (scaled, key, value)]
    return jnp.swapaxes(jax.vmap(attend)(*heads_first, segments), 1, 2)[:, :tokens, :, :width]


def _blocks(x: Float[Array, "B S heads D"]) -> tuple[Float[Array, "B T heads D"], int]:
    """x padded to whole blocks, and their size: 512 fits a TPU's vector memory at 24 x 128."""
    blocks = -(-x.shape[1] // 512)
    size = 128 * -(-x.shape[1] // (128 * blocks))  # the least padding for so many blocks
    return jnp.pad(x, ((0, 0), (0, blocks * size - x.shape[1]), (0, 0), (0, 0))), size


def _softcapped(query, key, value, lengths, causal: bool, softcap: float, scale: float):
    """By hand: jax.nn.dot_product_attention has no softcap."""
    groups = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    scores = jnp.einsum("BTKGD,BSKD->BKGTS", groups, key, preferred_element_type=jnp.float32)
    scores = softcap * jnp.tanh(scores / (softcap / scale))
    places = jnp.arange(key.shape[1])[None, None]
    lengths = jnp.array([key.shape[1]]) if lengths is None else lengths
    seen = places < lengths[:, None, None]
    if causal:
        seen &= places <= jnp.arange(query.shape[1])[None, :, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf))
    return jnp.einsum("BKGTS,BSKD->BTKGD", weights.astype(value.dtype), value).reshape(query.shape)
