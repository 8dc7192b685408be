"""What the TPU's compiler makes of collectives with a generation's options."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from twinflow_jax import parallel
from twinflow_jax.parallel import flags
from twinflow_jax.planning import hlo, topology
from twinflow_jax.planning.collectives import collectives

WIDTH = 4096


def layers(w, x):
    """The loss of three layers whose weight is gathered in each, on a device's rows."""
    def layer(x, w):
        return jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", tiled=True)), None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x, w)
    return jnp.mean(x.astype(jnp.float32) ** 2)


@pytest.mark.tpu
@pytest.mark.parametrize("where, axes", [("v5p:4x4x4", 3), ("v6e:16x16", 2)])
def test_weights_come_together_along_all_axes_beside_products(where, axes):
    """And gradients are born split there, where the compiler by itself makes sums of both."""
    devices = topology.devices(topology.resolve(where))
    mesh, over = parallel.make_mesh(devices=devices), PartitionSpec("fsdp")
    array = lambda spec, *shape: jax.ShapeDtypeStruct(
        shape, "bfloat16", sharding=NamedSharding(mesh, spec)
    )
    weights = PartitionSpec(None, "fsdp")
    step = jax.shard_map(
        jax.grad(layers), mesh=mesh, in_specs=(weights, over), out_specs=weights, check_vma=False
    )
    arguments = array(weights, 3, WIDTH, WIDTH), array(over, 1024 * len(devices), WIDTH)
    lowered = jax.jit(step).trace(*arguments).lower(lowering_platforms=("tpu",))
    text = lowered.compile(compiler_options=flags.options(devices[0].device_kind)).as_text()
    large = [one for one in collectives(hlo.parse(text)) if one.total > WIDTH * WIDTH]
    assert {one.kind for one in large} == {"all-gather", "reduce-scatter"}
    assert all(one.overlapped for one in large)
    assert {one.axes for one in large if one.kind == "all-gather"} == {axes}
