"""How weights lie on a mesh, and that a network computes the same on eight devices as on one."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from twinflow_jax import models, parallel
from twinflow_jax.models.qwen_image.transformer import Config, Transformer

SMALL = Config(
    sample_shape=(4, 6, 16), layers=2, heads=8, head_dim=8, text_width=24, rope_axes=(2, 2, 4)
)
MESHES = ((8, 1), (4, 2), (1, 8))  # (fsdp, tensor)


def specs(shapes: dict, axes: dict, fsdp: int = 4, tensor: int = 2) -> dict:
    mesh = AbstractMesh((fsdp, tensor), ("fsdp", "tensor"))
    leaves = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    return {name: s.spec for name, s in parallel.shardings(mesh, leaves, axes).items()}


def test_rules():
    found = specs(
        {"whole": (3, 8, 6), "odd": (6, 7), "twice": (8, 8, 2), "unnamed": (8, 8), "scalar": ()},
        {
            "whole": ("layers", "embed", "heads"), "odd": ("embed", "heads"),
            "twice": ("embed", "text", "mlp"), "unnamed": (), "scalar": (),
        },
    )
    assert found == {
        "whole": PartitionSpec(None, "fsdp", "tensor"),
        "odd": PartitionSpec(None, None),  # 6 rows do not divide among 4, nor 7 columns among 2
        "twice": PartitionSpec("fsdp", None, "tensor"),  # both are split over fsdp: the first is
        "unnamed": PartitionSpec(), "scalar": PartitionSpec(),
    }
    # a dimension that does not divide leaves its mesh axis to the next
    assert specs({"a": (6, 8)}, {"a": ("embed", "text")})["a"] == PartitionSpec(None, "fsdp")


def test_rows_and_meshes():
    mesh = AbstractMesh((4, 2), ("fsdp", "tensor"))
    assert parallel.over_rows(mesh, 8).spec == PartitionSpec("fsdp")
    assert parallel.over_rows(mesh, 6).spec == PartitionSpec(None)
    assert dict(parallel.make_mesh().shape) == {"fsdp": len(jax.devices()), "tensor": 1}


@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
def test_every_large_weight_of_the_published_network_is_split(name):
    """On 4 x 8 devices, both of which divide every published width."""
    network = models.FAMILIES["qwen_image"].text_to_image.networks[name]
    abstract, axes = network.abstract(network.config())
    mesh = AbstractMesh((4, 8), ("fsdp", "tensor"))
    layouts = parallel.shardings(mesh, abstract, axes)
    share = lambda leaf, layout: np.prod(layout.shard_shape(leaf.shape)) / leaf.size
    total = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    whole = sum(
        leaf.size for leaf, layout in zip(*map(jax.tree.leaves, (abstract, layouts)), strict=True)
        if share(leaf, layout) > 1 / 32
    )
    assert whole / total < 0.003


def inputs() -> tuple:
    """Eight rows with texts of every length."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    times = rng.uniform(-1, 1, (2, 8)).astype(np.float32)
    mask = np.arange(8) < np.arange(1, 9)[:, None]
    return normal(8, *SMALL.sample_shape), *times, {"tokens": normal(8, 8, 24), "mask": mask}


def velocity_and_gradients(params, x_t, t, r, cond):
    """Of the mean square, by parameters and x_t."""
    def loss(params, x_t):
        velocity = Transformer(SMALL).apply({"params": params}, x_t, t, r, cond)
        return (velocity**2).mean(), velocity

    grads, velocity = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x_t)
    return velocity, grads


def compare_with_one_device() -> None:
    """Run in a process with eight devices; fails where a result differs."""
    network = models.FAMILIES["qwen_image"].text_to_image.networks["transformer"]
    abstract, axes = network.abstract(SMALL)
    leaves, tree = jax.tree.flatten(abstract)
    rng = np.random.default_rng(1)
    random = lambda leaf: (rng.normal(size=leaf.shape) * leaf.shape[-1] ** -0.5).astype(np.float32)
    params = tree.unflatten([random(leaf) for leaf in leaves])
    quick = {"xla_backend_optimization_level": 0}

    def run(params, inputs, out=None):
        jitted = jax.jit(velocity_and_gradients, out_shardings=out)
        compiled = jitted.lower(params, *inputs).compile(quick)
        return compiled(params, *inputs), compiled.as_text()

    outs, _ = run(params, inputs())
    expected = jax.tree.leaves(outs)
    for fsdp, tensor in MESHES:
        mesh = parallel.make_mesh(tensor)
        assert dict(mesh.shape) == {"fsdp": fsdp, "tensor": tensor}
        layouts, over = parallel.shardings(mesh, abstract, axes), parallel.over_rows(mesh, 8)
        split = jax.device_put(params, layouts)
        kernel = split["layers"]["image"]["mlp_hidden"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size / 8
        with parallel.applied(mesh):
            outs, hlo = run(split, jax.device_put(inputs(), over), (over, (layouts, over)))
        # Only gradients of weights are added up over fsdp, no activation of the whole batch.
        image = f"f32[8,6,{SMALL.width}]"
        added_up = [line for line in hlo.splitlines() if "all-reduce(" in line and image in line]
        assert bool(added_up) == (fsdp == 1), (fsdp, tensor, added_up[:2])
        for mine, want in zip(jax.tree.leaves(outs), expected, strict=True):
            error = np.linalg.norm(np.asarray(mine) - want)
            assert error <= 1e-4 * np.linalg.norm(want), (fsdp, tensor, want.shape, error)


def test_eight_devices_compute_what_one_does():
    program = "from tests.parallel import test_rules; test_rules.compare_with_one_device()"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    root = pathlib.Path(__file__).resolve().parents[2]
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=os.environ | flags, capture_output=True,
        text=True, check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
