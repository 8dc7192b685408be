"""A run that the hub carries from machine to machine (train.hub).

A checkpoint there is what one commit has put there, with the metrics up to it; those beyond
train.keep go in the same commit. What is pushed is what the newest complete checkpoint on disk was.
"""

import contextlib
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator

from tqdm import tqdm

from twinflow_jax import buckets, files, holders, hub
from twinflow_jax.checkpoints.run import IN_USE, RECORD, check_same, steps_of
from twinflow_jax.config import Run
from twinflow_jax.errors import UserError

CARRIED = (RECORD, "metrics.jsonl", "speed.jsonl", "index.html", "samples/", "tensorboard/")
OTHERS = (".gitattributes", "README.md")  # of a repository that holds nothing
STAGE = ".hub"  # a folder in a run's: a checkpoint that comes or goes


class Carrier(buckets.Copying):
    """Pushes a run's checkpoints in the background, and fetches the newest where it goes on.

    What the hub refuses is told in a line and tried again with the next checkpoint. Only a run
    without checkpoints does not start without the hub, since it may have some there.
    """

    def __init__(self, workdir: str, run: Run, rows: str, leads: bool):
        """rows: as check_claim takes it. leads: whether this process is the one to do all this.

        Raises:
          UserError: the folder is in a bucket.
        """
        super().__init__(bool(run.train.hub) and leads)
        if run.train.hub and buckets.is_remote(workdir):
            raise UserError(
                f"train.hub carries a run from a disk, and {workdir} is in a bucket, where any "
                "machine goes on with it: leave train.hub out"
            )
        self._folder, self._run, self._rows = pathlib.Path(workdir), run, rows
        self._hub = hub.Repository(run.train.hub)
        self._seen = ""  # the newest commit that is known to be this run's
        self._record = b""  # the config in it
        self._over = False
        self._tried = self._pushed = 0  # newest steps

    def fetch(self) -> None:
        """Brings the newest checkpoint and what goes with it, if it is newer than the folder's.

        Raises:
          UserError: the repository holds another run, or things that are no run; or the hub does
            not answer and the folder has no checkpoint; or another process has the folder.
        """
        if not self._writes:
            return
        hub.show_progress(False)  # training has a bar of its own
        with self._unless_refused():
            commit, there = self._meet()
            self._pushed = max(there, default=0)
            if there[-1:] > steps_of(self._folder)[-1:]:
                with holders.held(self._folder / IN_USE, self._folder):
                    self._bring(commit, there[-1])

    def claim(self) -> None:
        """Makes the repository this run's: its config is the folder's.

        Raises:
          UserError: as `fetch`.
        """
        if not self._writes:
            return
        shutil.rmtree(self._folder / STAGE, ignore_errors=True)
        record = (self._folder / RECORD).read_bytes()
        with self._unless_refused():
            if self._seen and self._record != record:
                self._seen = self._hub.commit(self._seen, {RECORD: record}, "config")

    def copy(self) -> None:
        if self._writes and steps_of(self._folder)[-1:] != [self._tried]:
            super().copy()

    def close(self) -> None:
        self._over = True
        if self._writes and steps_of(self._folder)[-1:] not in ([], [self._pushed]):
            print(f"pushing step {steps_of(self._folder)[-1]} to hub {self._hub.name}", flush=True)
            hub.show_progress(True)
        super().close()

    @contextlib.contextmanager
    def _unless_refused(self) -> Iterator[None]:
        try:
            yield
        except hub.Refused as error:
            if not steps_of(self._folder):
                raise
            print(f"warning: {error}; tried again with the next checkpoint", file=sys.stderr)

    def _meet(self) -> tuple[str, list[int]]:
        """`(commit, steps)` of the repository, which is made, and refused if it is another's."""
        if not self._seen:
            self._hub.open()
        commit, names = self._hub.look()
        found = (re.match(r"checkpoints/(\d+)/", name) for name in names)
        steps = sorted({int(match[1]) for match in found if match})
        if commit != self._seen:
            self._check(commit, names, bool(steps))
            self._seen = commit
        return commit, steps

    def _check(self, commit: str, names: list[str], begun: bool) -> None:
        """Refuses a repository as check_claim does a folder. begun: whether it has checkpoints."""
        place = f"hub {self._hub.name}"
        known = all(name.startswith((*CARRIED, *OTHERS)) for name in names)
        if not (RECORD in names if begun else known):
            raise UserError(f"{place} is not empty and holds no run: choose another train.hub")
        if RECORD in names:
            with tempfile.TemporaryDirectory() as folder:
                self._hub.fetch(commit, [RECORD], pathlib.Path(folder))
                self._record = (pathlib.Path(folder) / RECORD).read_bytes()
                if begun:
                    check_same(folder, self._run, self._rows, "train.hub", place)

    def _bring(self, commit: str, step: int) -> None:
        """Copies a checkpoint and the files beside it here; the checkpoint itself appears last."""
        print(f"step {step} comes from hub {self._hub.name} to {self._folder}", flush=True)
        files.write(self._folder / RECORD, self._record)  # what is half here is this run's
        stage, part = self._folder / STAGE, f"checkpoints/{step}"
        hub.show_progress(True)
        self._hub.fetch(commit, [f"{part}/*", *(f"{name}*" for name in CARRIED)], stage)
        hub.show_progress(False)
        for file in _files(stage):
            target = self._folder / file.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
        (self._folder / part).parent.mkdir(exist_ok=True)
        (stage / part).replace(self._folder / part)

    def _copy(self) -> None:
        step = steps_of(self._folder)[-1:]
        if step in ([], [self._pushed]):
            return
        [self._tried] = step
        try:
            self._push(self._tried)
            self._pushed = self._tried
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and self._tried not in steps_of(self._folder):
                return  # a newer one took its place
            again = "the same command again pushes it" if self._over else (
                "tried again with the next checkpoint")
            line = f"warning: step {self._tried} is not on the hub: {error}; {again}"
            tqdm.write(line, file=sys.stderr)

    def _push(self, step: int) -> None:
        commit, there = self._meet()
        if there and there[-1] >= step:
            return  # of the same run, so the same bits
        stage, part = self._folder / STAGE, f"checkpoints/{step}"
        try:
            # As links, since training lets go of old checkpoints meanwhile.
            shutil.copytree(self._folder / part, stage / part, copy_function=_link)
            added = {
                f"{part}/{file.relative_to(stage / part).as_posix()}": file
                for file in (stage / part).rglob("*") if file.is_file()
            }
            for file in _files(self._folder):  # whole, since training appends to them
                added[file.relative_to(self._folder).as_posix()] = file.read_bytes()
            gone = [f"checkpoints/{old}/" for old in [*there, step][: -self._run.train.keep]]
            self._seen = self._hub.commit(commit, added, f"step {step}", gone)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """What a run's folder has of CARRIED."""
    found = (file for name in CARRIED for file in ((folder / name), *(folder / name).rglob("*")))
    return [file for file in found if file.is_file() and not file.name.startswith(".")]


def _link(source: str, target: str) -> None:
    """The same file under another name; a copy on a storage that has no such links."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
