"""Pictures and sample metrics while training: the same noise every time."""

import functools

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Float
from PIL import Image

from twinflow_jax import images, parallel, seeds
from twinflow_jax.evaluation import sample_labels
from twinflow_jax.parallel import hosts
from twinflow_jax.sampling import Grid, few_step, sample
from twinflow_jax.training.inputs import Inputs, take
from twinflow_jax.training.setup import Setup


class Preview:
    """Samples a run's weights at each of `sample.steps`, draws a sheet and scores them.

    The loss says little about samples (it may rise while they improve): watch these instead.
    """

    def __init__(self, prepared: Setup, inputs: Inputs, workdir: str):
        run, self._strategy = prepared.run, prepared.strategy
        self._inputs, self._folder = inputs, epath.Path(workdir) / "samples"
        self.grids = [few_step(steps) for steps in run.sample.steps]
        self._every, self._last = run.train.sample_every, run.train.steps
        self._columns, self._rows = run.sample.columns, len(inputs.names)
        self._about = inputs.shown.get("references", ())
        scored = run.sample.score_count if inputs.judge else 0
        self._count = max(scored, self._columns * self._rows)
        self._labels = sample_labels(self._count, self._rows)
        noise_key, self._key = jax.random.split(seeds.key(run.train.seed))
        self.shape = self._count, *inputs.model.sample_shape
        self._noise = np.asarray(jax.random.normal(noise_key, self.shape))

    def missing(self, step: int, metrics: list[dict]) -> bool:
        """Whether pictures were due at this step and are not there, or their scores are not among
        the rows of metrics.jsonl."""
        due = step > 0 and (step % self._every == 0 or step == self._last)
        names = {name for row in metrics if row["step"] == step for name in row}
        scored = self._inputs.judge is None or any(name.startswith("samples/") for name in names)
        return due and not (scored and self._file(step).exists())

    def _file(self, step: int) -> epath.Path:
        return self._folder / f"step_{step:06d}.png"

    def draw(
        self, params, step: int
    ) -> tuple[Image.Image | None, dict[int, Float[np.ndarray, "N H W C"]]]:
        """Writes samples/step_STEP.png; returns it, and all pictures by number of evaluations.

        Every process samples, since all hold parts of the weights; the first one draws, the
        others have neither.
        """
        blocks, drawn = dict(self._sources), {}
        over = parallel.over_rows(self._strategy.mesh, self._count)
        shown = np.concatenate(  # rows are classes, or prompts
            [np.flatnonzero(self._labels == row)[: self._columns] for row in range(self._rows)]
        )
        noise, cond = hosts.put((self._noise, take(self._inputs.shown, self._labels)), over)
        for grid in self.grids:
            with self._strategy.applied():
                x = sample(self._inputs.model.apply, params, noise, cond, grid, self._key)
            x = multihost_utils.process_allgather(x, tiled=True)  # whole on every process
            if not hosts.leads():
                continue
            drawn[grid.nfe] = x = self._inputs.decode(x)
            blocks[f"{grid.nfe} NFE"] = x[shown]
        if not hosts.leads():
            return None, drawn
        rows = self._inputs.names if self._about else ()
        sheet = images.sheet(blocks, self._columns, title=f"step {step}", rows=rows)
        images.save(self._file(step), sheet, {"rows": "\n".join(self._inputs.names)})
        return sheet, drawn

    def score(
        self, drawn: dict[int, Float[np.ndarray, "N H W C"]]
    ) -> dict[int, dict[str, float]]:
        """Scores of drawn pictures, by number of evaluations; {} where nothing judges them.

        The first time it may train the judge: that is why it comes after the sheet.
        """
        if self._inputs.judge is None:
            return {}
        judge = self._inputs.judge()
        return {nfe: judge.score(x, self._labels) for nfe, x in drawn.items()}

    @functools.cached_property
    def _sources(self) -> dict[str, np.ndarray]:
        """The pictures that each row is an edit of, as they are shown before it."""
        if not hosts.leads():
            return {}
        return {
            f"source {number}": self._inputs.decode(latents)
            for number, latents in enumerate(self._about, 1)
        }

    def lower(self, grid: Grid, params, **options) -> jax.stages.Lowered:
        """What `make` draws with along one of `grids`. params: abstract."""
        over = parallel.over_rows(self._strategy.mesh, self._count)
        noise, cond = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=over),
            (self._noise, take(self._inputs.shown, self._labels)),
        )
        apply = self._inputs.model.apply
        with self._strategy.applied():
            return sample.trace(apply, params, noise, cond, grid, self._key).lower(**options)

    def where(self, step: int) -> str:
        """Where the pictures are, in one line."""
        return f"step {step}: pictures in {self._file(step)}"


def line(step: int, scores: dict[int, dict[str, float]]) -> str:
    """The scores in one line."""
    return f"step {step}: " + "   ".join(
        f"{n} NFE accuracy {row['accuracy']:.3f} Frechet {row['frechet']:.1f} "
        f"diversity {row['diversity']:.1f}"
        for n, row in scores.items()
    )
