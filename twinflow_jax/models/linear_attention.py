"""Linear attention: sums over keys first, so that the cost is linear in their number."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def linear_attention(
    query: Float[Array, "B S heads D"], key: Float[Array, "B S heads D"],
    value: Float[Array, "B S heads D"],
) -> Float[Array, "B S heads D"]:
    """The mean of the values under weights relu(query)·relu(key), computed in float32.

    Keys meet values before they meet queries, so that the cost is linear in S. The values are
    those of diffusers' SanaLinearAttnProcessor2_0 everywhere, and so is the gradient, except
    where a query's weights add up to less than 1e-6: there it is 0. The mean does not change
    when its query shrinks, so its gradient is a difference of terms that grow as 1/query; for a
    query with one channel left at 1e-15 the true value is 0 and rounding makes it 1e15.
    """
    # Rounded products would not cancel in the quotient and in its gradient.
    product = functools.partial(jnp.einsum, precision="highest")
    q, k, v = (a.astype(jnp.float32) for a in (nn.relu(query), nn.relu(key), value))
    weighted = product("bsnd,bnde->bsne", q, product("bsnd,bsne->bnde", k, v))
    total = product("bsnd,bnd->bsn", q, k.sum(1))[..., None]
    mean = weighted / (total + 1e-15)
    return jnp.where(total > 1e-6, mean, jax.lax.stop_gradient(mean)).astype(value.dtype)
