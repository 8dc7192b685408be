"""Class-conditional runs in one table, judged by their dataset's classifier."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from twinflow_jax import checkpoints, data
from twinflow_jax.errors import UserError
from twinflow_jax.evaluation.judge import ClassJudge, sample_labels
from twinflow_jax.evaluation.report import Scores
from twinflow_jax.sampling import few_step, generate

COLUMNS = 8  # samples of a class on the sheet
LEAST, MOST = 200, 100_000  # samples of a score


def score(
    folders: Sequence[str], steps: Sequence[int], sampler: dict[str, Any], count: int, seed: int,
    raw: bool,
) -> Iterator[Scores]:
    """Of `count` samples of each run and number of steps: everything so far, after each of them.
    sampler: for `sampling.few_step`.

    Raises:
      UserError: too few samples or too many, or runs that cannot stand in one table.
    """
    grids = [few_step(n, **sampler) for n in steps]
    if not LEAST <= count <= MOST:
        raise UserError(f"--count is {count}; it is at least {LEAST}, at most {MOST:,}")
    runs = [checkpoints.read_run(folder) for folder in folders]
    if any(run.pipeline for run in runs):
        raise UserError("a run draws from text: use `evaluate captions`")
    names = {run.data.name for run in runs}
    if len(names) > 1:
        raise UserError(f"the runs were trained on different data ({', '.join(sorted(names))})")
    if any(run.model.num_classes == 0 for run in runs):
        raise UserError("scores are of class-conditional samples, and a run has no classes")
    loaded = {folder: checkpoints.load_weights(folder, raw) for folder in folders}
    dataset = data.load(names.pop())
    judge = ClassJudge.create(dataset)
    labels = sample_labels(count, dataset.num_classes)
    shown = np.concatenate(  # rows are classes
        [np.flatnonzero(labels == c)[:COLUMNS] for c in range(dataset.num_classes)]
    )
    rows, blocks, title = [], {}, "accuracy / Frechet distance"
    for folder, (_, model, params, step) in loaded.items():
        for grid in grids:
            x = generate(model, params, labels, grid, seed, progress=False)
            scores = judge.score(x, labels)
            rows.append({"run": folder, "step": step, "nfe": grid.nfe} | scores)
            name = f"{folder}, {grid.nfe} NFE: {scores['accuracy']:.3f} / {scores['frechet']:.1f}"
            blocks[name] = x[shown]
            yield Scores(rows, judge.real, blocks, title, {"count": count, "seed": seed}, COLUMNS)
