"""The plans of docs/benchmarks.md: Qwen-Image-20B and SANA on TPU pods, by their compiler.

    python benchmarks/pods.py --out plans            # all of them: one to five minutes each
    python benchmarks/pods.py --out plans fits       # one group

Needs `pip install -e ".[pod]"`, and no TPU. A plan that is in the folder already is not made again;
the tables are printed from what is there.
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
BENCH, RELEASED = "configs/qwen20b_tpu.py:bench", "configs/qwen20b_tpu.py:released"
WIDE = (  # 1024x1024 pixels
    "--config.model.sample_shape=(128,128,16)", "--config.data.batch_size=64",
)
ONCE = ("--strategy", "gather_once")
APART = "--config.objective.merge_passes=False"

# group: name, config, topology, further arguments
GROUPS = {
    "strategies": [
        ("partitioner, passes apart", BENCH, "v5p:4x4x4", ("--strategy", "partitioner", APART)),
        ("gather_layers, passes apart", BENCH, "v5p:4x4x4", (APART,)),
        ("gather_layers", BENCH, "v5p:4x4x4", ()),
        ("gather_once", BENCH, "v5p:4x4x4", ONCE),
        ("gather_once, dots saved", BENCH, "v5p:4x4x4", (*ONCE, "--remat", "dots")),
        ("gather_once, dots saved, batch 256", BENCH, "v5p:4x4x4",
         (*ONCE, "--remat", "dots", "--scale", "2")),
        ("gather_layers, inputs offloaded", BENCH, "v5p:4x4x4", ("--remat", "offload")),
    ],
    "shapes": [
        ("a teacher of its own (EMA .99)", BENCH, "v5p:4x4x4",
         ("--config.objective.teacher_decay=0.99", "--config.train.ema_decay=0.99")),
        ("1024x1024, batch 64", BENCH, "v5p:4x4x4", WIDE),
        ("1024x1024, batch 64, gather_once", BENCH, "v5p:4x4x4", (*WIDE, *ONCE)),
        ("batch 256 on 256 chips", BENCH, "v5e:16x16", ("--scale", "2")),
        ("batch 256 on 256 chips", BENCH, "v6e:16x16", ("--scale", "2")),
        ("batch 128 on 64 chips (128 devices)", BENCH, "tpu7x:4x4x4", ()),
        ("batch 128 on 2 slices", BENCH, "2*v5p:4x4x4", ()),
        ("batch 128 on 2 slices, gather_once", BENCH, "2*v5p:4x4x4", ONCE),
    ],
    "fits": [
        (f"{name}, batch {rows}", config, topology, (f"--config.data.batch_size={rows}",))
        for name, config, rows, topologies in (
            ("Qwen-Image-20B", RELEASED, 32, (
                "v4:2x2x4", "v5e:4x8", "v5p:2x2x1", "v6e:2x4", "v6e:4x4", "tpu7x:2x2x1",
            )),
            ("SANA-1.6B", "configs/sana16b_tpu.py", 128, (
                "v4:2x2x1", "v5e:2x2", "v5e:2x4", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1",
            )),
        )
        for topology in topologies
    ],
    "sampling": [
        (f"{rows} images, {steps} NFE", RELEASED, "v6e:2x4",
         ("--mode", "sample", "--steps", str(steps), f"--config.data.batch_size={rows}",
          "--config.model.sample_shape=(128,128,16)"))
        for rows, steps in ((8, 1), (8, 4))
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder for the plans")
    args = parser.parse_args()
    unknown = [group for group in args.groups if group not in GROUPS]
    if unknown:
        parser.error(f"no group {unknown[0]!r}; choose from {', '.join(GROUPS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for group in args.groups or GROUPS:
        rows = []
        for number, (name, config, topology, more) in enumerate(GROUPS[group]):
            file = args.out / f"{group}_{number}.json"
            if not file.exists():
                print(f"{group}: {name}, {topology}", file=sys.stderr, flush=True)
                make(config, topology, more, file)
            rows.append(row(name, json.loads(file.read_text())[0]))
        print(f"\n{group}\n\n" + "\n".join([HEADER, *rows]), flush=True)


def make(config: str, topology: str, more: tuple, file: pathlib.Path) -> None:
    command = [
        sys.executable, "-m", "twinflow_jax.plan", "--config", config, "--topology", topology,
        *more, "--json", str(file),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if not file.exists():
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")


HEADER = """\
| plan | on | GiB | of that activations | step s | less overlap | images/s | of peak | forwards | \
gathered GB | scattered GB | all-reduced GB |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def row(name: str, plan: dict) -> str:
    if plan["refused"]:
        return f"| {name} | {plan['topology']} | {plan['refused']} |" + " |" * 9
    moved = lambda kind: sum(
        row["bytes"] for name, row in plan["collectives"].items() if name.startswith(kind)
    ) / 1e9
    return (
        f"| {name} | {plan['topology']} | {plan['peak_bytes'] / 2**30:.2f} "
        f"| {plan['parts']['activations'] / 2**30:.2f} | {plan['seconds']:.2f} "
        f"| {plan['overlapped']:.2f} | {plan['images_per_second']:.1f} "
        f"| {plan['utilisation']:.0%} | {plan['forwards']:.2f} | {moved('all-gather'):.0f} "
        f"| {moved('reduce-scatter'):.0f} | {moved('all-reduce'):.1f} |"
    )


if __name__ == "__main__":
    main()
