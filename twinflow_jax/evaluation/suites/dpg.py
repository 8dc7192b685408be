"""DPG-Bench (2403.05135): long prompts, questions about each."""

import pathlib

from twinflow_jax.errors import UserError
from twinflow_jax.evaluation.suites.suite import Item, Line, Suite, printed

SAMPLES = 4


def parse(contents: dict[str, bytes]) -> list[Item]:
    return [
        Item(name.removesuffix(".txt"), data.decode().strip(), "")
        for name, data in sorted(contents.items())
    ]


def read(text: str, items) -> tuple[list[Line], dict[str, float]]:
    """Of the lines "file, a score of each crop, their mean" before the summary."""
    lines = []
    for row in text.split("Model: ")[0].splitlines():
        file, *scores = row.rsplit(", ", SAMPLES + 1)
        name = pathlib.PurePosixPath(file).name.split(".")[0]
        try:
            *crops, mean = map(float, scores)
        except ValueError:
            crops = ()
        if len(crops) != SAMPLES:
            raise UserError(f"the line {row[:80]!r} has not {SAMPLES} scores and their mean")
        if name not in items:
            raise UserError(f"{file} is of another prompt")
        if abs(sum(crops) / SAMPLES - mean) > 1e-6:
            raise UserError(f"the scores of {name} have another mean than {mean}")
        lines.append(Line(name, 0, mean, file=file))
    return lines, {}


# Called by itself, since the repository's script leaves its results in the folder of pictures,
# where they count as such the next time.
DPG = Suite(
    "dpg", "DPG-Bench", "mPLUG-large (official scorer)", "TencentQQGYLab/ELLA@3c228f1",
    ("dpg_bench/prompts", r".+\.txt"), 1065,
    "090f744aaa64391b0b6c7e80b9ff4148bbd78da00e884770005df2245cd0b159", parse, "{id}.png",
    "PYTHONHASHSEED=0 accelerate launch --num_processes 1 --mixed_precision fp16 "
    "dpg_bench/compute_dpg_bench.py --image-root-path {folder} --resolution {side} "
    "--pic-num 4 --res-path {folder}.results.txt --vqa-model mplug",
    read, ".txt", printed(r"DPG-Bench score: ([\d.]+)"), samples=SAMPLES, grid=True, scale=100,
)
