"""What a run writes down: metrics.jsonl, TensorBoard, and the text beside the progress bar."""

import json
import math
import sys
import threading

import jax
from etils import epath
from tensorboardX import SummaryWriter

from twinflow_jax import files
from twinflow_jax.errors import UserError
from twinflow_jax.parallel import hosts


class Log:
    """Metrics of a run, means over the steps between two writes (in this process: a mean
    whose steps a stop divides is over those since the resume).

    A resumed run drops the lines that lie beyond the step it resumes from, so that each step
    appears once in metrics.jsonl. Every process watches, the first one writes.
    """

    def __init__(self, workdir: epath.PathLike, first_step: int):
        self._since: list[dict[str, float]] = []
        self._hook, self._board = threading.excepthook, None
        if not hosts.leads():
            return
        self._file = epath.Path(workdir) / "metrics.jsonl"
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        kept = [line for line in lines if _step_of(line) <= first_step]
        files.write(self._file, "".join(line + "\n" for line in kept).encode())
        threading.excepthook = _without_os_errors(self._hook)
        self._board = SummaryWriter(
            str(epath.Path(workdir) / "tensorboard"), purge_step=first_step + 1
        )

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        if self._board is None:
            return
        try:
            self._board.close()
        except OSError:  # a full disk: it will be tried again at exit, in vain
            sys.unraisablehook = _without_os_errors(sys.unraisablehook)
        threading.excepthook = self._hook

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
        self._record({"step": step} | means)
        terms = " ".join(
            f"{k.removeprefix('loss/')} {v:.3g}" for k, v in means.items() if k.startswith("loss/")
        )
        return (
            f"loss {means['loss']:.3g} ({terms}) "
            f"|g| {means['gradient_norm']:.2g} |p| {means['parameter_norm']:.4g}"
        )

    def write_samples(self, step: int, scores: dict[int, dict[str, float]]) -> None:
        """Writes sample metrics by number of evaluations."""
        flat = {f"samples/{n}_nfe/{k}": v for n, row in scores.items() for k, v in row.items()}
        if flat:
            self._record({"step": step} | flat)

    def _record(self, row: dict[str, float]) -> None:
        if self._board is None:
            return
        with self._file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, row["step"])


def _without_os_errors(hook):
    """An exception hook that leaves out OSError: TensorBoard's own threads and exit handler on
    a full disk. The loop's writes meet the same disk and end the run with one line."""

    def filtered(arguments):
        if not isinstance(arguments.exc_value, OSError):
            hook(arguments)

    return filtered


def _step_of(line: str) -> float:
    """The step of a line; infinity for one that was torn by a kill."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf
