"""Attention over a batch of sequences, on whatever device there is."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attention(
    query: Float[Array, "B T N D"], key: Float[Array, "B S K D"], value: Float[Array, "B S K D"],
    lengths: Int[Array, "B"] | None = None, causal: bool = False, softcap: float | None = None,
) -> Float[Array, "B T N D"]:
    """Softmax attention, scaled by 1/sqrt(D), with float32 scores.

    lengths: keys from this one on are padding and get no weight (default: all count); a row
    needs at least one. Fewer key heads than query heads are shared among them (N a multiple
    of K). causal: a query sees the keys up to its own place. softcap: bounds the scores s, as
    softcap tanh(s / softcap).
    """
    if softcap is not None:
        return _softcapped(query, key, value, lengths, causal, softcap)
    half, width = query.dtype in (jnp.bfloat16, jnp.float16), query.shape[-1]
    fits = half and width <= 128 and width % 8 == 0  # what every cuDNN kernel takes
    flash = "cudnn" if fits and jax.default_backend() == "gpu" else "xla"
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths, is_causal=causal, implementation=flash
    )


def _softcapped(query, key, value, lengths, causal: bool, softcap: float):
    """By hand: jax.nn.dot_product_attention has no softcap."""
    groups = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    scores = jnp.einsum("BTKGD,BSKD->BKGTS", groups, key, preferred_element_type=jnp.float32)
    scores = softcap * jnp.tanh(scores / (softcap * query.shape[3] ** 0.5))
    places = jnp.arange(key.shape[1])
    lengths = jnp.array([len(places)]) if lengths is None else lengths
    seen = places < lengths[:, None, None]
    if causal:
        seen &= places <= jnp.arange(query.shape[1])[:, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf))
    return jnp.einsum("BKGTS,BSKD->BTKGD", weights.astype(value.dtype), value).reshape(query.shape)
