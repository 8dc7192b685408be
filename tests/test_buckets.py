"""Runs, checkpoints and records in a bucket, of a server here that speaks as Cloud Storage."""

import contextlib
import itertools
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from bucket import NAME, Bucket

from twinflow_jax import checkpoints

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 12
COMMAND = [
    sys.executable, "-m", "twinflow_jax.train", "--config", "configs/digits.py",
    "--config.model.width=64", "--config.model.depth=2", f"--config.train.steps={STEPS}",
    "--config.train.log_every=1", "--config.train.checkpoint_every=2", "--config.train.keep=2",
    "--config.train.sample_every=100", "--config.sample.score_count=0",
    "--config.sample.columns=1", "--config.sample.steps=(1,)",
]
RUN = f"gs://{NAME}/run"
SERVER: list[Bucket] = []  # one a process: tensorstore asks once where it is


@pytest.fixture
def bucket(monkeypatch) -> Bucket:
    """An empty one, which this process and those that it starts take for Cloud Storage."""
    if not SERVER:
        SERVER.append(Bucket())
    for name, value in SERVER[0].environment.items():
        monkeypatch.setenv(name, value)
    yield SERVER[0]
    SERVER[0].blobs.clear()
    SERVER[0].refuse = lambda method, address: 0


def start(workdir: str, log: pathlib.Path, processes: int = 1, *more: str) -> list:
    """A run on two simulated devices; what process k says is in LOG.k."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={2 // processes}"
    started = []
    for rank in range(processes):
        joined = ["--coordinator", f"localhost:{port}", "--processes", str(processes),
                  "--process", str(rank)] if processes > 1 else []
        with open(f"{log}.{rank}", "w") as said:
            started.append(subprocess.Popen(
                [*COMMAND, "--workdir", workdir, *joined, *more], cwd=ROOT, stdout=said,
                stderr=subprocess.STDOUT, env={**os.environ, "XLA_FLAGS": flags},
            ))
    return started


def finish(log: pathlib.Path, processes: list) -> None:
    statuses = [process.wait() for process in processes]
    assert statuses == [0] * len(processes), pathlib.Path(f"{log}.0").read_text()[-3000:]


def weights(workdir) -> list[np.ndarray]:
    _, _, params, step = checkpoints.load_weights(workdir, raw=True)
    assert step == STEPS
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def killed_at(bucket: Bucket, write: int, processes: list, number: int) -> None:
    """Ends a run as it sends its write of that number to the bucket, if it comes to that."""
    count, victim = itertools.count(), random.Random(write).choice(processes)

    def look(method: str, address: str) -> int:
        if method == "POST" and address.startswith("/upload") and next(count) == write:
            victim.send_signal(number)
        return 0

    bucket.refuse = look
    with contextlib.suppress(subprocess.TimeoutExpired):
        victim.wait()
    for process in processes:  # as a launcher does
        process.kill() if number == signal.SIGKILL else None
        process.wait()
    bucket.refuse = lambda method, address: 0


def rounds(bucket: Bucket, tmp_path, processes: int, writes: list[tuple[int, int]]) -> None:
    """Runs that are ended at writes, by signals, leave what one that nobody ended leaves."""
    local, log = tmp_path / "local", tmp_path / "log"
    finish(log, start(str(local), log, processes))
    for write, number in writes:
        killed_at(bucket, write, start(RUN, log, processes), number)
    finish(log, start(RUN, log, processes))
    for a, b in zip(weights(local), weights(RUN), strict=True):
        np.testing.assert_array_equal(a, b)
    metrics = bucket.blobs["run/metrics.jsonl"].data.decode()
    assert metrics == (local / "metrics.jsonl").read_text()
    extra = {name.split("/")[1] for name in bucket.names("run/")}
    assert extra == {entry.name for entry in local.iterdir()}
    steps = {name.split("/")[2] for name in bucket.names("run/checkpoints/")}
    assert steps == {str(STEPS - 2), str(STEPS)}
    assert len(bucket.names("run/samples/")) == 1


def test_a_run_that_is_killed_while_it_saves_ends_with_the_same_bits(bucket, tmp_path):
    rounds(bucket, tmp_path, 1, [(30, signal.SIGKILL), (75, signal.SIGKILL)])


def test_two_processes_that_are_killed_end_with_the_same_bits(bucket, tmp_path):
    rounds(bucket, tmp_path, 2, [(55, signal.SIGKILL)])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_rounds_of_signals_at_any_write(bucket, tmp_path, processes):
    choice = random.Random(processes)
    signals = [signal.SIGKILL, signal.SIGTERM]
    writes = [(choice.randrange(3, 90), choice.choice(signals)) for _ in range(20)]
    rounds(bucket, tmp_path, processes, writes)
