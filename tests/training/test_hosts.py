"""Several processes train one run: the same bits however often they are stopped and restarted."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from twinflow_jax import checkpoints

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 150
COMMAND = [
    sys.executable, "-X", "faulthandler", "-m", "twinflow_jax.train",
    "--config", "configs/digits.py",
    "--config.model.width=512", "--config.model.depth=2", "--config.data.batch_size=128",
    f"--config.train.steps={STEPS}", "--config.train.log_every=1",
    "--config.train.checkpoint_every=5", "--config.train.sample_every=1000",
    "--config.sample.score_count=0",
]


def start(
    workdir: pathlib.Path, processes: int, devices: int = 4, more=lambda rank: (), command=COMMAND
) -> list:
    """A run on `devices` simulated devices, shared among processes; more: arguments by rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    share = devices // processes
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={share}", "JAX_PLATFORMS": "cpu"}
    joined = ["--coordinator", f"localhost:{port}", "--processes", str(processes)]
    started = []
    for rank in range(processes):
        own = [*joined, "--process", str(rank)] if processes > 1 else []
        log = open(f"{workdir}.{rank}.log", "w")  # noqa: SIM115 - the process writes to it
        started.append(subprocess.Popen(
            [*command, "--workdir", str(workdir), *own, *more(rank)], cwd=ROOT, text=True,
            env=os.environ | flags, stdout=log, stderr=subprocess.STDOUT,
        ))
    return started


def logs(workdir: pathlib.Path) -> list[str]:
    return [file.read_text() for file in sorted(workdir.parent.glob(f"{workdir.name}.*.log"))]


def finish(workdir: pathlib.Path, processes: list) -> None:
    statuses = [process.wait() for process in processes]
    assert statuses == [0] * len(processes), logs(workdir)[0][-3000:]


def steps_done(workdir: pathlib.Path) -> int:
    folder = workdir / "metrics.jsonl"
    return len(folder.read_text().splitlines()) if folder.exists() else 0


def wait_for_steps(workdir: pathlib.Path, steps: int, processes: list) -> None:
    while steps_done(workdir) < steps:
        assert all(process.poll() is None for process in processes), logs(workdir)
        time.sleep(0.02)


def weights(workdir: pathlib.Path, steps: int) -> list[np.ndarray]:
    _, _, params, step = checkpoints.load_weights(workdir, raw=True)
    assert step == steps
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def losses(workdir: pathlib.Path, steps: int) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    return [row["loss"] for row in rows]


def same(left: pathlib.Path, right: pathlib.Path, tolerance: float, steps: int = STEPS) -> None:
    for a, b in zip(weights(left, steps), weights(right, steps), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)
    np.testing.assert_allclose(losses(left, steps), losses(right, steps), rtol=max(tolerance, 1e-7))


@pytest.mark.slow
def test_stopped_on_one_host_and_restarted_on_another_number(tmp_path):
    """SIGTERM to one of two saves on both at the same step; one process then goes on, with the
    same devices, and ends where one that nobody stopped does."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    lasting = lambda steps: lambda rank: [f"--config.train.steps={steps}"]
    two = start(run, 2, devices=2, more=lasting(10**6))  # however long the signal takes
    wait_for_steps(run, 3, two)
    two[1].send_signal(signal.SIGTERM)
    assert [process.wait() for process in two] == [143, 143]
    assert "SIGTERM: saved step" in logs(run)[0]
    saved = max(int(p.name) for p in (run / "checkpoints").iterdir())
    assert saved == steps_done(run)
    for folder in (run, alone):
        finish(folder, start(folder, 1, devices=2, more=lasting(saved + 20)))
    same(run, alone, 1e-5, saved + 20)


def test_processes_that_disagree_stop_with_one_message(tmp_path):
    run = tmp_path / "run"
    rate = lambda rank: [f"--config.optimizer.learning_rate=.0{rank}1"]
    two = start(run, 2, devices=2, more=rate)
    assert [process.wait() for process in two] == [2, 2]
    first, second = logs(run)
    assert "error: processes 1 run with another config than process 0" in first
    assert "error:" not in second and not run.exists()


def test_what_fails_on_one_host_is_said_on_the_first_and_holds_for_all(tmp_path):
    """A signal that one of two gets before the first step stops both there; a checkpoint that one
    cannot read is passed over by both; an error of one alone ends both, long before a silent
    host would."""
    run = tmp_path / "run"
    two = start(run, 2, command=[sys.executable, str(ROOT / "tests/training/two_hosts.py")])
    assert [process.wait() for process in two] == [2, 2]
    first, second = logs(run)
    assert "2 in" in first and "cannot be read on process 1; trying the one before" in first
    assert "restored [[1, 1], [1, 1]]\nleft [1]" in first
    assert "restored [[1, 1], [1, 1]]\nleft [1]" in second
    assert "stopped by SIGTERM" in first and "stopped by SIGTERM" in second
    assert "error: process 1: no room on this host" in first
    assert "error: no room on this host" in second


@pytest.mark.slow
def test_text_to_image_trains_on_two_processes(tmp_path):
    """Each encodes and decodes with its own devices; the small networks are written once."""
    few = ["--config.train.steps=4", "--config.train.sample_every=2", "--config.train.log_every=1"]
    small = ["--config", "configs/qwen20b_tpu.py:tiny", *few]
    two = start(tmp_path / "run", 2, command=[*COMMAND[:5], *small])
    finish(tmp_path / "run", two)
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 2


@pytest.mark.slow
def test_twenty_rounds_of_signals(tmp_path):
    """SIGTERM and SIGKILL of any of two or four processes at random times, restarted with as
    many: bitwise what an undisturbed run gives, which is the same for two and for four.

    Killed before they met, one leaves the others looking for it for 300 seconds.
    """
    undisturbed, quiet = tmp_path / "undisturbed", tmp_path / "quiet"
    finish(undisturbed, start(undisturbed, 2))
    finish(quiet, start(quiet, 4))
    same(undisturbed, quiet, 0)
    rounds = 0
    for number in range(10):
        run, processes = tmp_path / f"run{number}", random.choice((2, 2, 4))
        for how in random.sample((signal.SIGTERM, signal.SIGKILL), 2):
            alive = start(run, processes)
            wait_for_steps(run, min(steps_done(run) + random.randint(1, 8), STEPS - 1), alive)
            random.choice(alive).send_signal(how)
            for process in alive:
                process.wait(timeout=400)
            rounds += 1
        while steps_done(run) < STEPS or any(p.returncode for p in alive):
            alive = start(run, processes)
            for process in alive:
                process.wait(timeout=400)
        same(run, undisturbed, 0)
    assert rounds == 20
