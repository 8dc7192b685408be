"""Several processes as one run: starting together, sharing rows, agreeing, stopping together."""

import hashlib
import json
import os
import pathlib
import signal

import jax
import numpy as np
from jax.experimental import multihost_utils

from twinflow_jax.errors import UserError


class Elsewhere(UserError):
    """An error that the first process reports."""


SILENCE = 60  # seconds without a sign of life after which a host counts as lost


def join(coordinator: str, processes: int, process: int) -> None:
    """Makes this process one of a run's; to be called before anything touches a device.

    coordinator: "HOST:PORT" of process 0, or "auto" on a TPU pod, GKE or Slurm, where JAX finds
    everything out. A host that is silent for SILENCE seconds ends the others.
    Raises:
      UserError: a number of a process that there is not, or nothing that `auto` can find out.
      ConnectionError: the processes did not find each other; another try may.
    """
    given = {}
    if coordinator != "auto":
        given = {
            "coordinator_address": coordinator, "num_processes": processes, "process_id": process,
        }
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
            f"--coordinator {coordinator}: {' '.join(str(error).split())[:200]}; give HOST:PORT of "
            "process 0, --processes and --process"
        ) from error
    except RuntimeError as error:
        raise ConnectionError(
            f"this process did not find the others at {coordinator} "
            f"({' '.join(str(error).split())[:200]}): start the same command on every host"
        ) from error


def leads() -> bool:
    """Whether this process writes what is written once: pictures, metrics, messages."""
    return jax.process_index() == 0


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


def told(answer: bool) -> bool:
    """The first process's answer, on every process: others may see files later."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.array(answer)))


def agree(config_json: str, folder: pathlib.Path) -> None:
    """Compares config and code of all processes with those of the first.

    Raises:
      UserError: they differ; every process stops, and names those that differ.
    """
    if jax.process_count() == 1:
        return
    mine = [_digest(config_json.encode()), _digest(_source(folder))]
    found = multihost_utils.process_allgather(np.array(mine, np.uint32))
    for column, what in enumerate(("config", "code")):
        other = np.flatnonzero(found[:, column] != found[0, column])
        if len(other):
            raise (UserError if leads() else Elsewhere)(
                f"processes {', '.join(map(str, other))} run with another {what} than process 0: "
                "start the same command with the same version on every host"
            )


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "little")


def _source(folder: pathlib.Path) -> bytes:
    files = sorted(folder.rglob("*.py"))
    return json.dumps([(str(f.relative_to(folder)), f.read_text()) for f in files]).encode()


def in_step() -> bool:
    """Whether processes must wait for each step: on CPUs they deadlock when one runs ahead."""
    return jax.process_count() > 1 and jax.default_backend() == "cpu"


def put(tree, layout: jax.sharding.Sharding):
    """Host arrays, the same on every process, as arrays over all processes' devices."""
    def one(array):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, layout, lambda index: array[index])

    return jax.tree.map(one, tree)


def fetch(tree, mesh: jax.sharding.Mesh):
    """Arrays over all processes' devices as host arrays, whole on every process."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(np.asarray, jax.jit(lambda tree: tree, out_shardings=whole)(tree))


def stop_requested(signal_number: int, step: int) -> int:
    """The signal to stop for after this step, 0 for none: this process's own, or, with several
    processes, SIGTERM where any has received it; all then stop at the same step.

    To be called by every process at every step.
    """
    if jax.process_count() == 1:
        return signal_number
    return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
