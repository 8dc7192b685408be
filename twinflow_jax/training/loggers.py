"""Where metrics and pictures of a run go: metrics.jsonl always, others by name (train.loggers)."""

import hashlib
import importlib
import json
import sys
import threading
from typing import Protocol

import numpy as np
from etils import epath
from PIL import Image
from tensorboardX import SummaryWriter

from twinflow_jax import files
from twinflow_jax.config import Run
from twinflow_jax.errors import UserError, reason


class Logger(Protocol):
    """One of them, made on the first process as `(folder, run, first_step, place)`: of a run in a
    folder that goes on after a step, behind which nothing that was logged before still counts.
    place: the folder to write to, another one for a run in a bucket (buckets.Mirror)."""

    def metrics(self, step: int, row: dict[str, float]) -> None:
        """Takes numbers by name."""

    def pictures(self, step: int, sheet: Image.Image) -> None:
        """Takes a sheet of samples."""

    def close(self) -> None:
        """Ends it, all being written."""


class JsonLines:
    """metrics.jsonl, in which each step stands once. Sheets lie in samples/ already."""

    def __init__(self, folder: epath.Path, run: Run, first_step: int, place: epath.Path):
        self._file = place / "metrics.jsonl"
        kept = [row for row in files.rows(self._file) if row["step"] <= first_step]
        files.write(self._file, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def metrics(self, step: int, row: dict[str, float]) -> None:
        with self._file.open("a") as stream:
            stream.write(json.dumps({"step": step} | row) + "\n")

    def pictures(self, step: int, sheet: Image.Image) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files in tensorboard/."""

    def __init__(self, folder: epath.Path, run: Run, first_step: int, place: epath.Path):
        self._hook = threading.excepthook
        threading.excepthook = _without_os_errors(self._hook)
        self._board = SummaryWriter(str(place / "tensorboard"), purge_step=first_step + 1)

    def metrics(self, step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            self._board.add_scalar(name, value, step)

    def pictures(self, step: int, sheet: Image.Image) -> None:
        self._board.add_image("samples", np.asarray(sheet), step, dataformats="HWC")

    def close(self) -> None:
        try:
            self._board.close()
        except OSError:  # a full disk: it will be tried again at exit, in vain
            sys.unraisablehook = _without_os_errors(sys.unraisablehook)
        threading.excepthook = self._hook


class WeightsAndBiases:
    """A run of Weights & Biases, the same one after a resume; its own variables (WANDB_PROJECT,
    WANDB_MODE ...) say where. Steps that are done again are as they were, and it skips them."""

    def __init__(self, folder: epath.Path, run: Run, first_step: int, place: epath.Path):
        self._wandb = importlib.import_module("wandb")
        try:
            self._run = self._wandb.init(
                dir=str(place), name=folder.name, resume="allow", config=run.fields(),
                id=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
                settings=self._wandb.Settings(console="off"),  # leaves the progress bar alone
            )
        except self._wandb.Error as error:
            raise UserError(
                f"train.loggers: wandb does not start ({reason(error)}): log in with `wandb "
                "login`, set WANDB_MODE=offline, or leave it out"
            ) from error

    def metrics(self, step: int, row: dict[str, float]) -> None:
        self._run.log(row, step=step)

    def pictures(self, step: int, sheet: Image.Image) -> None:
        self._run.log({"samples": self._wandb.Image(sheet)}, step=step)

    def close(self) -> None:
        self._run.finish()


LOGGERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check(run: Run) -> None:
    """Refuses a logger whose package is not there, before anything slow.

    Raises:
      UserError: says what to install.
    """
    try:
        if "wandb" in run.train.loggers:
            importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"train.loggers names wandb, which cannot be imported ({reason(error)}): "
            "pip install wandb, or leave it out"
        ) from error


def _without_os_errors(hook):
    """An exception hook that leaves out OSError: TensorBoard's own threads and exit handler on
    a full disk. The loop's writes meet the same disk and end the run with one line."""

    def filtered(arguments):
        if not isinstance(arguments.exc_value, OSError):
            hook(arguments)

    return filtered
