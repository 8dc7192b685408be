"""The seconds of `plan` held against step times that others published.

    pip install -e ".[pod]"
    python benchmarks/calibration.py --out runs/calibration

Each workload is a program of the same shape, written in benchmarks/published, compiled for its
slice by the TPU's compiler and predicted by the model behind `plan`.
"""

import argparse
import json
import pathlib
import sys

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from published import decoder, flux

from twinflow_jax.errors import UserError, run_verb
from twinflow_jax.planning import compiling, cost, hlo, topology
from twinflow_jax.planning.topology import GIB

WORKLOADS = decoder.WORKLOADS | flux.WORKLOADS


def predicted(workload, name: str, slice_name: str):
    """What the compiler makes of a step, and the model's prediction of it."""
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
    return made, cost.predict(hlo.parse(made.text), devices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder for the results")
    parser.add_argument("--only", help="workloads whose name holds this")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print("| workload | published s | predicted s | error | GiB | matmul | attention | "
          "collectives, of them hidden | rest |\n|---|---|---|---|---|---|---|---|---|")
    for name, (slice_name, workload) in WORKLOADS.items():
        if args.only and args.only not in name:
            continue
        made, found = predicted(workload, name, slice_name)
        by_name = {part.name: part for part in found.components}
        take = lambda key: by_name[key].seconds if key in by_name else 0.0  # noqa: B023
        # The model of the kernel does not know which blocks a mask skips.
        attended = take("attention kernels") * workload.attended
        seconds = found.overlapped - take("attention kernels") + attended
        moved = [part for part in found.components if "(" in part.name]
        all_moved, hidden = (sum(get(p) for p in moved) for get in (
            lambda p: p.seconds, lambda p: p.hidden,
        ))
        rest = seconds - take("matmul") - attended - all_moved + hidden
        error = seconds / workload.published - 1
        print(f"| {name} | {workload.published:.2f} | {seconds:.2f} | {error:+.0%} | "
              f"{made.peak / GIB:.1f} | {take('matmul'):.2f} | {attended:.2f} | {all_moved:.2f}, "
              f"{hidden:.2f} | {rest:.2f} |", flush=True)
        record = {"published": workload.published, "predicted": seconds, "components": {
            part.name: [part.seconds, part.hidden, part.amount] for part in found.components
        }}
        file = args.out / f"{name.replace(' ', '_').replace(',', '')}.json"
        file.write_text(json.dumps(record, indent=1))
        for note in found.notes:
            print(note, file=sys.stderr)


if __name__ == "__main__":
    run_verb(main)
