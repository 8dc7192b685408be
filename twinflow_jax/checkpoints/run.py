"""The folder of a run: whose it is, and what can be read from it."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from twinflow_jax import buckets, files, holders, models, seeds
from twinflow_jax import config as configs
from twinflow_jax.checkpoints import adapter_files, imported, store
from twinflow_jax.checkpoints.imported import FORMAT
from twinflow_jax.checkpoints.saver import Saver, stored
from twinflow_jax.config import RANDOM, Run
from twinflow_jax.errors import UserError, few
from twinflow_jax.models import names

RECORD = "config.json"
COMMITTED = "commit_success.txt"  # orbax's, in a bucket: what has it is complete
IN_USE = "in_use"  # a file that is in a run's folder for as long as it is trained

# A run may go on with other values of these: they change what is reported and how the work is
# shared, not what is learned (training.checks says which numbers of steps do not either).
FREE = (
    "train.steps", "train.log_every", "train.loggers", "train.sample_every",
    "train.checkpoint_every", "train.keep", "train.hub", "sample.steps", "sample.columns",
    "sample.prompts", "sample.score_count", "mesh.data", "mesh.fsdp", "mesh.tensor",
    "mesh.context", "mesh.strategy", "model.remat", "train.micro_steps", "objective.merge_passes",
)


@contextlib.contextmanager
def claim(workdir: epath.PathLike, run: Run, rows: str = "") -> Iterator[None]:
    """Makes a folder this run's, and that for as long in the hands of this process.

    Raises:
      UserError: as `check_claim`, or another process has it, which is named.
    """
    folder = epath.Path(workdir)
    with holders.held(folder / IN_USE, folder):
        check_claim(workdir, run, rows)  # again: nobody else can change it now
        fields = {"format": FORMAT, "rows": rows} | run.fields()
        files.write(folder / RECORD, json.dumps(fields, indent=2).encode())
        yield


def check_claim(workdir: epath.PathLike, run: Run, rows: str = "") -> None:
    """Refuses a folder that cannot be this run's, and touches nothing.

    rows: a digest of what is trained on, where that may change. A record without checkpoints is of
    a start that came to nothing, and is replaced.
    Raises:
      UserError: the folder holds another run, or files that are no run.
    """
    if not buckets.is_remote(workdir):  # where claiming it tells soon enough
        files.check_folder("--workdir", str(workdir))
    store.absolute(workdir)  # where checkpoints can be
    folder = epath.Path(workdir)
    record = folder / RECORD
    if record.exists() and (folder / "checkpoints").exists():
        check_same(folder, run, rows, "--workdir", str(folder))
    elif (
        not record.exists() and folder.exists()
        and any(entry.name != IN_USE for entry in folder.iterdir())
    ):
        raise UserError(f"{folder} is not empty and holds no run: choose another --workdir")


def check_same(folder: epath.PathLike, run: Run, rows: str, flag: str, place: str) -> None:
    """Refuses a folder whose record is another run's. flag, place: what gave it, and its name.

    Raises:
      UserError: says what differs.
    """
    mine = configs.flatten(run.fields())
    other = configs.flatten(read_run(folder).fields())
    differing = [
        f"{key} is {other.get(key)!r} there, {mine.get(key)!r} here"
        for key in sorted(mine.keys() | other.keys())
        if key not in FREE and mine.get(key) != other.get(key)
    ]
    if differing:
        raise UserError(
            f"{place} holds another run ({few(differing)}): "
            f"choose another {flag}, or the config that it was started with"
        )
    if json.loads((epath.Path(folder) / RECORD).read_text()).get("rows", rows) != rows:
        raise UserError(
            f"{place} was started on other records, or pairs, than data now names: choose "
            f"another {flag}, or make again what it was started on"
        )


def read_run(folder: epath.PathLike) -> Run:
    """The run that was started in a folder.

    Raises:
      UserError: the folder is no run, or its record cannot be read, or its weights are in a format
        that this version does not read.
    """
    record = epath.Path(folder) / RECORD
    if not record.exists():
        raise UserError(
            f"{folder} is no run: it has no config.json (give the --workdir of training)"
        )
    try:
        fields = json.loads(record.read_text())
        if not isinstance(fields, dict):
            raise UserError("it holds no keys with values")
        written = fields.pop("format", 1)
        if not isinstance(written, int):
            raise UserError(f"format is {written!r}, no number")
        fields.pop("rows", None)
        if isinstance(model := fields.get("model"), dict):
            model.pop("second_embedder", None)  # what is now the default time_conditioning
        run = Run.of(fields)
    except (ValueError, OSError) as error:
        raise UserError(
            f"{record} cannot be read as a run's config ({error}): put it back as it was"
        ) from error
    if written > FORMAT or (written == 1 and run.model.name == "qwen_image"):
        raise UserError(
            f"{folder} is a run of another version of this project, whose weights have another "
            "order: use that version, or start again in another --workdir"
        )
    return run


def steps_of(run: epath.PathLike) -> list[int]:
    """The steps that a run has a complete checkpoint of, in order."""
    folder = epath.Path(run) / "checkpoints"
    entries = [e for e in folder.iterdir() if e.name.isdecimal()] if folder.exists() else []
    if buckets.is_remote(folder):
        entries = [entry for entry in entries if (entry / COMMITTED).exists()]
    return sorted(int(entry.name) for entry in entries)


def load_weights(
    folder: epath.PathLike, raw: bool = False, step: int | None = None, abstract: Any = None
) -> tuple[Run, models.Model, Any, int]:
    """`(run, model, params, step)` of a run's folder: its average weights, or the raw ones.

    step: of the checkpoint (default: the newest). abstract: the weights with the layouts to load
    them in (default: whole, onto the first device).
    Raises:
      UserError: no run, no such checkpoint, or one that cannot be read.
    """
    with _reader(folder, raw, step) as (run, saver, part, step):
        model = models.build(run.model, adapter=run.adapter)
        params = abstract or store.on_one_device(model.abstract_params())
        if run.adapter.rank:
            arrays = _with_base(run, stored(saver.folder / str(step) / part))
            return run, model, store.load(arrays, params, str(folder), progress=False), step
        return run, model, saver.load(step, {part: params})[part], step


def open_weights(
    folder: epath.PathLike, raw: bool = False, step: int | None = None
) -> tuple[Run, store.Arrays, int]:
    """`(run, arrays, step)`: the same weights, open and not yet read.

    Raises:
      UserError: as `load_weights`.
    """
    with _reader(folder, raw, step) as (run, saver, part, step):
        return run, _with_base(run, stored(saver.folder / str(step) / part)), step


def open_start(source: epath.PathLike) -> store.Arrays:
    """The weights of an imported checkpoint's transformer, of an imported adapter and its base, or
    of a run: `train.init_from`.

    Raises:
      UserError: as `open_weights`.
    """
    if adapter_files.is_imported(source):
        return adapter_files.start(source)
    if imported.is_imported(source):
        return imported.open_imported(source).arrays("transformer")
    return open_weights(source)[1]


def base_of(run: Run) -> store.Arrays:
    """The weights that a run's adapters are on.

    Raises:
      UserError: as `open_start`.
    """
    if run.train.init_from:
        return open_start(run.train.init_from)
    params = names.flatten(jax.jit(models.build(run.model).init)(seeds.initial(run.train.seed)))
    return {path: ts.array(np.asarray(leaf)) for path, leaf in params.items()}


def _with_base(run: Run, arrays: store.Arrays) -> store.Arrays:
    """Arrays of a run's checkpoint, with those that it left to the base of its adapters."""
    return base_of(run) | arrays if run.adapter.rank else arrays


def pipeline_of(folder: epath.PathLike, run: Run) -> str:
    """The imported checkpoint whose text encoder and autoencoder go with a run.

    Raises:
      UserError: the run has none.
    """
    if not run.pipeline:
        raise UserError(f"{folder} names no imported checkpoint, so its prompts cannot be encoded")
    return run.pipeline if run.pipeline != RANDOM else str(epath.Path(folder) / RANDOM)


@contextlib.contextmanager
def _reader(folder: epath.PathLike, raw: bool, step: int | None):
    """`(run, saver, part, step)` to read a run's checkpoint with; part: what to sample from."""
    run = read_run(folder)
    part = "params" if raw or run.train.ema_decay == 0 else "average"
    if not (epath.Path(folder) / "checkpoints").exists():
        raise UserError(f"{folder} has no checkpoint yet")
    saver = Saver(folder, keep=run.train.keep, writes=False)
    try:
        if not saver.steps:
            raise UserError(f"{folder} has no complete checkpoint")
        if step is not None and step not in saver.steps:
            raise UserError(
                f"{folder} has no checkpoint of step {step}; it has "
                f"{', '.join(map(str, saver.steps))}"
            )
        yield run, saver, part, saver.steps[-1] if step is None else step
    finally:
        saver.close()
