"""Pictures and sample metrics while training: the same noise every time."""

import jax
import numpy as np
from etils import epath

from twinflow_jax import data, evaluation, images, models
from twinflow_jax.evaluation import sample_labels
from twinflow_jax.sampling import few_step, sample


class Preview:
    """Samples a run's weights at each of `sample.steps`, draws a sheet and scores them.

    The loss says little about samples (it may rise while they improve): watch these instead.
    """

    def __init__(self, config, model: models.Model, dataset: data.Dataset, workdir: str):
        self._model, self._folder = model, epath.Path(workdir) / "samples"
        self._grids = [few_step(steps) for steps in config.sample.steps]
        self._every, self._last = config.train.sample_every, config.train.steps
        self._columns, self._classes = config.sample.columns, dataset.num_classes
        self._count = max(config.sample.score_count, self._columns * self._classes)
        self._labels = sample_labels(self._count, dataset.num_classes)
        noise_key, self._key = jax.random.split(jax.random.key(config.train.seed))
        self._noise = jax.random.normal(noise_key, (self._count, *model.sample_shape))
        scored = model.config.num_classes > 0 and config.sample.score_count > 0
        self._judge = evaluation.Judge.create(dataset) if scored else None

    def missing(self, step: int) -> bool:
        """Whether pictures were due at this step and are not there."""
        due = step > 0 and (step % self._every == 0 or step == self._last)
        return due and not self._file(step).exists()

    def _file(self, step: int) -> epath.Path:
        return self._folder / f"step_{step:06d}.png"

    def make(self, params, step: int) -> dict[int, dict[str, float]]:
        """Writes samples/step_STEP.png; returns scores by number of evaluations."""
        blocks, scores = {}, {}
        shown = np.concatenate(  # rows are classes
            [np.flatnonzero(self._labels == c)[: self._columns] for c in range(self._classes)]
        )
        for grid in self._grids:
            x = sample(
                self._model.apply, params, self._noise, self._model.cond(self._labels), grid,
                self._key,
            )
            x = np.clip(np.asarray(x), -1, 1)
            blocks[f"{grid.nfe} NFE"] = x[shown]
            if self._judge:
                scores[grid.nfe] = self._judge.score(x, self._labels)
        sheet = images.sheet(blocks, self._columns, title=f"step {step}")
        images.save(self._file(step), sheet)
        return scores

    @staticmethod
    def line(step: int, scores: dict[int, dict[str, float]]) -> str:
        """The scores in one line."""
        return f"step {step}: pictures" + "".join(
            f"   {n} NFE accuracy {row['accuracy']:.3f} Frechet {row['frechet']:.1f} "
            f"diversity {row['diversity']:.1f}"
            for n, row in scores.items()
        )
