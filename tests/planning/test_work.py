"""FLOPs, kernels and collectives of whole programs, recorded and compiled now, by hand counts."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.planning.programs import (
    EXPECTED,
    GATHERS,
    HERE,
    LAYERS,
    STACK_FLOPS,
    counted,
    matmul_flops,
    read,
)
from twinflow_jax.planning import hlo
from twinflow_jax.planning.work import step_kernels


@pytest.mark.parametrize("name", EXPECTED)
def test_recorded_programs_match_hand_counts(name):
    program = read(name)
    flops, collectives = EXPECTED[name]
    assert matmul_flops(program) == flops
    assert counted(program) == collectives
    assert program.unknown_loops == ()


@pytest.mark.parametrize("name, backward", [
    ("splash", {"splash_mha_dkv_segmented_no_residuals": 3}),
    ("splash_apart", {"splash_mha_dkv_segmented_no_residuals": 3,
                      "splash_mha_dq_segmented_no_residuals": 3}),
])
def test_kernels_with_their_shapes(name, backward):
    program, found = read(name), Counter()
    for step in program.steps:
        for kernel in step_kernels(program, step):
            found[kernel.name] += step.times
            assert [array.dims for array in kernel.operands[2:5]] == [(2, 4, 1024, 128)] * 3
    forward = {"splash_mha_fwd_segmented_residuals": 6}  # thrice, and again for the backward
    assert found == forward | backward


def run(code, **environment):
    """What a fresh process prints; compiled programs are not kept."""
    root = HERE.parents[1]
    environment |= {
        "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "PYTHONPATH": str(root),
    }
    found = subprocess.run(
        [sys.executable, "-c", code], text=True, capture_output=True, timeout=300, check=False,
        cwd=root, env=os.environ | environment,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


ON_CPU = """
import json, jax, jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
from tests.planning.programs import counted, matmul_flops, stack, trips
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
    "nested": matmul_flops(hlo.parse(text(nested, array(16, 32), array(32, 32)))),
    "convolution": matmul_flops(
        hlo.parse(text(convolution, array(2, 16, 16, 8), array(3, 3, 8, 32)))),
    "branches": matmul_flops(hlo.parse(text(branches, array(16, 32), array(32, 32)))),
}
step, arguments = stack(Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b")), True)
program = hlo.parse(step.lower(*arguments).compile().as_text())
found["stack"] = matmul_flops(program)
found["trips"] = sorted(trips(program).values())
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


@pytest.mark.tpu
def test_programs_compiled_for_tpus_now(tmp_path):
    run(f"from tests.planning import programs; programs.record({str(tmp_path)!r})")
    for name, (flops, collectives) in EXPECTED.items():
        program = hlo.parse((tmp_path / f"{name}.hlo.txt").read_text())
        assert matmul_flops(program) == flops, name
        assert counted(program) == collectives, name
