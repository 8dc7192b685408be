"""Several processes as one run: starting together, sharing rows, agreeing, stopping together."""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping

import jax
import numpy as np
from jax._src import distributed  # the only way to the coordinator's key-value store
from jax.experimental import multihost_utils

from twinflow_jax.errors import UserError, end, reason, report


class Elsewhere(UserError):
    """An error that the first process reports."""


SILENCE = 60  # seconds without a sign of life after which a host counts as lost
LOOK = 1.0  # seconds between looks for another process's error
FAILED = "twinflow_jax/failed"  # where a process leaves its own with the coordinator

# JAX counts the looks for a signal of every process, from 1: one that came before any stops all
# at the first.
_looks = itertools.count(1)


class Unreached(UserError):
    """The processes of a run did not find each other: worth another try, as its status says."""

    status = 75


def join(coordinator: str, processes: int, process: int) -> None:
    """Makes this process one of a run's; to be called before anything touches a device.

    coordinator: "HOST:PORT" of process 0, or "auto" on a TPU pod, GKE or Slurm, where JAX finds
    everything out. A host that is silent for SILENCE seconds ends the others.
    Raises:
      UserError: an address of another form, a number of a process that there is not, or nothing
        that `auto` can find out.
      Unreached: the processes did not find each other.
    """
    given = {}
    if coordinator != "auto":
        given = {
            "coordinator_address": coordinator, "num_processes": processes, "process_id": process,
        }
        found = re.fullmatch(r"\S+:(\d{1,5})", coordinator)
        if not found or not 0 < int(found[1]) < 2**16:
            raise UserError(
                f"--coordinator is {coordinator!r}; give HOST:PORT of process 0, or auto"
            )
        if not 0 <= process < processes:
            raise UserError(f"--process is {process}; it lies from 0 to --processes less one")
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            **given, initialization_timeout=300, heartbeat_timeout_seconds=SILENCE
        )
    except ValueError as error:
        raise UserError(
            f"--coordinator {coordinator}: {reason(error)}; give HOST:PORT of "
            "process 0, --processes and --process"
        ) from error
    except RuntimeError as error:
        raise Unreached(
            f"this process did not find the others at {coordinator} "
            f"({reason(error)}): start the same command on every host"
        ) from error


def leads() -> bool:
    """Whether this process writes what is written once: pictures, metrics, messages."""
    return jax.process_index() == 0


@contextlib.contextmanager
def together():
    """Where one process fails inside, all end within seconds, and process 0 says why.

    The one that fails leaves its error with the coordinator, where the others look all the time:
    they may be waiting in a collective that it will never join.
    """
    if jax.process_count() == 1:
        yield
        return
    over = threading.Event()
    listener = threading.Thread(target=_listen, args=(over,), daemon=True)
    listener.start()
    try:
        yield
    except BaseException as error:
        over.set()
        listener.join()
        if isinstance(error, Elsewhere):
            status = 2
        else:
            _leave_if_failed()  # this error may be what another's end has caused
            status = report(error)
            _leave_note(status, error)
        time.sleep(3 * LOOK)  # until all have looked: an end breaks the others' collectives
        end(status)  # a thread may hang in a collective, and JAX would wait for the others
    over.set()
    listener.join()


def _listen(over: threading.Event) -> None:
    while not over.wait(LOOK):
        _leave_if_failed()


def _leave_note(status: int, error: BaseException) -> None:
    """Tells the coordinator of this process's error, unless another was first."""
    note = json.dumps([status, f"process {jax.process_index()}: {reason(error, 2000)}"])
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.global_state.client.key_value_set(FAILED, note)


def _leave_if_failed() -> None:
    """Ends this process where another has failed."""
    try:
        found = distributed.global_state.client.key_value_try_get(FAILED)
    except jax.errors.JaxRuntimeError:  # there is none
        return
    status, text = json.loads(found)
    if leads():
        print(f"error: {text}", file=sys.stderr)
        time.sleep(3 * LOOK)  # the coordinator is this process
    end(status)


def first(function) -> None:
    """Calls a function on the first process; where it fails, every process ends.

    Raises:
      Elsewhere: on the other processes; on the first, what the function raised.
    """
    error = None
    if leads():
        try:
            function()
        except Exception as raised:  # whatever it is, the others wait to hear of it
            error = raised
    if told(error is not None) and error is None:
        raise Elsewhere("process 0 stopped")
    if error is not None:
        raise error


def told(answer: int) -> int:
    """The first process's answer, on every process: others may see files later."""
    return int(multihost_utils.broadcast_one_to_all(np.array(answer)))


def where(holds: bool) -> list[int]:
    """The processes on which something holds, the same list on all of them."""
    return np.flatnonzero(multihost_utils.process_allgather(np.array(holds))).tolist()


def agree(things: Mapping[str, bytes]) -> None:
    """Compares what processes have, by its name to people, with what the first has.

    Raises:
      UserError: they differ; every process stops, and names those that differ.
    """
    mine = [_digest(data) for data in things.values()]
    found = multihost_utils.process_allgather(np.array(mine, np.uint32))
    for column, what in enumerate(things):
        other = np.flatnonzero(found[:, column] != found[0, column])
        if len(other):
            raise (UserError if leads() else Elsewhere)(
                f"processes {', '.join(map(str, other))} run with another {what} than process 0: "
                "start the same command, with the same version and data, on every host"
            )


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "little")


def code(folder: pathlib.Path) -> bytes:
    """The Python files in a folder, to `agree` on."""
    files = sorted(folder.rglob("*.py"))
    return json.dumps([(str(f.relative_to(folder)), f.read_text()) for f in files]).encode()


def in_step() -> bool:
    """Whether processes must wait for each step: on CPUs they deadlock when one runs ahead."""
    return jax.process_count() > 1 and jax.default_backend() == "cpu"


def rows_held(layout: jax.sharding.Sharding, rows: int) -> np.ndarray:
    """The rows of a batch of so many that this process's devices hold, in order."""
    held = layout.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in held]))


def put(tree, layout: jax.sharding.Sharding):
    """Host arrays, the same on every process, as arrays over all processes' devices."""
    def one(array):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, layout, lambda index: array[index])

    return jax.tree.map(one, tree)


def put_rows(tree, layout: jax.sharding.Sharding, rows: np.ndarray, count: int):
    """Like `put`, for arrays of which each process has those of `count` rows that it holds."""
    def one(array):
        def part(index):
            first, last, _ = index[0].indices(count)
            begin = np.searchsorted(rows, first)
            return array[begin : begin + last - first]

        return jax.make_array_from_callback((count, *array.shape[1:]), layout, part)

    return jax.tree.map(one, tree)


def stop_requested(signal_number: int) -> int:
    """The signal to stop for now, 0 for none: this process's own, or, with several processes,
    SIGTERM where any has received it; all then stop at the same look.

    To be called by every process before the first step and after each.
    """
    if jax.process_count() == 1:
        return signal_number
    return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(next(_looks)) else 0
