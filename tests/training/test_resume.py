"""Killed and started again, a run ends with the same bits as one that nobody disturbed."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import chex
import jax
import pytest

from twinflow_jax import checkpoints, models
from twinflow_jax import config as configs
from twinflow_jax.training import optimizers, state

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 200
COMMAND = [
    sys.executable, "-m", "twinflow_jax.train", "--config", "configs/digits.py",
    "--config.model.width=64", "--config.model.depth=2", "--config.data.batch_size=64",
    f"--config.train.steps={STEPS}", "--config.train.log_every=1",
    "--config.train.checkpoint_every=10", "--config.train.sample_every=1000",
    "--config.sample.score_count=0", "--config.optimizer.clip_norm=1.0",
]


def start(workdir: pathlib.Path) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, "--workdir", str(workdir)], cwd=ROOT, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)


def complete(workdir: pathlib.Path) -> list[int]:
    folder = workdir / "checkpoints"
    return [int(p.name) for p in folder.glob("*") if p.name.isdigit()] if folder.exists() else []


def final_state(workdir: pathlib.Path) -> state.TrainState:
    run = checkpoints.read_run(workdir)
    model = models.build(run.model)
    optimizer = optimizers.create(run.optimizer, run.train.steps)
    fresh = jax.jit(lambda: state.create(model.init(jax.random.key(0)), optimizer, 0.99, 0.99))()
    saver = checkpoints.Saver(workdir, 3)
    assert saver.steps[-1] == STEPS
    restored = saver.restore(state.to_parts(fresh))
    saver.close()
    return state.from_parts(restored)


def losses(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(workdir)
    assert process.wait() == 0, process.stderr.read()
    return workdir


def test_killed_run_ends_with_the_same_bits(undisturbed, tmp_path):
    """SIGKILL at a random moment, SIGKILL in the middle of a save, SIGTERM, then to the end."""
    workdir = tmp_path / "run"

    process = start(workdir)
    wait_for(lambda: len(complete(workdir)) >= 1, process)
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    process.wait()

    process = start(workdir)
    reached = max(complete(workdir))
    saving = lambda: [
        p for p in (workdir / "checkpoints").glob("*")
        if not p.name.isdigit() and str(reached) not in p.name
    ]
    wait_for(lambda: saving() and max(complete(workdir)) > reached, process)
    wait_for(saving, process)  # a save has begun and not ended
    process.kill()
    process.wait()

    process = start(workdir)
    reached = max(complete(workdir), default=0)
    wait_for(lambda: max(complete(workdir), default=0) > reached, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    message = process.stderr.read().splitlines()[-1]
    assert message.startswith("SIGTERM: saved step ")
    assert int(message.split()[3]) == max(complete(workdir))

    process = start(workdir)
    assert process.wait() == 0, process.stderr.read()

    mine, theirs = final_state(workdir), final_state(undisturbed)
    chex.assert_trees_all_equal(mine, theirs)
    assert losses(workdir) == losses(undisturbed)


def test_weights_of_the_run_are_its_average(undisturbed):
    _, _, average, step = checkpoints.load_weights(undisturbed)
    _, _, raw, _ = checkpoints.load_weights(undisturbed, raw=True)
    last = final_state(undisturbed)
    assert step == STEPS
    chex.assert_trees_all_equal(average, last.average.params)
    chex.assert_trees_all_equal(raw, last.params)


def test_the_record_of_a_run_is_its_description(undisturbed):
    run = configs.parse(
        "configs/digits.py", [flag[len("--config."):] for flag in COMMAND if "--config." in flag]
    )
    assert checkpoints.read_run(undisturbed) == run
