"""What the twin losses learn from on a small Z-Image, as TwinFlow released its times and as here.

    python benchmarks/zimage_twin.py --steps 300

Two runs of configs/zimage6b_tpu.py:tiny from the same weights, with the same rows and noise. The
released network tells t and -t, r = t, as the same: it is ours whose third embedder stays at zero.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile

from twinflow_jax import config as configs
from twinflow_jax import models
from twinflow_jax.models.conditioning import TWIN
from twinflow_jax.training.loop import train

LOSSES = ("loss/rectify", "loss/adversarial", "loss/one_step")


def losses(steps: int, fixed: tuple[str, ...], every: int) -> list[dict]:
    """Of a run whose weights at these paths stay as they are, each the mean of `every` steps."""
    models.FAMILIES["zimage"] = dataclasses.replace(models.FAMILIES["zimage"], fixed=fixed)
    run = configs.parse("configs/zimage6b_tpu.py:tiny", [
        f"train.steps={steps}", f"train.log_every={every}", f"train.sample_every={steps}",
        f"train.checkpoint_every={steps}", "sample.steps=(1,)", "sample.columns=1",
        "model.remat=none",
    ])
    with tempfile.TemporaryDirectory() as folder:
        train(run, folder, progress=False)
        lines = (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if LOSSES[0] in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=50)
    args = parser.parse_args()
    ways = {"released": (f"{TWIN}/.*",), "signed": ()}
    found = {name: losses(args.steps, fixed, args.every) for name, fixed in ways.items()}
    names = [loss.removeprefix("loss/") for loss in LOSSES]
    print("| step | " + " | ".join(f"{name}, {way}" for name in names for way in ways) + " |")
    print("|---" * (1 + len(LOSSES) * len(ways)) + "|")
    for lines in zip(*found.values(), strict=True):
        cells = [f"{line[loss]:.4g}" for loss in LOSSES for line in lines]
        print(f"| {lines[0]['step']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
