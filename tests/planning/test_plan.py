"""Plans: counted FLOPs, reports and refusals; with libtpu, the real train step."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from tests.test_verbs import call
from twinflow_jax import config as configs
from twinflow_jax import models
from twinflow_jax import plan as verb
from twinflow_jax.parallel.mesh import AXES
from twinflow_jax.planning import plan, report, topology
from twinflow_jax.training import flops, setup

BENCH = "configs/qwen20b_tpu.py:bench"
EXAMPLE = plan.Plan(
    topology="v5p:4x4x4", mesh={"fsdp": 64}, strategy="gather_once",
    remat="full", rows=128, text=512, chips=64, parts={"weights": 2**30, "activations": 2**31},
    peak_bytes=3 * 2**30, hbm_bytes=95 * 2**30, analytic={"matmul": 2e12},
    compiled={"matmul": 2.02e12}, forwards=7.5,
    collectives={"all-gather": {"count": 24, "bytes": 29e9, "overlapped": 1e9}},
    components={"matmul": {"seconds": 1.5, "hidden": 0.0, "amount": 2e12, "count": 9}},
    seconds=1.6, overlapped=1.5, utilisation=0.6, steps=3000,
)


def test_flops_of_the_published_network():
    """Hand count of a row, 512x512 and 512 tokens: projections of 60 layers 2 x 3072 x (4 x 3072
    + 8 x 3072) for 1536 tokens, attention 4 x 1536^2 x 3072; the rest is small."""
    config = configs.parse(BENCH)
    model = models.build(config.model)
    whole = flops.forward(model, config.shape, "cpu")  # without kernels all is products
    one = flops.forward(model, config.shape)  # and that was not what is counted again
    assert whole == flops.Forward(one.matmul + one.attention, 0)
    layers = 60 * 2 * 1536 * 3072 * 12 * 3072
    assert layers < one.matmul < 1.005 * layers
    assert one.attention == 60 * 4 * 1536**2 * 3072


@pytest.mark.parametrize("merge, forwards", [(False, 7.25), (True, 7.5)])
def test_forwards_of_the_released_step(merge, forwards):
    config = configs.parse(BENCH, [f"objective.merge_passes={merge}"])
    calls = flops.calls(config.bound_objective, 128, (64, 64, 16))
    one = flops.Forward(1000, 0)
    assert flops.step(one, calls, "full").matmul == forwards * 128 * 1000
    assert flops.step(one, calls, "dots").matmul == (forwards - 1) * 128 * 1000
    assert flops.worth(flops.Forward(900, 100), calls) == (forwards - 1) * 128 * 1000
    attention = flops.step(flops.Forward(0, 1000), calls, "dots").attention
    assert attention == (forwards - 0.5) * 128 * 1000  # the scores of the gradient again
    # 160, 128, 96, 96 and 64 rows on 64 devices: filled up to 192, 128, 128, 128 and 64
    on_pod = flops.step(one, calls, "full", row_parts=64).matmul / 128_000
    assert on_pod == (7.5 if merge else 8.0)


def test_frozen_weights_have_no_gradient_to_count():
    """Of adapters' runs, whose base has none: half of a backward pass's products less."""
    one = flops.Forward(1000, 100)
    def counted(rank):
        overrides = [f"adapter.rank={rank}", "model.time_conditioning=half_r", "train.steps=10"]
        run = configs.parse("configs/sana06b_tpu.py:tiny", overrides)
        prepared, rows = setup.prepare(run), run.data.batch_size
        found = prepared.evaluations(setup.phase_of(run.objective, run.objective.cycle[0]))
        return (np.array(dataclasses.astuple(flops.step(one, found, "full"))) / rows).tolist()
    matmul, attention = counted(0)
    assert counted(4) == [matmul - 1000, attention]


def test_micro_steps_are_counted_too():
    config = configs.parse(BENCH)
    calls = flops.calls(config.bound_objective, 128, (64, 64, 16), micro_steps=4)
    assert sum(call.rows for call in calls if call.trained) == 128


def test_reports(tmp_path):
    text = report.details(EXAMPLE)
    for part in ("3.00 of 95.00 GiB", "2.02 compiled, 2 counted (+1.0%)", "7.50 forwards",
                 "1.2 h, 80 chip-hours", "15 % too slow"):
        assert part in text, text
    assert EXAMPLE.to_json()["images_per_second"] == pytest.approx(128 / 1.5)
    refused = dataclasses.replace(EXAMPLE, refused="needs 120G of 95G")
    assert "needs 120G of 95G" in report.line(refused) and "needs" in report.details(refused)
    report.plot([EXAMPLE, refused], tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.size[0] > 500


def test_several_lengths_of_text_make_a_plan_each_and_a_mean(monkeypatch, capsys):
    seconds = {128: 0.8, 256: 0.9, 512: 1.1}

    def made(run, where, *_):
        text = run.data.text_tokens
        return dataclasses.replace(EXAMPLE, text=text, overlapped=seconds[text])

    monkeypatch.setattr(plan, "train", made)
    of = lambda side, text: models.Shape((side, side, 16), text)
    shares = {of(64, 128): 0.5, of(64, 512): 0.25, of(128, 128): 0.25}
    monkeypatch.setattr(plan, "shares", lambda run: shares)
    command = [
        "--config", BENCH, "--topology", "v5p:4x4x4", "--remat", "full", "dots",
        "--config.data.text_tokens=128,256,512",
    ]
    assert call(verb, *command) == 0
    told = capsys.readouterr().out
    assert told.count("v5p:4x4x4     fsdp 64") == 6
    assert told.count("0.875 s in the mean of the records' rows, 0.8 s with 128 text") == 2
    assert "fastest per image" in told and "about 1.1 s per step" in told


def test_what_each_objective_holds_and_passes(monkeypatch):
    """Rivals of two more networks, as published and as adapters over one base; by hand: all four
    roles of TwinFlow, and the student's turn of DMD2, one of five."""
    monkeypatch.setattr(plan, "devices", lambda _: jax.devices()[:1])
    monkeypatch.setattr(
        plan, "_compiled", lambda base, lower, mesh, parts, *_: dataclasses.replace(
            base, parts=parts | {"activations": 3 * base.gradients},
            peak_bytes=sum(parts.values()) + 3 * base.gradients, overlapped=0.5,
        ),
    )
    adapters = ["adapter.rank=2", "model.time_conditioning=half_r", "train.weights=bfloat16"]

    def planned(name, *changes):
        changes = [*changes, "train.ema_decay=0", "train.init_from=a_start"]
        run = verb.varied("configs/sana06b_tpu.py:tiny", changes, name, None, None, None)
        return plan.train(run, topology.resolve("v5p:2x2x1"))

    whole, dmd2 = planned("released"), planned("dmd2")
    weights = whole.parts["weights"]
    assert whole.gradients == weights and dmd2.gradients == 2 * weights
    assert dmd2.parts["teacher"] - weights in (0, 4)  # the count of an average's steps
    assert dmd2.parts["auxiliary networks"] >= 3 * weights
    assert dmd2.passes == {"forwards": 1 + 1 + 2 / 5, "backwards": 1 + 1 / 5, "derivatives": 0}
    small = planned("released", *adapters), planned("dmd2", *adapters)
    assert 0 < small[0].gradients < weights / 10 and small[1].gradients == 2 * small[0].gradients
    refused = dataclasses.replace(whole, refused="needs 120G of 95G; what would help: fewer rows")
    early = dataclasses.replace(refused, parts={}, refused="no such mesh")  # nothing counted yet
    names = ["released", "dmd2", "large", "early"]
    lines = report.by_objective(names, [whole, dmd2, refused, early]).split("\n")
    numbers = [float(value) for value in lines[2].split()[1:]]
    assert len(numbers) == 12 == len(lines[0].split()) - 2 and numbers[-1] == 0.3
    assert lines[3].endswith("needs 120G of 95G")
    assert lines[4].split() == ["early", "no", "such", "mesh"]


def test_where_each_weight_lies():
    """The bytes of a row by hand, and a rule that does not apply."""
    model = models.create({"name": "sana", "layers": 2, "heads": 3})
    mesh = jax.sharding.AbstractMesh((1, 4, 2, 1), AXES)
    first, _, *lines = report.parameters("here", model, mesh).splitlines()
    assert first.startswith("here, mesh fsdp 4 x tensor 2: ")
    rows = {line.split()[0]: line for line in lines}
    assert len(rows) == len(jax.tree.leaves(model.abstract_params()))
    hidden = rows["layers/mlp/hidden/kernel"]  # 96 x 480, split in 4 and in 2
    assert "(2, 96, 480)" in hidden
    assert float(hidden.split()[-1]) == pytest.approx(2 * 96 * 480 * 4 / 8 / 2**20, abs=0.01)
    three = jax.sharding.AbstractMesh((1, 1, 5, 1), AXES)
    assert "heads: 96 does not divide by 5" in report.parameters("here", model, three)


@pytest.mark.parametrize("arguments, message", [
    (["--topology", "v5p:nothing"], "a topology is one of v4:2x2x4"),
    (["--topology", "v5p:4x4x4", "v5e:4x4", "--hlo", "x"], "2 plans are asked for"),
    (["--topology", "v5p:4x4x4", "--batch", "3"], "unknown argument '--batch'"),
])
def test_requests_that_are_refused(arguments, message):
    command = [sys.executable, "-m", "twinflow_jax.plan", "--config", BENCH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.tpu
def test_a_plan_of_the_small_network(tmp_path):
    command = [
        sys.executable, "-m", "twinflow_jax.plan", "--config", "configs/qwen20b_tpu.py:tiny",
        "--topology", "v5p:2x2x1", "--json", str(tmp_path / "plan.json"), "--hlo",
        str(tmp_path / "plan.hlo"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "v5p:2x2x1: fits" in done.stdout, done.stderr
    found, = json.loads((tmp_path / "plan.json").read_text())
    assert found["compiled"]["matmul"] == pytest.approx(found["analytic"]["matmul"], rel=0.03)
    assert "HloModule" in (tmp_path / "plan.hlo").read_text()


@pytest.mark.tpu
@pytest.mark.parametrize("strategy", ["gather_layers", "gather_once"])
def test_collectives_of_the_step_on_a_pod(strategy, tmp_path):
    """On a whole three-dimensional torus: gathers stay gathers, gradients are born split."""
    command = [
        sys.executable, "-m", "twinflow_jax.plan", "--config", BENCH, "--topology", "v5p:4x4x4",
        "--strategy", strategy, "--json", str(tmp_path / "plan.json"),
        "--config.model.sample_shape=(16,16,16)", "--config.data.text_tokens=64",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, = json.loads((tmp_path / "plan.json").read_text())
    moved = {kind: row["bytes"] / 1e9 for kind, row in found["collectives"].items()}
    copy = 2 * 60 * 12 * 3072 * 3072 * 2 / 1e9  # bf16, of both streams' projections
    assert moved["reduce-scatter (looped)"] == pytest.approx(copy * 17 / 16, rel=0.01)
    assert moved.get("all-reduce", 0) + moved.get("all-reduce (looped)", 0) < 0.5
    gathers = {"gather_once": "all-gather", "gather_layers": "all-gather (looped)"}[strategy]
    passes = {"gather_once": 1, "gather_layers": 5}[strategy]
    assert moved[gathers] == pytest.approx(passes * copy * 17 / 16, rel=0.05)
