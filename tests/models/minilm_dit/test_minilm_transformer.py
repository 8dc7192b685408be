"""The image model under text, and the autoencoder that does nothing."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import oracles
from twinflow_jax import models
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.models.minilm_dit import NETWORKS, transformer

CONFIG = transformer.Config(
    sample_shape=(8, 8, 3), patch=2, width=32, depth=2, heads=2, text_width=12
)
ROWS = 3


@functools.cache
def params():
    """Random: a fresh network's zeros would hide what its output depends on."""
    leaves, tree = jax.tree.flatten(NETWORKS["transformer"].abstract(CONFIG)[0])
    rng = np.random.default_rng(3)
    return tree.unflatten(
        jnp.asarray(rng.normal(size=leaf.shape) * 0.2, jnp.float32) for leaf in leaves
    )


def inputs(length: int, fill: float = 0.0, side: int = 8) -> tuple:
    """Rows with texts of 5, 3 and 1 tokens, padded to a length with a value."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    x, t, r, tokens = normal(ROWS, side, side, 3), normal(ROWS), normal(ROWS), normal(ROWS, 5, 12)
    mask = np.arange(length) < np.array([5, 3, 1])[:, None]
    tokens = np.pad(tokens, ((0, 0), (0, length - 5), (0, 0)))
    return x, t, r, {"tokens": np.where(mask[..., None], tokens, fill), "mask": mask}


def velocity(*inputs, **fields):
    config = dataclasses.replace(CONFIG, **fields)
    return np.asarray(oracles.compiled(NETWORKS["transformer"], config)(params(), *inputs))


def test_padding_of_the_text_has_no_influence():
    out = velocity(*inputs(5))
    assert out.shape == (ROWS, 8, 8, 3)
    np.testing.assert_array_equal(velocity(*inputs(5, fill=50.0)), out)
    assert oracles.relative_error(velocity(*inputs(16, fill=-9.0)), out) < 2e-6
    x, t, r, cond = inputs(5)
    other = velocity(x, t, r, cond | {"tokens": cond["tokens"] + 1})
    assert all(oracles.relative_error(a, b) > 1e-2 for a, b in zip(other, out, strict=True))


def test_half_the_precision():
    out, half = velocity(*inputs(5)), velocity(*inputs(5), dtype="bfloat16")
    assert half.dtype == np.float32
    assert 1e-4 < oracles.relative_error(half, out) < 5e-2


def test_other_sizes_than_its_own():
    assert CONFIG.any_size
    x, t, r, cond = inputs(5, side=12)
    assert velocity(x[:, :, :6], t, r, cond).shape == (ROWS, 12, 6, 3)


def test_the_family_initialises_from_its_settings_alone():
    model = models.create(dataclasses.asdict(CONFIG))
    chex.assert_trees_all_equal_shapes(model.abstract_params(), params())
    assert model.null["tokens"].shape == (1, 1, 12)
    axes = names.flatten(NETWORKS["transformer"].abstract(CONFIG)[1])
    assert axes["layers/Dense_0/kernel"] == ("layers", "embed", "modulation")
    assert axes["layers/Dense_1/kernel"] == ("layers", "embed", "mlp")
    attention = "layers/MultiHeadDotProductAttention_0"
    assert axes[f"{attention}/query/kernel"] == ("layers", "embed", "heads", None)
    assert axes[f"{attention}/out/kernel"] == ("layers", "heads", None, "embed")


@pytest.mark.parametrize(("fields", "message"), [
    ({"sample_shape": (8, 8, 4)}, r"must be \(height, width, 3\), height and width divisible by 2"),
    ({"sample_shape": (8, 9, 3)}, "divisible by 2"),
    ({"num_classes": 10}, "the condition is text"),
    ({"dtype": "float16"}, "dtype is 'float16'"),
    ({"text_width": 0, "depth": 0}, "depth is 0; give 1 or more; .*text_width is 0"),
    ({"heads": 3}, "must divide by 4 and by model.heads 3"),
])
def test_settings_that_no_network_has(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_pixels_are_their_own_latents():
    network = NETWORKS["vae"]
    config = network.config()
    assert network.abstract(config) == ({}, {}) and network.init(config, jax.random.key(0)) == {}
    images = np.tanh(oracles.randoms(2, 4, 6, 3))
    for method in ("encode", "decode"):
        apply = oracles.compiled(network, config, method)
        np.testing.assert_array_equal(apply({}, images), images)
    assert np.abs(apply({}, 9 * images)).max() == 1
