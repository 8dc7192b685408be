"""Programs whose counts are known by hand, and what the TPU compiler made of them.

The texts *.hlo.txt are what libtpu 0.0.42.1 (jax 0.10.2) makes of PROGRAMS, without what no test
reads. `python -m tests.planning.programs tests/planning` writes them again.
"""

import pathlib
import re
import sys
from collections import Counter

from twinflow_jax.planning import hlo
from twinflow_jax.planning.collectives import collectives
from twinflow_jax.planning.work import step_flops

HERE = pathlib.Path(__file__).parent
LAYERS, WIDTH, HIDDEN, ROWS = 3, 256, 512, 128  # ROWS per device
PRODUCT = 2 * ROWS * WIDTH * HIDDEN
# Per layer: 2 products forward; backward the first again (remat), 2 for inputs, 2 for weights.
STACK_FLOPS = LAYERS * 7 * PRODUCT
WEIGHT = WIDTH * HIDDEN * 2  # bytes of one bf16 weight

ASYNCHRONOUS = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}


def stack(mesh, explicit, width=WIDTH, hidden=HIDDEN, rows=ROWS):
    """(step, arguments): SGD on a scanned, rematerialised stack of two-layer blocks, FSDP.

    explicit: gathers and scatters written out in shard_map, one mesh axis after the other;
    otherwise left to the compiler.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    axes = mesh.axis_names
    weights, rows_spec = PartitionSpec(None, axes), PartitionSpec(axes)
    constrain = lambda x, spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def gathered(w):
        if not explicit:
            return constrain(w, PartitionSpec())
        for axis in reversed(axes):
            w = jax.lax.all_gather(w, axis, axis=0, tiled=True)
        return w

    def block(x, pair):
        x = x + jax.nn.gelu(x @ gathered(pair[0])) @ gathered(pair[1])
        return (x if explicit else constrain(x, rows_spec)), None

    def loss(pair, x):
        x, _ = jax.lax.scan(jax.checkpoint(block), x, pair)
        return jnp.mean(x.astype(jnp.float32) ** 2)

    def step(pair, x):
        value, grads = jax.value_and_grad(loss)(pair, x)
        value = jax.lax.pmean(value, axes) if explicit else value
        return jax.tree.map(lambda w, g: w - g * jnp.bfloat16(.1), pair, grads), value

    array = lambda shape, spec: jax.ShapeDtypeStruct(
        shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    arguments = ((array((LAYERS, width, hidden), weights), array((LAYERS, hidden, width), weights)),
                 array((rows * mesh.size, width), rows_spec))
    if explicit:
        step = jax.shard_map(step, mesh=mesh, in_specs=((weights, weights), rows_spec),
                             out_specs=((weights, weights), PartitionSpec()), check_vma=False)
        return jax.jit(step, donate_argnums=0), arguments
    out = ((NamedSharding(mesh, weights),) * 2, NamedSharding(mesh, PartitionSpec()))
    return jax.jit(step, donate_argnums=0, out_shardings=out), arguments


def attention(mesh, fused=True):
    """(gradient, arguments): splash attention on 2 rows, 4 heads, 1024 x 128, thrice in a scan."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.sharding import NamedSharding, PartitionSpec

    heads, length, depth = 4, 1024, 128
    names = ["q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute"]
    names += [] if fused else ["q_dq", "kv_dq"]
    blocks = kernel.BlockSizes(
        **{f"block_{name}": 512 for name in names}, use_fused_bwd_kernel=fused)
    attend = kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask((length, length))] * heads), block_sizes=blocks)

    def block(x, _):
        segments = jnp.zeros((x[0].shape[0], length), jnp.int32)
        one = lambda q, k, v, s: attend(q, k, v, segment_ids=kernel.SegmentIds(s, s))
        return (x[0] + jax.vmap(one)(*x, segments), *x[1:]), None

    def gradient(*x):
        loss = lambda *x: jnp.sum(
            jax.lax.scan(jax.checkpoint(block), x, length=3)[0][0].astype(jnp.float32))
        return jax.grad(loss, argnums=(0, 1, 2))(*x)

    spec = PartitionSpec(mesh.axis_names)
    array = jax.ShapeDtypeStruct((2 * mesh.size, heads, length, depth), jnp.bfloat16,
                                 sharding=NamedSharding(mesh, spec))
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec,) * 3,
                           check_vma=False)
    return jax.jit(mapped), (array,) * 3


# name: (topology, mesh shape, program of the mesh, compiler options)
PROGRAMS = {
    "explicit": ("v5p:2x2x2", (4, 2), lambda mesh: stack(mesh, True), {}),
    "automatic": ("v5e:4x4", (4, 4), lambda mesh: stack(mesh, False), {}),
    "one_axis": ("v5p:2x2x1", (4,), lambda mesh: stack(mesh, False), {}),
    "overlapped": ("v5p:2x2x2", (4, 2), lambda mesh: stack(mesh, True, 1024, 4096, 1024),
                   ASYNCHRONOUS),
    "slices": ("2*v5p:2x2x1", (2, 4), lambda mesh: stack(mesh, False), {}),
    "cores": ("tpu7x:2x2x1", (8,), lambda mesh: stack(mesh, True), {}),
    "splash": ("v5p:2x2x1", (4,), attention, {}),
    "splash_apart": ("v5p:2x2x1", (4,), lambda mesh: attention(mesh, False), {}),
}


def record(folder):
    """Compiles PROGRAMS for TPUs and writes what the tests need of their texts."""
    import numpy as np
    from jax.experimental import mesh_utils
    from jax.sharding import Mesh

    from twinflow_jax.planning import topology

    for name, (where, shape, program, options) in PROGRAMS.items():
        devices = topology.devices(topology.resolve(where))
        grid = (np.array(devices).reshape(shape) if "*" in where
                else mesh_utils.create_device_mesh(shape, devices))
        step, arguments = program(Mesh(grid, ("a", "b")[:len(shape)]))
        lowered = step.trace(*arguments).lower(lowering_platforms=("tpu",))
        text = lowered.compile(compiler_options=options).as_text()
        pathlib.Path(folder, f"{name}.hlo.txt").write_text(shortened(text))


def shortened(text):
    """The text without source lines, tiling, kernels' code and most of the configuration."""
    def config(match):
        kept = re.findall(r'"estimated_cycles":"\d+"|"async_collective_fusion_config":\{[^}]*\}',
                          match[0])
        return f", backend_config={{{','.join(kept)}}}" if kept else ""

    text = re.sub(r', backend_config=\{.*\}$', config, text, flags=re.MULTILINE)
    text = re.sub(r' stack_frame_id=\d+|:T(?:\([\d,]+\))+(?=\})|(?<=:)T(?:\([\d,]+\))+(?=S)', '',
                  text)
    text = re.sub(r', metadata=\{(?!op_name="[^"]*pallas_call).*?\}', '', text)
    header, rest = text.split("\n", 1)
    return header + "\n\n" + rest[re.search(r"^%", rest, re.MULTILINE).start():]


def read(name):
    return hlo.parse((HERE / f"{name}.hlo.txt").read_text())


def matmul_flops(program):
    return sum(step.times * step_flops(program, step) for step in program.steps)


def trips(program):
    """How often each loop's body runs, by the loop's name."""
    times = {step.computation.name: step.times for step in program.steps}
    return {
        step.op.name: times[step.op.calls("body")[0]] // step.times
        for step in program.steps if step.op.opcode == "while"
    }


def counted(program):
    """{(kind, network, bytes, group size): executions}"""
    counts = Counter()
    for one in collectives(program):
        counts[one.kind, one.network, one.bytes, one.group] += one.count
    return dict(counts)


# Hand counts. Weights are gathered forward and backward: 2 weights x 2 x LAYERS.
GATHERS, SCATTERS = 4 * LAYERS, 2 * LAYERS
BIG = 1024 * 4096 * 2
EXPECTED = {
    "explicit": (STACK_FLOPS, {
        ("all-gather", "ici", WEIGHT // 4, 2): GATHERS, ("all-gather", "ici", WEIGHT, 4): GATHERS,
        ("reduce-scatter", "ici", WEIGHT, 4): SCATTERS,
        ("reduce-scatter", "ici", WEIGHT // 4, 2): SCATTERS,
        ("all-reduce", "ici", 4, 8): 1}),
    # The compiler chose one all-reduce of both weights' gradients, and no reduce-scatter.
    "automatic": (STACK_FLOPS, {
        ("all-gather", "ici", WEIGHT, 16): GATHERS, ("all-reduce", "ici", 2 * WEIGHT, 16): LAYERS,
        ("all-reduce", "ici", 4, 16): 1}),
    "one_axis": (STACK_FLOPS, {
        ("all-gather", "ici", WEIGHT, 4): GATHERS, ("reduce-scatter", "ici", WEIGHT, 4): SCATTERS,
        ("all-reduce", "ici", 4, 4): 1}),
    # The scatters' results of an odd size go to their places by collective-permute.
    "overlapped": (LAYERS * 7 * 2 * 1024 * 1024 * 4096, {
        ("all-gather", "ici", BIG // 4, 2): GATHERS, ("all-gather", "ici", BIG, 4): GATHERS,
        ("reduce-scatter", "ici", BIG, 4): SCATTERS,
        ("reduce-scatter", "ici", BIG // 4, 2): SCATTERS,
        ("collective-permute", "ici", 96 * 1024 * 2, 2): LAYERS,
        ("collective-permute", "ici", 96 * 4096 * 2, 2): LAYERS,
        ("all-reduce", "ici", 4, 8): 1}),
    # Between the slices a quarter of each weight; inside them the rest. The gradient's shard of
    # both weights goes between the slices in one all-reduce.
    "slices": (STACK_FLOPS, {
        ("all-gather", "dcn", WEIGHT // 4, 2): GATHERS, ("all-gather", "ici", WEIGHT, 4): 18,
        ("reduce-scatter", "ici", WEIGHT, 4): SCATTERS,
        ("all-reduce", "dcn", WEIGHT // 2, 2): LAYERS,
        ("all-reduce", "dcn", 512, 2): 1, ("all-reduce", "ici", 512, 4): 1}),
    # Collectives run in asynchronous calls on cores of their own.
    "cores": (STACK_FLOPS, {
        ("all-gather", "ici", WEIGHT, 8): GATHERS, ("reduce-scatter", "ici", WEIGHT, 8): SCATTERS,
        ("all-reduce", "ici", 4, 8): 1}),
}


if __name__ == "__main__":
    record(sys.argv[1])
