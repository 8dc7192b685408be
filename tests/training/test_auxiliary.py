"""Networks that learn beside the student: turns, checkpoints, adapters, meshes."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

from twinflow_jax import config as configs
from twinflow_jax import models, objectives
from twinflow_jax.config import Run
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.models.adapters import is_adapter
from twinflow_jax.objectives import STUDENT
from twinflow_jax.planning import rehearsal
from twinflow_jax.training import setup, state
from twinflow_jax.training.loop import train

QUICK = {"xla_backend_optimization_level": 0}
SMALL = ("train.ema_decay=0.9", "train.sample_every=1000", "optimizer.clip_norm=1.0")


def matching(run: Run, start: str, preset: str = "dmd2", **fields) -> Run:
    """The run with a preset of the matching form, from a start."""
    objective = objectives.build(objectives.preset(preset, **fields)).config
    return dataclasses.replace(
        run, objective=objective, train=dataclasses.replace(run.train, init_from=start)
    )


@pytest.fixture
def base(small_config, tmp_path) -> str:
    train(small_config("train.steps=3"), str(tmp_path / "base"), progress=False)
    return str(tmp_path / "base")


def parts_of(kept: state.TrainState) -> dict:
    """Everything that a checkpoint holds, on the host."""
    return jax.device_get(state.to_parts(kept))


def same(a, b) -> bool:
    return all(map(np.array_equal, *map(jax.tree.leaves, (a, b))))


@pytest.mark.parametrize("more", [
    pytest.param((), id="whole"),
    pytest.param(("adapter.rank=2",), id="adapters", marks=pytest.mark.slow),
])
def test_a_resume_within_a_cycle_is_bit_equal(small_config, base, tmp_path, more):
    """5 steps and then 7 more, in cycles of 4, against 12; each network moves in its turns only."""
    run = lambda steps: matching(
        small_config(f"train.steps={steps}", "train.checkpoint_every=1", *SMALL, *more), base,
        turns="exclusive", every=4,
    )
    at = {}
    for steps in (4, 5, 6, 12):  # the student learns at steps 0, 4 and 8
        at[steps] = parts_of(train(run(steps), str(tmp_path / "pieces"), progress=False))
    whole = parts_of(train(run(12), str(tmp_path / "whole"), progress=False))
    chex.assert_trees_all_equal(at[12], whole)
    assert set(whole) == {"params", "teacher", "average", "fake", "progress"}

    moved = lambda part, a, b: not same(at[a][part], at[b][part])
    assert [moved("params", 4, 5), moved("params", 5, 6)] == [True, False]
    assert [moved("average", 4, 5), moved("average", 5, 6)] == [True, False]
    assert [moved("fake", 4, 5), moved("fake", 5, 6)] == [False, True]
    assert same(at[4]["teacher"], whole["teacher"])
    counts = [
        int(leaf) for own in (whole["progress"]["optimizer"], whole["progress"]["auxiliary"])
        for leaf in jax.tree.leaves(own) if not np.shape(leaf)
    ]
    assert set(counts) == {3, 9}  # of updates
    if more:
        kept = names.flatten(whole["fake"])
        assert kept and all(map(is_adapter, kept))  # adapters of its own, on the student's base


def test_a_run_without_them_has_the_state_that_it_had(small_config):
    prepared = setup.prepare(small_config())
    abstract = prepared.abstract_state()
    assert abstract.auxiliary == {}
    parts = state.to_parts(abstract)
    assert set(parts) == {"params", "teacher", "average", "progress"}
    assert set(parts["progress"]) == {"optimizer", "step", "decays"}
    assert list(prepared.phases) == ["objective"]


def test_every_turn_that_lies_ahead_is_compiled_and_rehearsed(small_config, base):
    run = matching(small_config("train.steps=8", "train.flow_matching_steps=2"), base, every=3)
    prepared = setup.prepare(run)
    both, shape = "student and fake", run.shape
    assert [prepared.phase(step) for step in range(6)] == [
        "flow_matching", "flow_matching", both, "fake", "fake", both
    ]
    ahead = lambda first: [phase for phase, _ in prepared.ahead([shape], first)]
    assert ahead(0) == ["flow_matching", both, "fake"] and ahead(3) == [both, "fake"]
    assert ahead(6) == ["fake"]
    assert [run.updates(name) for name in (STUDENT, "fake")] == [4, 6]
    [programs] = rehearsal.programs(run, jax.devices(), [shape], ("train",))
    named = [one.name for one in programs]
    assert {f"{phase} step, 8x8x1" for phase in ahead(0)} < set(named)
    # Generator, two scores; the fake's own loss: gradients cost two forwards more, and one where
    # they go through a score.
    one = prepared.step_flops("fake") / 4
    assert prepared.step_flops(both) == pytest.approx(8 * one)
    assert setup.prepare(matching(run, base, "sid")).step_flops(STUDENT) == pytest.approx(7 * one)


@pytest.mark.parametrize(("preset", "fields", "more", "message"), [
    ("dmd2", {}, (), "frozen teacher, but it would be random weights: set train.init_from"),
    ("sid", {}, ("train.steps=1",), "train.steps is 1, in which objective.turns never trains the "
     "student: give more steps"),
    ("dmd2", {"turns": "exclusive"}, ("train.steps=1",), "never trains the fake: give more steps"),
    ("dmd2", {}, ("optimizer.learning_rate=0.0",), "optimizer.learning_rate is 0, which never"),
    ("dmd2", {}, ("optimizer.moments=bfloat16", "optimizer.betas=(0.9,0.95)"),
     "use objective.fake_betas up to .995"),
])
def test_what_never_learns_is_refused(small_config, preset, fields, more, message):
    with pytest.raises(UserError, match=message):
        matching(small_config(*more), "" if not more else "runs/start", preset, **fields)


# Meshes


def compare() -> None:
    """Run in a process with four devices: fails where a cycle of steps differs from one device's,
    in any network. Of sid: its student's first step is after the fake's, so that the scores differ
    by more than rounding, and its gradient goes through the scores."""
    network = models.config_of("dit")(
        sample_shape=(4, 4, 1), patch=2, width=16, depth=2, heads=2, num_classes=10
    )
    run = configs.parse("configs/digits.py", [
        "data.batch_size=8", "train.micro_steps=2", "train.ema_decay=0.0", "train.steps=2",
    ])
    run = matching(dataclasses.replace(run, model=network), "unused", "sid")
    rng = np.random.default_rng(0)
    batch = {
        "x": np.zeros((8, 4, 4, 1), np.float32), "cond": {"label": np.arange(8, dtype=np.int32)},
        "null": {"label": np.full(1, 10, np.int32)},
    }
    weights = jax.tree.map(
        lambda a: (rng.normal(size=a.shape) * 0.1).astype(np.float32),
        models.build(network).abstract_params(),
    )

    def trained(devices, **mesh) -> dict:
        there = dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, **mesh))
        prepared = setup.prepare(there, devices)
        current = prepared.started()(weights)
        placed = jax.tree.map(
            lambda a, want: jax.device_put(a, want.sharding), batch, prepared.abstract_batch()
        )
        for step in range(2):
            compiled = prepared.lower(prepared.phase(step)).compile(QUICK)
            current, _ = compiled(current, placed)
        return {part: names.flatten(parts_of(current)[part]) for part in ("params", "fake")}

    alone, first = trained(jax.devices()[:1]), names.flatten(weights)
    for strategy in ("partitioner", "gather_once", "gather_layers"):
        mine = trained(jax.devices(), strategy=strategy, fsdp=4)
        for part, leaves in alone.items():
            for path, leaf in leaves.items():
                moved = np.linalg.norm(leaf - first[path])
                error = np.linalg.norm(mine[part][path] - leaf)
                # 1e-7: the biases of keys have no gradient
                assert error <= 2e-2 * moved + 1e-7, (strategy, part, path, error, moved)


def test_meshes_compute_what_one_device_does():
    program = "import tests.conftest; from tests.training.test_auxiliary import *; compare()"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=pathlib.Path(__file__).resolve().parents[2],
        env=os.environ | flags, capture_output=True, text=True, check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
