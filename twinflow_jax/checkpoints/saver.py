"""Checkpoints through orbax: in the background, whole or not at all.

WORKDIR/checkpoints/STEP/ holds each part of the state apart (`training.state.to_parts`): `params`,
`average` and `teacher` (where they exist), `progress`; a sampler reads only the weights it uses.
"""

import contextlib
import glob
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from twinflow_jax import buckets, files
from twinflow_jax.checkpoints import store
from twinflow_jax.errors import UserError, reason
from twinflow_jax.parallel import hosts


class Literal(type(epath.Path())):
    """A path whose own characters are no part of a pattern: orbax globs below the folder for the
    files that it merges, and `runs [v1]` would stand for `runs v` and `runs 1`."""

    def glob(self, pattern: str) -> Iterator["Literal"]:
        found = glob.iglob(os.path.join(glob.escape(str(self)), pattern))
        return map(type(self), found)


class Saver:
    """Saves and restores the checkpoints of one run; the last `keep` stay.

    writes: whether this is the run's own saver. Only that one clears away saves that a kill
    left half done; a reader beside a run that trains must not touch them.
    """

    def __init__(self, workdir: epath.PathLike, keep: int, writes: bool = True):
        folder = store.absolute(workdir) / "checkpoints"
        self.folder = folder if buckets.is_remote(folder) else Literal(folder)
        if writes:
            self.folder.mkdir(parents=True, exist_ok=True)
        logging.getLogger("absl").addFilter(_is_no_error)
        self._pending: int | None = None
        self._shapes: dict[str, Counter] = {}  # of each part of the pending save
        context = ocp.Context()
        # No method: orbax deeply copies what it is given.
        context.async_options.post_finalization_callback = lambda: self._check()
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            context=context,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=writes,
        )

    @property
    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, in order."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(
        self, step: int, parts: dict, settle: Callable[[], None] = lambda: None
    ) -> None:
        """Starts saving a step's parts; returns once their buffers may be donated.

        settle: called before it counts as a checkpoint, on the first process.
        Raises:
          UserError: the save before this one failed, or this one could not start.
        """
        self.wait()
        if step in self.steps:
            return
        self._pending, self._settle = step, settle
        self._shapes = {
            name: Counter(map(np.shape, jax.tree.leaves(part))) for name, part in parts.items()
        }
        try:
            self._checkpointer.save_checkpointables_async(step, parts)
        except Exception as error:
            self._report(error)

    def wait(self) -> None:
        """Waits for the save in progress.

        Raises:
          UserError: it failed; what was saved before is untouched.
        """
        if self._pending is None:
            return
        try:
            self._checkpointer.wait()
        except Exception as error:
            self._report(error)
        self._pending = None

    def _check(self) -> None:
        """Raises ValueError where what was written cannot be read.

        Orbax calls it, on the first process, before the save becomes a checkpoint and older ones
        are let go.
        """
        names = [entry.name for entry in self.folder.iterdir()]
        [name] = [name for name in names if name.split(".")[0] == str(self._pending)]
        for part, shapes in self._shapes.items():
            arrays = stored(self.folder / name / part).values()
            if Counter(tuple(array.shape) for array in arrays) != shapes:
                raise ValueError(f"its {part} cannot be read back whole")
        self._settle()

    def _report(self, error: Exception):
        step, self._pending = self._pending, None
        self._checkpointer.reload()  # what it meant to let go is still there
        advice = "make room there, then start" if files.is_full(error) else "start"
        raise UserError(
            f"the checkpoint of step {step} could not be saved in {self.folder} "
            f"({first_line(error)}): {advice} the same command again; "
            f"complete checkpoints: {self.steps or 'none'}"
        ) from error

    def restore(self, abstract_parts: dict) -> dict | None:
        """The newest parts that every process can read, or None where there is no checkpoint.

        A checkpoint that one cannot read is passed over by all, loudly, for the one before.
        Raises:
          UserError: there are checkpoints, but none can be read.
        """
        unreadable = []
        while (step := self._before(unreadable)) is not None:
            parts = error = None
            try:
                parts = self.load(step, abstract_parts)
            except UserError as raised:
                error = raised
            failed = hosts.where(error is not None)
            if failed:
                parts = None  # makes room for the one before
                error = error or (
                    f"checkpoint {step} in {self.folder} cannot be read on process "
                    f"{', '.join(map(str, failed))}"
                )
                print(f"warning: {error}; trying the one before", file=sys.stderr)
                unreadable.append(step)
                continue
            if hosts.leads():
                for torn in unreadable:  # out of the way of the step's next save
                    aside = self.folder / f"unreadable_{torn}"
                    if aside.exists():  # of the same step, torn before
                        aside.rmtree()
                    (self.folder / str(torn)).rename(aside)
            hosts.told(True)  # so that nobody looks before they are gone
            self._checkpointer.reload()
            return parts
        if unreadable:
            raise UserError(
                f"no checkpoint in {self.folder} can be read: restore a copy, or start over in "
                "another --workdir"
            )
        return None

    def _before(self, unreadable: list[int]) -> int | None:
        """The newest step of the first process's that is none of these."""
        step = hosts.told(max(set(self.steps).difference(unreadable), default=-1))
        return step if step >= 0 else None

    def load(self, step: int, abstract_parts: dict) -> dict:
        """The named parts of one checkpoint, as the abstract ones are shaped and laid out.

        Each process reads for itself and waits for no other, so that one may fail alone.
        Raises:
          UserError: it cannot be read, or is of another architecture.
        """
        own = jax.process_index()
        alone = ocp.Context()
        alone.multiprocessing_options.primary_host = own
        alone.multiprocessing_options.active_processes = {own}
        alone.memory_options.read_concurrent_bytes = largest(abstract_parts) + 1
        try:
            with alone:
                return ocp.load_checkpointables(self.folder / str(step), abstract_parts)
        except Exception as error:
            raise UserError(
                f"checkpoint {step} in {self.folder} cannot be read, torn or of another network "
                f"({first_line(error)})"
            ) from error

    def close(self) -> None:
        """Lets go of the folder; warns of a save that fails only now, beside what ended the run."""
        try:
            self.wait()
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
        with contextlib.suppress(Exception):  # that it raises again what has been said
            self._checkpointer.close()


def stored(part: epath.Path) -> store.Arrays:
    """The arrays of a part of a checkpoint, open and not yet read, by tree path.

    Raises:
      UserError: one cannot be opened.
    """
    base = store.location(part)
    entries = json.loads((part / "_METADATA").read_text())["tree_metadata"].values()
    paths = [
        [key["key"] for key in entry["key_metadata"]] for entry in entries
        if not entry["value_metadata"]["skip_deserialize"]  # nodes that have no leaves
    ]
    return {
        "/".join(path): store.open_array(
            {"driver": "ocdbt", "base": base, "path": ".".join(path) + "/"}
        )
        for path in paths
    }


def _is_no_error(record: logging.LogRecord) -> bool:
    """Leaves out orbax's errors, logged with tracebacks from its threads: it raises them too, and
    the second is what reaches the user."""
    return record.levelno < logging.ERROR


def largest(tree) -> int:
    """Bytes of the largest array of a tree, as float32 where its numbers are smaller."""
    return max(leaf.size * max(leaf.dtype.itemsize, 4) for leaf in jax.tree.leaves(tree))


def first_line(error: BaseException) -> str:
    """What the exception behind an exception says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return reason(error)
