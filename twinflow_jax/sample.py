"""Draw samples: `python -m twinflow_jax.sample --checkpoint runs/mnist --out samples`.

Writes one PNG per sample, or one labelled sheet with --sheet. The settings are in each PNG's
text chunks; the same seed gives the same picture, whatever else is drawn with it.
"""

import argparse
import json

import numpy as np
from etils import epath
from PIL import Image

from twinflow_jax import checkpoints, images
from twinflow_jax.errors import UserError, run_verb
from twinflow_jax.sampling import arguments, generate


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m twinflow_jax.sample", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, help="the --workdir of a training run")
    parser.add_argument("--out", required=True, help="folder for the pictures")
    parser.add_argument("--steps", type=int, default=1, help="network evaluations (default 1)")
    parser.add_argument("--classes", help="comma-separated classes (default: all)")
    parser.add_argument("--count", type=int, default=8, help="samples per class (default 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", action="store_true", help="one labelled sheet instead of files")
    parser.add_argument("--raw", action="store_true", help="raw weights instead of the average")
    parser.add_argument("--at-step", type=int, help="checkpoint to read (default: the newest)")
    arguments.add(parser)
    args = parser.parse_args()

    grid = arguments.grid(args, args.steps)
    if args.count < 1:
        raise UserError(f"--count is {args.count}; draw at least one sample per class")
    config, model, params, step = checkpoints.load_weights(args.checkpoint, args.raw, args.at_step)
    classes = parse_classes(args.classes, config.model.num_classes)
    labels = np.repeat(classes, args.count)
    x = generate(model, params, labels, grid, args.seed)

    text = {
        "Software": "twinflow_jax",
        "twinflow": json.dumps({
            "checkpoint": args.checkpoint, "at_step": step, "raw": args.raw, "seed": args.seed,
            "nfe": grid.nfe, "style": grid.style, "times": grid.times,
            "stochastic": grid.stochastic, "extrapolation": grid.extrapolation,
            "order": grid.order,
        }),
    }
    out = epath.Path(args.out)
    weights = f"step{step}{'_raw' if args.raw else ''}"
    run = epath.Path(args.checkpoint).name
    name = f"{run}_{weights}_{grid.style}{grid.nfe}nfe_seed{args.seed}"
    try:
        if args.sheet:
            file = out / f"sheet_{name}.png"
            picture = images.sheet({f"{grid.nfe} NFE": x}, args.count, f"step {step}")
            images.save(file, picture, text | {"classes": json.dumps(classes.tolist())})
            print(f"{len(x)} samples in {file}")
            return 0
        for i, label in enumerate(labels):
            file = out / f"class{label}_{i % args.count:04d}_{name}.png"
            pixels = Image.fromarray(images.to_uint8(x[i]))
            images.save(file, pixels, text | {"class": str(label)})
    except OSError as error:
        raise UserError(f"cannot write pictures to {out}: {error.strerror or error}") from error
    print(f"{len(x)} pictures in {out}")
    return 0


def parse_classes(text: str | None, num_classes: int) -> np.ndarray:
    """The classes that `--classes` names; class 0 stands in for a network without classes."""
    if num_classes == 0:
        return np.zeros(1, np.int32)
    if text is None:
        return np.arange(num_classes, dtype=np.int32)
    try:
        numbers = dict.fromkeys(int(part) for part in text.split(","))  # each once
        classes = np.asarray(list(numbers), np.int32)
    except ValueError as error:
        raise UserError(f"--classes is {text!r}; give numbers like 3,1,4") from error
    if classes.min() < 0 or classes.max() >= num_classes:
        raise UserError(f"--classes {text}: this network has classes 0 to {num_classes - 1}")
    return classes


if __name__ == "__main__":
    run_verb(main)
