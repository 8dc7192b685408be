"""Who works in a folder: one command at a time, which a file there names.

A holder on this machine is dead when its process is gone. One on another machine touches its file
every BEAT seconds; LEASE seconds without that count as its death, by the storage's own clock. Two
that start at the same moment are told apart by a lock of the file where the storage has that, and
everywhere by reading the file again, which a holder does for as long as it works.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pathlib
import platform
import secrets
import sys
import threading
import time
from collections.abc import Iterator

from etils import epath

from twinflow_jax import buckets
from twinflow_jax.errors import UserError, end, report

BEAT, LEASE, LOOK = 10.0, 120.0, 1.0  # seconds


@dataclasses.dataclass(frozen=True)
class Holder:
    """owner: of one holding, random. machine: where process numbers mean something, one boot of a
    host or of a container in it. started: of the process, since another may get its number."""

    owner: str
    host: str
    machine: str
    process: int
    started: int
    since: str

    @classmethod
    def here(cls) -> "Holder":
        process, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
        host, owner = platform.node(), secrets.token_hex(8)
        return cls(owner, host, machine(), process, started(process), since)

    @classmethod
    def of(cls, file: epath.PathLike) -> "Holder | None":
        """Whom a file names; None for nobody, or where it is gone or cannot be read."""
        try:
            return cls(**json.loads(epath.Path(file).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def lives(self) -> bool | None:
        """None where that cannot be told from this machine."""
        if self.machine != machine():
            return None
        return started(self.process) == self.started

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"


def machine() -> str:
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # another system: nobody's processes can be looked up
        return secrets.token_hex(8)


def started(process: int) -> int:
    """When a process of this machine started, in ticks since its boot; 0 where it is gone."""
    try:
        state, *rest = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state in "ZX" else int(rest[18])  # dead, but not yet reaped


@contextlib.contextmanager
def held(file: epath.PathLike, folder: epath.PathLike, keep: bool = False) -> Iterator[None]:
    """This process as the one that a file names, which appears for as long.

    folder: what is held, for messages. keep: whether the file stays after an error.
    Raises:
      UserError: somebody holds it, who is named; nothing was touched.
    """
    file, me, over = epath.Path(file), Holder.here(), threading.Event()
    _take(file, me, folder)
    beats = threading.Thread(target=_beat, args=(file, me, folder, over), daemon=True)
    beats.start()
    failed = True
    try:
        yield
        _check_mine(file, me, folder)
        failed = False
    finally:
        over.set()
        beats.join()
        if Holder.of(file) == me and not (keep and failed):
            file.unlink(missing_ok=True)


def check_free(file: epath.Path, folder: epath.PathLike) -> Holder | None:
    """The dead holder that a file names, if any; waits until it is certain.

    Raises:
      UserError: it lives.
    """
    first = None  # sign of life that was seen
    while (holder := Holder.of(file)) and (lives := holder.lives()) is not False:
        if lives is None:
            age, sign = _age(file)
            if age > LEASE:
                return holder
            lives = first not in (None, sign)
        if lives:
            raise UserError(
                f"{folder} is in use by {holder}: let that end, or choose another folder"
            )
        if first is None:
            first = sign
            print(
                f"{folder} was in use by {holder}; waiting for a sign of life, up to {LEASE:.0f} s",
                file=sys.stderr, flush=True,
            )
        time.sleep(LOOK)
    return holder


def _age(file: epath.Path) -> tuple[float, float]:
    """Seconds since a file was touched, and when that was, by the clock of its storage."""
    changed = lambda path: path.stat().mtime if buckets.is_remote(path) else os.stat(path).st_mtime
    probe = file.parent / f".{secrets.token_hex(8)}"
    try:
        probe.write_text("")
        sign = changed(file)
        return changed(probe) - sign, sign
    except FileNotFoundError:  # it ended just now
        return math.inf, 0.0
    finally:
        probe.unlink(missing_ok=True)


def _take(file: epath.Path, me: Holder, folder: epath.PathLike) -> None:
    taken = False
    while not taken:
        dead = check_free(file, folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        with alone(file):
            if taken := Holder.of(file) == dead:  # nobody took it meanwhile
                file.write_text(me.to_json())
    if buckets.is_remote(file):  # no locks: who writes last has it
        time.sleep(LOOK)
        _check_mine(file, me, folder)


def _check_mine(file: epath.Path, me: Holder, folder: epath.PathLike) -> None:
    """Raises UserError where a file names another holder."""
    holder = Holder.of(file)
    if holder not in (None, me):
        raise UserError(f"{folder} was taken over by {holder}: leave it to that one")


def _beat(file: epath.Path, me: Holder, folder: epath.PathLike, over: threading.Event) -> None:
    """Shows that the holder lives; ends it where another has taken its place, having seen no sign
    of life for too long."""
    while not over.wait(BEAT):
        try:
            _check_mine(file, me, folder)
            file.write_text(me.to_json()) if buckets.is_remote(file) else os.utime(file)
        except UserError as error:
            end(report(error))
        except Exception as error:
            if not isinstance(error, OSError) and not buckets.explained(error):
                raise
            # a storage that is away for a moment


@contextlib.contextmanager
def alone(file: epath.Path) -> Iterator[None]:
    """No other process inside with the same file, where its storage has locks."""
    if buckets.is_remote(file):
        yield
        return
    while True:
        with open(file, "a") as lock:
            with contextlib.suppress(OSError):  # a storage without
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_there(lock, file):  # not removed while this one waited
                yield
                return


def _is_there(opened, file: epath.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened.fileno()), os.stat(file))
    except FileNotFoundError:
        return False
