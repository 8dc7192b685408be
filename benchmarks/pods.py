"""The plans of docs/benchmarks.md: steps and pictures on TPU slices, by their compiler.

    python benchmarks/pods.py --out plans            # all of them: two to ten minutes each
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
WIDE = "--config.model.sample_shape=(128,128,16)"  # 1024x1024 pixels
ONCE = ("--strategy", "gather_once")
DOTS = ("--remat", "dots")
FEW_ROWS = (  # of adapters: all at once, passes apart, without an average beside the teacher's
    "--config.train.micro_steps=1", "--config.train.ema_decay=0",
    "--config.objective.merge_passes=False",
)
INT8 = "--config.train.weights=int8"
SHORT_MOMENTS = "--config.optimizer.moments=bfloat16"
LORA, EDIT = "configs/qwen20b_lora_tpu.py:order2", "configs/qwen_edit_lora_tpu.py"


def rows(number: int) -> str:
    return f"--config.data.batch_size={number}"


def on(topologies: str, name: str, config: str, *more: str) -> list[tuple]:
    """A plan on each of these slices, with blanks between."""
    return [(name, config, topology, more) for topology in topologies.split()]


# group: name, config, topology, further arguments
GROUPS = {
    "strategies": [
        ("partitioner", BENCH, "v5p:4x4x4", ("--strategy", "partitioner")),
        ("gather_layers", BENCH, "v5p:4x4x4", ()),
        ("gather_layers, dots saved", BENCH, "v5p:4x4x4", DOTS),
        ("gather_once", BENCH, "v5p:4x4x4", ONCE),
        ("gather_once, dots saved", BENCH, "v5p:4x4x4", (*ONCE, *DOTS)),
        ("gather_layers, dots saved, batch 256", BENCH, "v5p:4x4x4", (*DOTS, "--scale", "2")),
        ("gather_layers, inputs offloaded", BENCH, "v5p:4x4x4", ("--remat", "offload")),
    ],
    "texts": [
        (f"{tokens} text tokens, gather_layers, dots saved", BENCH, "v5p:4x4x4",
         (*DOTS, f"--config.data.text_tokens={tokens}"))
        for tokens in (128, 256)
    ],
    "shapes": [
        ("a teacher of its own (EMA .99)", BENCH, "v5p:4x4x4",
         ("--config.objective.teacher_decay=0.99", "--config.train.ema_decay=0.99")),
        ("1024x1024, batch 64", BENCH, "v5p:4x4x4", (WIDE, rows(64))),
        *on("v5e:16x16 v6e:16x16", "batch 256 on 256 chips", BENCH, "--scale", "2"),
        ("batch 128 on 64 chips (128 devices)", BENCH, "tpu7x:4x4x4", ()),
        ("batch 128 on 2 slices", BENCH, "2*v5p:4x4x4", ()),
        ("batch 128 on 2 slices, gather_once", BENCH, "2*v5p:4x4x4", ONCE),
    ],
    "fits": [
        *on("v4:2x2x4 v5e:4x8 v5p:2x2x1 v6e:2x4 v6e:4x4 tpu7x:2x2x1",
            "Qwen-Image-20B, batch 32", RELEASED),
        *on("v4:2x2x1 v5e:2x2 v5e:2x4 v5p:2x2x1 v6e:2x2 tpu7x:2x2x1",
            "SANA-1.6B, batch 128", "configs/sana16b_tpu.py"),
        *on("v5e:2x4", "SANA-0.6B, batch 128, 512x512, gather_once", "configs/sana06b_kaggle.py"),
        *on("v5e:4x4 v5p:2x2x1 v6e:2x4", "Z-Image, batch 32", "configs/zimage6b_tpu.py"),
        *on("v5e:2x4 v5p:2x2x1 v6e:2x2", "SD3.5-Medium, batch 128", "configs/sd35m_tpu.py"),
        *on("v5e:2x2 v5p:2x2x1 v6e:2x2", "OpenUni-L-512, batch 128",
            "configs/openuni512_tpu.py"),
    ],
    "adapters": [
        *on("v5e:2x2 v6e:2x2", "Qwen-Image-20B, 4 rows", LORA, rows(4), *FEW_ROWS),
        *on("v5e:2x2", "4 rows, inputs offloaded, moments in bfloat16", LORA, rows(4), *FEW_ROWS,
            "--remat", "offload", SHORT_MOMENTS),
        *on("v5e:2x2", "4 rows, int8", LORA, rows(4), *FEW_ROWS, INT8),
        *on("v5e:2x4", "8 rows", LORA, rows(8), *FEW_ROWS),
        *on("v5e:4x4", "16 rows", LORA, rows(16), *FEW_ROWS),
        *on("v6e:1x1", "4 rows one by one, int8, moments in bfloat16, no average", LORA, rows(4),
            "--config.train.micro_steps=4", "--config.train.ema_decay=0",
            "--config.objective.teacher_decay=0", INT8, SHORT_MOMENTS),
        *on("v5e:2x2", "Qwen-Image-Edit, 4 rows, int8", EDIT, rows(4), *FEW_ROWS, INT8),
        *on("v5e:2x4", "Qwen-Image-Edit, 8 rows", EDIT, rows(8), *FEW_ROWS),
        *on("v6e:2x2", "Qwen-Image-Edit, 4 rows", EDIT, rows(4), *FEW_ROWS),
        *on("v5e:1x1", "Z-Image, 4 rows, int8", "configs/zimage6b_lora_tpu.py", rows(4), INT8),
        *on("v6e:1x1", "Z-Image, 4 rows", "configs/zimage6b_lora_tpu.py", rows(4)),
        *on("v5e:1x1", "SD3.5-Medium, 4 rows", "configs/sd35m_lora_tpu.py", rows(4)),
        *on("v5e:1x1", "OpenUni-L-512, 4 rows", "configs/openuni512_lora_tpu.py", rows(4)),
    ],
    "sampling": [
        (f"8 images, {steps} NFE", RELEASED, "v6e:2x4",
         ("--mode", "sample", "--steps", str(steps), rows(8), WIDE))
        for steps in (1, 4)
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
        lines = []
        for number, (name, config, topology, more) in enumerate(GROUPS[group]):
            file = args.out / f"{group}_{number}.json"
            if not file.exists():
                print(f"{group}: {name}, {topology}", file=sys.stderr, flush=True)
                make(config, topology, more, file)
            lines.append(row(name, json.loads(file.read_text())[0]))
        print(f"\n{group}\n\n" + "\n".join([HEADER, *lines]), flush=True)


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
