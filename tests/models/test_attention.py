"""Attention against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from twinflow_jax.models.attention import attention, compiled_for

ROWS, QUERIES, KEYS, HEADS, WIDTH = 2, 5, 7, 4, 128
LENGTHS = jnp.array([7, 3])
rng = np.random.default_rng(0)
QUERY, KEY, VALUE = (
    jnp.asarray(rng.normal(size=(ROWS, tokens, heads, WIDTH)), jnp.float32)
    for tokens, heads in ((QUERIES, HEADS), (KEYS, 2), (KEYS, 2))
)
BIAS = jnp.asarray(3 * rng.normal(size=(ROWS, HEADS, QUERIES, KEYS)), jnp.float32)


def by_hand(bias, scale, softcap=None, causal=False):
    query, key, value = (np.asarray(a, np.float64) for a in (QUERY, KEY, VALUE))
    key, value = (np.repeat(a, 2, axis=2) for a in (key, value))  # two query heads share one
    scores = scale * np.einsum("btnd,bsnd->bnts", query, key)
    scores = softcap * np.tanh(scores / softcap) if softcap else scores + np.asarray(bias)
    seen = np.arange(KEYS) < np.asarray(LENGTHS)[:, None, None, None]
    if causal:
        seen = seen & (np.arange(KEYS) <= np.arange(QUERIES)[:, None])
    weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    return np.einsum("bnts,bsnd->btnd", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize("bias", [BIAS, BIAS[:1], BIAS[:, :1], BIAS[:1, :1]], ids=np.shape)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_bias_and_scale(bias, scale):
    ours = attention(QUERY, KEY, VALUE, LENGTHS, bias=bias, scale=scale)
    expected = by_hand(bias, WIDTH**-0.5 if scale is None else scale)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("platform", "dtype"), [("tpu", "float32"), ("gpu", "bfloat16")])
def test_a_bias_takes_no_kernel(platform, dtype):
    """Where there is one, which this machine does not have."""
    whole = (QUERY, jnp.repeat(KEY, 2, axis=2), jnp.repeat(VALUE, 2, axis=2))
    with compiled_for(platform):
        ours = attention(*(jnp.asarray(a, dtype) for a in whole), LENGTHS, bias=BIAS, scale=0.02)
    np.testing.assert_allclose(ours.astype("float32"), by_hand(BIAS, 0.02), atol=0.03)


def test_softcap_and_scale():
    ours = attention(QUERY, KEY, VALUE, LENGTHS, causal=True, softcap=2.0, scale=0.7)
    expected = by_hand(0, 0.7, softcap=2.0, causal=True)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="without a bias"):
        attention(QUERY, KEY, VALUE, softcap=2.0, bias=BIAS)
