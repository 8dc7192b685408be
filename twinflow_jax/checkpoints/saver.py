"""Checkpoints through orbax: in the background, whole or not at all.

WORKDIR/checkpoints/STEP/ holds each part of the state apart (`training.state.to_parts`): `params`,
`average` and `teacher` (where they exist), `progress`; a sampler reads only the weights it uses.
"""

import contextlib
import logging
import sys

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from twinflow_jax.errors import UserError, reason
from twinflow_jax.parallel import hosts


class Saver:
    """Saves and restores the checkpoints of one run; the last `keep` stay.

    writes: whether this is the run's own saver. Only that one clears away saves that a kill
    left half done; a reader beside a run that trains must not touch them.
    """

    def __init__(self, workdir: epath.PathLike, keep: int, writes: bool = True):
        self.folder = epath.Path(workdir).resolve() / "checkpoints"  # orbax wants it absolute
        if writes:
            self.folder.mkdir(parents=True, exist_ok=True)
        # Orbax logs failures with tracebacks from its threads, and raises them too: the second
        # is what reaches the user.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._pending: int | None = None
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=writes,
        )

    @property
    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, in order."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, step: int, parts: dict) -> None:
        """Starts saving a step's parts; returns once their buffers may be donated.

        Raises:
          UserError: the save before this one failed, or this one could not start.
        """
        self.wait()
        if step in self.steps:
            return
        self._pending = step
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

    def _report(self, error: Exception):
        step, self._pending = self._pending, None
        raise UserError(
            f"the checkpoint of step {step} could not be saved in {self.folder} "
            f"({first_line(error)}): make room there, then start the same command again; "
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
                    (self.folder / str(torn)).rename(self.folder / f"unreadable_{torn}")
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
        alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
        memory = ocp.options.MemoryOptions(read_concurrent_bytes=largest(abstract_parts) + 1)
        try:
            with ocp.Context(multiprocessing_options=alone, memory_options=memory):
                return ocp.load_checkpointables(self.folder / str(step), abstract_parts)
        except Exception as error:
            raise UserError(
                f"checkpoint {step} in {self.folder} cannot be read, torn or of another network "
                f"({first_line(error)})"
            ) from error

    def close(self) -> None:
        """Lets go of the folder. A save that failed was reported by `save` or `wait`."""
        with contextlib.suppress(Exception):
            self._checkpointer.close()


def largest(tree) -> int:
    """Bytes of the largest array of a tree, as float32 where its numbers are smaller."""
    return max(leaf.size * max(leaf.dtype.itemsize, 4) for leaf in jax.tree.leaves(tree))


def abstract(tree):
    """Shapes, dtypes and layouts of a tree of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def first_line(error: BaseException) -> str:
    """What the exception behind an exception says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return reason(error)
