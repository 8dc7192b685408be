"""The seconds of `plan` held against step times that others published.

    pip install -e ".[pod]"
    python benchmarks/calibration.py --out runs/calibration

Each workload is a program of the same shape, written in benchmarks/published, compiled for its
slice by the TPU's compiler and predicted by the model behind `plan`. At the end the two constants
that are fitted are fitted anew without each workload in turn, whose error is then the model's.
"""

import argparse
import collections
import itertools
import json
import math
import pathlib
import sys
from unittest import mock

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from published import decoder, flux

from twinflow_jax.errors import UserError, run_verb
from twinflow_jax.planning import compiling, cost, hlo, topology
from twinflow_jax.planning.topology import GIB

WORKLOADS = decoder.WORKLOADS | flux.WORKLOADS
LEAST = tuple(percent / 100 for percent in range(75, 96))  # cost.MATMUL_LEAST
SHARES = (0.55, 0.65, 0.75)  # cost.ATTENTION_SHARE; the last is our bound
Constants = tuple[float, float]


def compiled(workload, name: str, slice_name: str):
    """What the compiler makes of a step, as a program and its bytes, and the step's devices."""
    mesh = workload.mesh(topology.devices(topology.resolve(slice_name)))
    devices = list(mesh.devices.flat)
    optimizer, loss = workload.optimizer, workload.loss(mesh)
    placed = lambda leaf: jax.ShapeDtypeStruct(
        leaf[0], leaf[1], sharding=NamedSharding(mesh, leaf[2])
    )
    shapes = lambda tree: jax.tree.map(placed, tree, is_leaf=lambda leaf: isinstance(leaf, tuple))
    params, batch = shapes(workload.parameters()), shapes(workload.batch(len(devices)))
    layouts = jax.tree.map(lambda leaf: leaf.sharding, params)
    moments = optax.tree.map_params(
        optimizer, lambda _, like: like, jax.eval_shape(optimizer.init, params), params,
        transform_non_params=lambda leaf: placed((leaf.shape, leaf.dtype, P())),
    )

    def step(params, moments, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        gradient = jax.lax.with_sharding_constraint(gradient, layouts)
        changes, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, changes), moments, value

    lower = lambda: jax.jit(step, donate_argnums=(0, 1)).trace(params, moments, batch).lower(
        lowering_platforms=("tpu",)
    )
    made = compiling.compiled(lower, workload.options, devices, name)
    if made.refused:
        raise UserError(f"{name}: {made.refused}")
    return hlo.parse(made.text), made.peak, devices


def attention(found: cost.Prediction) -> float:
    """Seconds of attention's kernels, every block of them."""
    return sum(part.seconds for part in found.components if part.name == "attention kernels")


def seconds_of(found: cost.Prediction, workload) -> float:
    """Of a step. The model of the kernel does not know which blocks a mask skips."""
    return found.overlapped - attention(found) * (1 - workload.attended)


def held_out(errors: dict[str, dict[Constants, float]]) -> str:
    """Each workload's error with the constants that the others' are least with. errors: by workload
    and constants."""
    def fitted(to: list[dict[Constants, float]]) -> Constants:
        return min(to[0], key=lambda at: sum(math.log1p(one[at]) ** 2 for one in to))

    lines = ["| held out | fitted to the others | error |", "|---|---|---|"]
    for name, mine in errors.items():
        least = fitted([theirs for other, theirs in errors.items() if other != name])
        lines.append(f"| {name} | {least[0]}, {least[1]} | {mine[least]:+.1%} |")
    least = fitted(list(errors.values()))
    return "\n".join([*lines, f"| none | {least[0]}, {least[1]} | |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder for the results")
    parser.add_argument("--only", help="workloads whose name holds this")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print("| workload | published s | predicted s | error | GiB | matmul | attention | "
          "collectives, of them hidden | rest |\n|---|---|---|---|---|---|---|---|---|")
    errors: dict[str, dict[Constants, float]] = collections.defaultdict(dict)
    for name, (slice_name, workload) in WORKLOADS.items():
        if args.only and args.only not in name:
            continue
        program, peak, devices = compiled(workload, name, slice_name)
        found = cost.predict(program, devices)
        by_name = {part.name: part for part in found.components}
        take = lambda key: by_name[key].seconds if key in by_name else 0.0  # noqa: B023
        attended, seconds = attention(found) * workload.attended, seconds_of(found, workload)
        moved = [part for part in found.components if "(" in part.name]
        all_moved, hidden = (sum(get(p) for p in moved) for get in (
            lambda p: p.seconds, lambda p: p.hidden,
        ))
        rest = seconds - take("matmul") - attended - all_moved + hidden
        error = seconds / workload.published - 1
        print(f"| {name} | {workload.published:.2f} | {seconds:.2f} | {error:+.0%} | "
              f"{peak / GIB:.1f} | {take('matmul'):.2f} | {attended:.2f} | {all_moved:.2f}, "
              f"{hidden:.2f} | {rest:.2f} |", flush=True)
        record = {"published": workload.published, "predicted": seconds, "components": {
            part.name: [part.seconds, part.hidden, part.amount] for part in found.components
        }}
        file = args.out / f"{name.replace(' ', '_').replace(',', '')}.json"
        file.write_text(json.dumps(record, indent=1))
        for note in found.notes:
            print(note, file=sys.stderr)
        for least, share in itertools.product(LEAST, SHARES):
            with mock.patch.multiple(cost, MATMUL_LEAST=least, ATTENTION_SHARE=share):
                seconds = seconds_of(cost.predict(program, devices), workload)
            errors[name][least, share] = seconds / workload.published - 1
    if len(errors) > 1:
        print(f"\n{held_out(errors)}")


if __name__ == "__main__":
    run_verb(main)
