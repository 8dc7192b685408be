"""What a run writes down, through its loggers, and the text beside the progress bar."""

import math

import jax
from etils import epath
from PIL import Image

from twinflow_jax import buckets
from twinflow_jax.config import Run
from twinflow_jax.errors import UserError
from twinflow_jax.parallel import hosts
from twinflow_jax.training.loggers import LOGGERS, JsonLines, Logger


class Log:
    """Metrics of a run, means over the steps between two writes (in this process: a mean
    whose steps a stop divides is over those since the resume).

    Every process watches, the first one writes: to `place`, if not to the folder itself.
    """

    def __init__(
        self, workdir: epath.PathLike, run: Run, first_step: int,
        place: epath.PathLike | None = None,
    ):
        self._since: list[dict[str, float]] = []
        kinds = (JsonLines, *(LOGGERS[name] for name in run.train.loggers))
        self._loggers: list[Logger] = [
            kind(buckets.absolute(workdir), run, first_step, epath.Path(place or workdir))
            for kind in kinds if hosts.leads()
        ]

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        for logger in self._loggers:
            logger.close()

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes in one step's metrics; waits for that step to finish.

        Raises:
          UserError: one is NaN or infinite; names the step and the terms.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            terms = [name for name in bad if name.startswith("loss/")] or bad
            raise UserError(
                f"step {step}: {', '.join(terms)} became {values[terms[0]]}; training stopped and "
                "saved nothing of it. A lower optimizer.learning_rate or "
                "optimizer.clip_norm=1.0 often helps"
            )
        self._since.append(values)

    def write(self, step: int) -> str:
        """Writes the means since the last write; returns them as text for the progress bar."""
        means = {}
        for name in {name: None for row in self._since for name in row}:  # phases differ in terms
            values = [row[name] for row in self._since if name in row]
            means[name] = sum(values) / len(values)
        self._since = []
        self._record(step, means)
        terms = " ".join(
            f"{k.removeprefix('loss/')} {v:.3g}" for k, v in means.items() if k.startswith("loss/")
        )
        return (
            f"loss {means['loss']:.3g} ({terms}) "
            f"|g| {means['gradient_norm']:.2g} |p| {means['parameter_norm']:.4g}"
        )

    def write_samples(
        self, step: int, scores: dict[int, dict[str, float]], sheet: Image.Image | None
    ) -> None:
        """Writes sample metrics by number of evaluations, and their sheet."""
        flat = {f"samples/{n}_nfe/{k}": v for n, row in scores.items() for k, v in row.items()}
        if flat:
            self._record(step, flat)
        for logger in self._loggers:
            logger.pictures(step, sheet)

    def _record(self, step: int, row: dict[str, float]) -> None:
        for logger in self._loggers:
            logger.metrics(step, row)
