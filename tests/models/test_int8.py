"""Kernels in int8: what they are, and networks on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.oracles import QUICK
from tests.parallel.test_strategies import DIT, QWEN, SANA, inputs
from twinflow_jax import models
from twinflow_jax.models import int8, names
from twinflow_jax.models.adapters import Adapter, is_adapter
from twinflow_jax.training import state


def test_a_kernel_is_the_nearest_in_int8():
    """As NumPy has it in float64, of float32 and of bfloat16."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 64, 40)).astype(np.float32)
    kernel[1] *= 100  # a layer has scales of its own, and so has a channel
    kernel[2, :, 0], kernel[2, 5, 1] = 0, 50
    for given in (kernel, kernel.astype("bfloat16")):
        found, given = int8.quantised(given), given.astype(np.float64)
        scale = np.abs(given).max(1, keepdims=True) / 127
        np.testing.assert_allclose(found.scale, scale, rtol=1e-6)
        whole = np.asarray(found.values, np.float64) * np.asarray(found.scale, np.float64)
        assert found.values.dtype == np.int8
        assert np.all(np.abs(whole - given) <= (0.5 + 1e-5) * scale)
        for dtype in ("float32", "bfloat16"):
            np.testing.assert_array_equal(int8.dequantised(found, dtype), whole.astype(dtype))
        error = np.linalg.norm(whole - given, axis=(1, 2)) / np.linalg.norm(given, axis=(1, 2))
        assert error[:2].max() < 0.007 and error.max() < 0.02


@pytest.mark.parametrize("config", [QWEN, SANA, DIT], ids=lambda config: config.name)
def test_a_network_on_them_is_that_of_what_they_stand_for(config):
    """Its velocities and its adapters' gradients; those of the dense network are near."""
    rng = np.random.default_rng(0)
    model = models.build(config, adapter=Adapter(rank=2))
    dense = jax.tree.map(
        lambda a: (rng.normal(size=a.shape) * a.shape[-2:][0] ** -0.5).astype(np.float32),
        model.abstract_params(),
    )
    base = int8.base(dense)
    kinds = {path: int8.is_quantised(leaf) for path, leaf in names.flatten(base).items()}
    assert not any(kinds[path] for path in kinds if is_adapter(path) or "kernel" not in path)
    given = jax.tree.map(jnp.asarray, inputs(config, 4))

    def found(params):
        def loss(learned, params):
            velocity = model.apply(state.whole(learned, params), *given)
            return (velocity**2).mean(), velocity

        arguments = state.trained(params, model.fixed), params
        run = jax.jit(jax.grad(loss, has_aux=True)).lower(*arguments).compile(QUICK)
        return run(*arguments)

    mine, same, other = map(found, (base, int8.dequantised(base, "float32"), dense))
    apart = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b)
    assert sum(map(np.any, jax.tree.leaves(mine))) > len(jax.tree.leaves(mine)) / 2
    for a, b in zip(*map(jax.tree.leaves, (mine, same)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
    assert 1e-4 < apart(mine[1], other[1]) < 0.03
