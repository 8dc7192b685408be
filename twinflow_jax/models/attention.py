"""Attention over a batch of sequences, on whatever device there is."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attention(
    query: Float[Array, "B T N D"], key: Float[Array, "B S K D"], value: Float[Array, "B S K D"],
    lengths: Int[Array, "B"] | None = None, causal: bool = False,
) -> Float[Array, "B T N D"]:
    """Softmax attention, scaled by 1/sqrt(D), with float32 scores.

    lengths: keys from this one on are padding and get no weight (default: all count); a row
    needs at least one. Fewer key heads than query heads are shared among them (N a multiple
    of K). causal: a query sees the keys up to its own place.
    """
    half, width = query.dtype in (jnp.bfloat16, jnp.float16), query.shape[-1]
    fits = half and width <= 128 and width % 8 == 0  # what every cuDNN kernel takes
    flash = "cudnn" if fits and jax.default_backend() == "gpu" else "xla"
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths, is_causal=causal, implementation=flash
    )
