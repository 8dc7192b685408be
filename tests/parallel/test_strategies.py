"""Networks compute the same on eight devices as on one, whatever the mesh and the strategy."""

import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twinflow_jax import models, parallel
from twinflow_jax.errors import UserError
from twinflow_jax.models import (
    adapters,
    dit,
    family,
    int8,
    minilm_dit,
    qwen_image,
    sana,
    sd35,
    zimage,
)
from twinflow_jax.models.stack import run_layers
from twinflow_jax.parallel import MeshConfig
from twinflow_jax.training import state

QWEN = qwen_image.transformer.Config(
    sample_shape=(4, 12, 16), layers=2, heads=8, head_dim=8, text_width=24, rope_axes=(2, 2, 4),
    remat="full",
)
EDIT = qwen_image.EditPlusConfig(
    sample_shape=(4, 12, 16), layers=2, heads=8, head_dim=8, text_width=24, rope_axes=(2, 2, 4),
    remat="full", zero_cond_t=True,
)
SANA = sana.transformer.Config(
    sample_shape=(4, 4, 32), layers=2, heads=4, head_dim=16, cross_heads=2, cross_head_dim=32,
    text_width=24, remat="full",
)
ZIMAGE = zimage.transformer.Config(
    sample_shape=(4, 12, 16), layers=2, refiners=1, heads=2, head_dim=32, text_width=24,
    rope_axes=(8, 12, 12), remat="full",
)
SD35 = sd35.transformer.Config(
    sample_shape=(4, 12, 16), layers=4, dual_layers=2, heads=2, head_dim=32, text_width=24,
    pooled_width=16, positions=8, remat="full",
)
DIT = minilm_dit.transformer.Config(
    sample_shape=(8, 8, 3), patch=2, width=64, depth=2, heads=8, text_width=24, remat="full",
)
TWO = dit.Config(name="two", sample_shape=(8, 8, 3), width=32, num_classes=0, remat="full")
PLANS = (  # mesh, strategy, rows: twelve rows do not divide among eight devices
    (MeshConfig(), "partitioner", 8),
    (MeshConfig(), "gather_layers", 8),
    (MeshConfig(), "gather_once", 12),
    (MeshConfig(data=8), "partitioner", 8),
    (MeshConfig(data=2), "gather_once", 8),
    (MeshConfig(tensor=2), "partitioner", 8),
    (MeshConfig(context=2), "partitioner", 8),
    (MeshConfig(data=2, fsdp=1, tensor=2, context=2), "partitioner", 2),
    (MeshConfig(context=2), "gather_layers", 8),
    (MeshConfig(tensor=2), "gather_once", 8),
)
STACKS = {
    "two": {"coarse", "fine"}, "zimage": {"image_refiner", "text_refiner", "layers"},
    "sd35": {"dual", "layers", "last"},
}
FEW = (PLANS[0], PLANS[2], PLANS[-1])


class TwoStacks(nn.Module):
    """Two stacks of other lengths and of other weights."""

    config: dit.Config

    @nn.compact
    def __call__(self, x_t, t, r, cond):
        c = self.config
        h = nn.Dense(c.width)(x_t.reshape(x_t.shape[0], -1, 12))
        h = run_layers(self, Plain, 2, c.remat, h, per_row=(t,), name="coarse")
        h = run_layers(self, Dual, 3, c.remat, h, per_row=(r,), name="fine")
        return nn.Dense(12)(h).reshape(x_t.shape)


class Plain(nn.Module):
    """`(h, times) -> (h, None)`."""

    config: dit.Config
    branches: int = 1

    @nn.compact
    def __call__(self, h, times):
        c = self.config
        for _ in range(self.branches):
            inner = dit._dense(c, 2 * c.width, ("embed", "mlp"))(h) + times[:, None, None]
            h = h + dit._dense(c, c.width, ("mlp", "embed"))(nn.silu(inner))
        return h, None


class Dual(Plain):
    branches: int = 2


MODULES = {"two": TwoStacks} | {name: family.module for name, family in models.FAMILIES.items()}


def inputs(config, rows: int) -> tuple:
    """Rows with texts of several lengths, and with sources where they are edits."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    times = rng.uniform(-1, 1, (2, rows)).astype(np.float32)
    mask = np.arange(8) <= (np.arange(rows) % 8)[:, None]
    cond = {} if config is TWO else {"tokens": normal(rows, 8, config.text_width), "mask": mask}
    if config is EDIT:
        cond["references"] = (normal(rows, *config.sample_shape),)
    return normal(rows, *config.sample_shape), *times, cond


class Everywhere(dict):
    """Adapters of rank 8 for every projection."""

    def get(self, path, default=None):
        return 8


def compare(config, plans=PLANS, adapted=None, base=False) -> None:
    """Run in a process with eight devices; fails where a velocity or gradient differs.

    base: only adapters have a gradient, and stand on kernels in int8.
    """
    module = MODULES[config.name](config)
    with adapters.added(adapted or {}):
        boxed = jax.eval_shape(module.init, jax.random.key(0), *inputs(config, 1))["params"]
    axes = family.logical_axes(boxed)
    leaves, tree = jax.tree.flatten(nn.meta.unbox(boxed))
    rng = np.random.default_rng(1)
    random = lambda leaf: (rng.normal(size=leaf.shape) * leaf.shape[-1] ** -0.5).astype(np.float32)
    params = tree.unflatten([random(leaf) for leaf in leaves])
    params, fixed = (int8.base(params), (adapters.Adapter().frozen,)) if base else (params, ())
    abstract = jax.eval_shape(lambda: params)
    quick = {"xla_backend_optimization_level": 0}

    def velocity_and_gradients(params, strategy, *inputs):
        held = strategy.hold(params) if strategy else None

        def loss(learned):
            weights = state.whole(learned, params)
            weights = strategy.weights(weights, held) if strategy else weights
            velocity = module.apply({"params": weights}, *inputs)
            return (velocity**2).mean(), velocity

        return jax.grad(loss, has_aux=True)(state.trained(params, fixed))

    for mesh_config, name, rows in plans:
        given = inputs(config, rows)
        plain = jax.jit(lambda params, *a: velocity_and_gradients(params, None, *a))
        expected = jax.tree.leaves(plain.lower(params, *given).compile(quick)(params, *given))
        mesh = parallel.make_mesh(mesh_config)
        strategy = parallel.create(name, mesh, abstract, axes, "float32")
        assert set(strategy.stacks) == STACKS.get(config.name, {"layers"})
        over = parallel.over_rows(mesh, rows)
        args = jax.device_put(params, strategy.layouts), *jax.device_put(given, over)
        run = jax.jit(
            lambda params, *a: velocity_and_gradients(params, strategy, *a),  # noqa: B023
            out_shardings=(state.trained(strategy.layouts, fixed), over),
        )
        with strategy.applied():
            compiled = run.lower(*args).compile(quick)
        where = (config.name, name, mesh_config)
        for mine, want in zip(jax.tree.leaves(compiled(*args)), expected, strict=True):
            error = np.linalg.norm(np.asarray(mine) - want)
            # 1e-7: some gradients are 0, as those of the biases of keys
            assert error <= 1e-5 * np.linalg.norm(want) + 1e-7, (*where, want.shape, error)
        check_collectives(compiled.as_text(), config, name, mesh, where, base)


def check_collectives(hlo: str, config, name: str, mesh, where, base: bool) -> None:
    """No activation of a whole batch is added up, mapped gradients are born split, and what is kept
    in int8 travels so."""
    if config.name == "qwen_image" and mesh.shape["tensor"] == 1:
        image = f"f32[8,12,{config.width}]"
        added_up = [x for x in hlo.splitlines() if "all-reduce(" in x and image in x]
        assert not added_up, (where, added_up)
    assert name == "partitioner" or "reduce-scatter(" in hlo, where
    gathered = [line for line in hlo.splitlines() if " all-gather(" in line]
    assert not base or any(" s8[" in line for line in gathered), where


@pytest.mark.parametrize("name", [
    "QWEN", "SANA", "DIT, FEW", "TWO", "QWEN, FEW, Everywhere(a=8)",
    pytest.param("QWEN, (*FEW, PLANS[1]), Everywhere(a=8), base=True", marks=pytest.mark.slow),
    pytest.param("ZIMAGE", marks=pytest.mark.slow), pytest.param("SD35", marks=pytest.mark.slow),
    pytest.param("EDIT, (PLANS[1], PLANS[6], PLANS[7])", marks=pytest.mark.slow),
])
def test_eight_devices_compute_what_one_does(name):
    program = "import tests.conftest; from tests.parallel.test_strategies import *"
    program += f"; compare({name})"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    root = pathlib.Path(__file__).resolve().parents[2]
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=os.environ | flags, capture_output=True,
        text=True, check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]


def test_networks_without_layers_are_left_to_the_partitioner():
    with pytest.raises(UserError, match="stacked layers"):
        parallel.create("gather_once", parallel.make_mesh(), {"a": 1}, {"a": ()}, "float32")


@pytest.mark.parametrize("width", [128, 64])
def test_the_tpus_attention_is_the_others(width):
    """Values and gradients, with padding, at lengths that blocks do not divide, of heads that fill
    a vector or half of one."""
    from twinflow_jax.models.attention import attention, compiled_for, splash

    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=(2, tokens, 2, width)), jnp.float32)
        for tokens in (200, 300, 300)
    )
    lengths = jnp.array([300, 17])

    def both(attend):
        loss = lambda *a: (attend(*a) ** 2).sum()
        return attend(query, key, value), *jax.grad(loss, (0, 1, 2))(query, key, value)

    theirs = both(lambda q, k, v: splash(q, k, v, lengths, 0.07, interpret=True))
    ours = both(lambda q, k, v: attention(q, k, v, lengths, scale=0.07))
    for a, b in zip(theirs, ours, strict=True):
        assert np.linalg.norm(a - b) <= 2e-5 * np.linalg.norm(b)
    assert not np.asarray(theirs[2])[1, 17:].any()  # padded keys have no gradient
    with compiled_for("tpu"):
        assert "splash" in str(jax.make_jaxpr(attention)(query, key, value))
