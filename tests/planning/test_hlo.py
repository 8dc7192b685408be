"""Counts from HLO texts against hand counts.

The texts *.hlo.txt are what the TPU compiler (libtpu 0.0.42.1, jax 0.10.2) makes of PROGRAMS,
without what no test reads. `python tests/planning/test_hlo.py tests/planning` writes them again.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
from collections import Counter

import pytest

from twinflow_jax.planning import hlo

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


# The programs

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


def counted(program):
    """{(kind, network, bytes, group size): executions}"""
    counts = Counter()
    for one in hlo.collectives(program):
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


@pytest.mark.parametrize("name", EXPECTED)
def test_recorded_programs_match_hand_counts(name):
    program = read(name)
    flops, collectives = EXPECTED[name]
    assert hlo.matmul_flops(program) == flops
    assert counted(program) == collectives
    assert program.unknown_loops == ()


def test_loops_and_overlap_of_recorded_programs():
    assert set(read("explicit").trip_counts.values()) == {LAYERS}
    # The backward loop between slices was rotated: it starts at 1, and the first pass is outside.
    assert sorted(read("slices").trip_counts.values()) == [LAYERS - 1, LAYERS]
    found = hlo.collectives(read("overlapped"))
    gathers = [one for one in found if one.kind == "all-gather" and one.overlapped]
    assert sum(one.total for one in gathers) == 6 * BIG
    assert all(len(one.covers) == 1 and one.in_loop for one in gathers)
    assert not any(one.overlapped for one in hlo.collectives(read("explicit")))
    large = [one for one in hlo.collectives(read("cores")) if one.kind != "all-reduce"]
    assert all(one.overlapped and one.covers for one in large)


def test_groups_follow_the_mesh():
    groups = {one.group: one.groups for one in hlo.collectives(read("explicit"))}
    assert groups[2] == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert groups[4] == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert groups[8] == (tuple(range(8)),)
    assert {one.groups for one in hlo.collectives(read("automatic"))} == {(tuple(range(16)),)}


@pytest.mark.parametrize("text, groups", [
    ("replica_groups={{0,1},{2,3}}, dimensions={0}", ((0, 1), (2, 3))),
    ("replica_groups={}, to_apply=%add", ()),
    ("replica_groups=[2,2]<=[4], dimensions={0}", ((0, 1), (2, 3))),
    ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}", ((0, 1), (2, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={0}", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=4] {'a':(1)2}, dimensions={0}", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=4] {'a':(2)2}, dimensions={0}", ((0, 1), (2, 3))),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
    ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
])
def test_group_notations(text, groups):
    assert hlo.replica_groups(text) == groups


@pytest.mark.parametrize("name, backward", [
    ("splash", {"splash_mha_dkv_segmented_no_residuals": 3}),
    ("splash_apart", {"splash_mha_dkv_segmented_no_residuals": 3,
                      "splash_mha_dq_segmented_no_residuals": 3}),
])
def test_kernels_with_their_shapes(name, backward):
    found = hlo.kernels(read(name))
    forward = {"splash_mha_fwd_segmented_residuals": 6}  # thrice, and again for the backward
    assert {kernel.name: kernel.count for kernel in found} == forward | backward
    for kernel in found:
        assert [array.dims for array in kernel.operands[2:5]] == [(2, 4, 1024, 128)] * 3


HAND = """HloModule hand, num_partitions=2

%fused (p0: f32[3,8], p1: s32[]) -> f32[8] {
  %p0 = f32[3,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %slice = f32[1,8]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,8}
  ROOT %row = f32[8]{0} bitcast(%slice)
}

%update (p0: f32[3,8], p1: f32[1,8], p2: s32[]) -> f32[3,8] {
  %p0 = f32[3,8]{1,0} parameter(0)
  %p1 = f32[1,8]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %u = f32[3,8]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2)
}

%body (b: (s32[], f32[3,8], s32[])) -> (s32[], f32[3,8], s32[]) {
  %b = (s32[], f32[3,8]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %a = f32[3,8]{1,0} get-tuple-element(%b), index=1
  %limit = s32[] get-tuple-element(%b), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %taken = f32[8]{0} fusion(%a, %i), kind=kLoop, calls=%fused
  %gathered = (f32[8]{0}, f32[16]{0:T(8,128)S(1)}) all-gather-start(%taken), \
replica_groups={{0,1}}, dimensions={0}
  %sum = f32[8]{0:T(8,128)(2,1)} add(%taken, %taken)
  %whole = f32[16]{0} all-gather-done(%gathered)
  %line = f32[1,8]{1,0} bitcast(%sum)
  %kept = f32[3,8]{1,0} fusion(%a, %line, %i), kind=kLoop, calls=%update
  ROOT %state = (s32[], f32[3,8]{1,0}, s32[]) tuple(%next, %kept, %limit)
}

%condition (c: (s32[], f32[3,8], s32[])) -> pred[] {
  %c = (s32[], f32[3,8]{1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%c), index=0
  %limit.1 = s32[] get-tuple-element(%c), index=2
  ROOT %less = pred[] compare(%i.1, %limit.1), direction=LT
}

ENTRY %main (x: f32[3,8]) -> f32[3,8] {
  %x = f32[3,8]{1,0} parameter(0)
  %one = s32[] constant(1)
  %ten = s32[] constant(10)
  %copy = s32[] copy(%ten)
  %kernel.3 = f32[3,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"block": "a \\" } quote"
}}, metadata={op_name="jit(f)/own/pallas_call"}
  %start = (s32[], f32[3,8]{1,0}, s32[]) tuple(%one, %kernel.3, %copy)
  %while = (s32[], f32[3,8]{1,0}, s32[]) while(%start), condition=%condition, body=%body
  ROOT %out = f32[3,8]{1,0} get-tuple-element(%while), index=1
}
"""


def test_a_loop_of_a_written_module():
    program = hlo.parse(HAND)
    assert program.trip_counts == {"while": 5}  # 1, 3, 5, 7, 9: the limit comes with the state
    gather, = hlo.collectives(program)
    assert (gather.kind, gather.count, gather.bytes, gather.group) == ("all-gather", 5, 64, 2)
    assert gather.overlapped and gather.covers == ("sum",)
    assert [kernel.name for kernel in hlo.kernels(program)] == ["own"]
    traffic = {}
    for step in program.steps:
        if hlo.moves(program, step):
            traffic[step.op.name] = hlo.step_traffic(program, step).hbm
    # A row of 32 bytes is read and written, not the array; indices are 4 bytes each.
    assert traffic["taken"] == 32 + 4 + 32
    assert traffic["kept"] == 32 + 4 + 32
    assert traffic["sum"] == 3 * 32
    unknown = hlo.parse(HAND.replace("constant(10)", "parameter(1)"))
    assert unknown.unknown_loops == ("while",) and unknown.trip_counts == {"while": 1}


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="not an HLO module"):
        hlo.parse("HloModule cut\n\nENTRY %main (x: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n")


def run(code, **environment):
    """What a fresh process prints; compiled programs are not kept."""
    found = subprocess.run(
        [sys.executable, "-c", code], text=True, capture_output=True, timeout=300, check=False,
        cwd=HERE, env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false",
                                    "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"} | environment)
    assert found.returncode == 0, found.stderr
    return found.stdout


ON_CPU = """
import json, jax, jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
from test_hlo import counted, stack
from twinflow_jax.planning import hlo

def nested(x, w):
    inner = lambda x, _: (jax.nn.relu(x @ w), None)
    outer = lambda x, _: (jax.lax.scan(inner, x, length=5)[0] + 1., None)
    return jax.lax.scan(outer, x, length=4)[0]

def convolution(x, w):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout)

def branches(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)

array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
text = lambda f, *arguments: jax.jit(f).lower(*arguments).compile().as_text()
found = {
    "nested": hlo.matmul_flops(hlo.parse(text(nested, array(16, 32), array(32, 32)))),
    "convolution": hlo.matmul_flops(
        hlo.parse(text(convolution, array(2, 16, 16, 8), array(3, 3, 8, 32)))),
    "branches": hlo.matmul_flops(hlo.parse(text(branches, array(16, 32), array(32, 32)))),
}
step, arguments = stack(Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b")), True)
program = hlo.parse(step.lower(*arguments).compile().as_text())
found["stack"] = hlo.matmul_flops(program)
found["trips"] = sorted(program.trip_counts.values())
found["collectives"] = [[kind, group, count] for (kind, _, _, group), count
                        in sorted(counted(program).items())]
print(json.dumps(found))
"""


def test_programs_compiled_for_eight_cpus():
    found = json.loads(run(ON_CPU, XLA_FLAGS="--xla_force_host_platform_device_count=8"))
    assert found["nested"] == 4 * 5 * 2 * 16 * 32 * 32
    # Windows at the border meet padding: 16 + 2 * 15 pairs of positions per axis.
    assert found["convolution"] == 2 * 2 * 32 * 8 * (3 * 16 - 2) ** 2
    assert found["branches"] == 2 * 16 * 32 * 32
    assert found["stack"] == STACK_FLOPS
    assert found["trips"] == [LAYERS, LAYERS]
    counts = {(kind, group): count for kind, group, count in found["collectives"]}
    assert counts["all-gather", 2] == counts["all-gather", 4] == GATHERS
    assert counts["all-reduce", 8] == 1


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_programs_compiled_for_tpus_now(tmp_path):
    run(f"import test_hlo; test_hlo.record({str(tmp_path)!r})")
    for name, (flops, collectives) in EXPECTED.items():
        program = hlo.parse((tmp_path / f"{name}.hlo.txt").read_text())
        assert hlo.matmul_flops(program) == flops, name
        assert counted(program) == collectives, name


if __name__ == "__main__":
    record(sys.argv[1])
