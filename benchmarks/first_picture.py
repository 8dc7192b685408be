"""README's first picture: the same noise through several runs, each in some number of evaluations.

    python -m twinflow_jax.train --config configs/mnist.py --workdir runs/mnist
    python -m twinflow_jax.train --config configs/mnist_rcgm.py --workdir runs/mnist_rcgm
    python -m twinflow_jax.train --config configs/mnist.py --workdir runs/mnist_flow \\
        --config.train.flow_matching_steps=10000
    python benchmarks/first_picture.py --out docs/images/mnist.png \\
        "flow matching:runs/mnist_flow:32" "flow matching:runs/mnist_flow:1" \\
        "RCGM:runs/mnist_rcgm:1" "TwinFlow:runs/mnist:1"

Each block's title has the accuracy of the classes asked for and the Frechet distance to held-out
digits, of 1,000 pictures, as `twinflow evaluate classes` gives them.
"""

import argparse
import pathlib

import numpy as np

from twinflow_jax import checkpoints, data, images
from twinflow_jax.evaluation import ClassJudge
from twinflow_jax.evaluation.judge import sample_labels
from twinflow_jax.sampling import few_step, generate

COLUMNS, COUNT = 9, 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("blocks", nargs="+", metavar="NAME:RUN:EVALUATIONS")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    judges, blocks = {}, {}
    for block in args.blocks:
        name, folder, evaluations = block.split(":")
        run, model, params, _ = checkpoints.load_weights(folder)
        dataset = run.data.name
        judge = judges.setdefault(dataset, ClassJudge.create(data.load(dataset)))
        labels = sample_labels(COUNT, run.model.num_classes)
        shown = [np.flatnonzero(labels == c)[:COLUMNS] for c in range(run.model.num_classes)]
        # Flow matching knows no jumps. Of what its grid may leave out at the data's end, from 0 to
        # .5, .3 gives the nearest pictures (docs/benchmarks.md).
        along = {"style": "mul", "stochastic": 0.0, "gap": (0.001, 0.3)}
        grid = few_step(int(evaluations), **along if run.only_velocities else {})
        x = generate(model, params, labels, grid, args.seed)
        scores = judge.score(x, labels)
        steps = "1 evaluation" if evaluations == "1" else f"{evaluations} evaluations"
        title = f"{name}, {steps}: {scores['accuracy']:.3f} / {scores['frechet']:.1f}"
        blocks[title] = x[np.concatenate(shown)]
        print(title)
    images.save(args.out, images.sheet(blocks, COLUMNS, "accuracy / Frechet distance"))


if __name__ == "__main__":
    main()
