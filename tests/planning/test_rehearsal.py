"""A rehearsal names every program that the verbs then compile; with libtpu, it compiles them."""

import json
import math
import os
import re
import subprocess
import sys

import jax
import pytest
from PIL import Image

from tests.test_verbs import call
from twinflow_jax import config as configs
from twinflow_jax import encode, models, sample
from twinflow_jax.checkpoints.random import write_random
from twinflow_jax.models import names
from twinflow_jax.models.adapters import Adapter, is_adapter
from twinflow_jax.planning import recorder, rehearsal
from twinflow_jax.planning.topology import GIB
from twinflow_jax.training import inputs
from twinflow_jax.training.loop import train

TINY, EDITS = "configs/qwen20b_tpu.py:tiny", "configs/qwen_edit_tpu.py:tiny"
FEW = (
    "train.steps=2", "train.sample_every=2", "train.checkpoint_every=2", "sample.columns=1",
    "sample.steps=(1,)", "model.remat=none",
)


def rehearse(run, verb: str) -> None:
    for programs in rehearsal.programs(run, jax.devices(), rehearsal.shapes(run), (verb,)):
        for one in programs:
            one.lower()


@pytest.mark.parametrize("family, path", [
    ("qwen_image", TINY),
    pytest.param("qwen_image_edit_plus", EDITS, marks=pytest.mark.slow),
])
def test_nothing_compiles_that_was_not_rehearsed(family, path, lowered, tmp_path, monkeypatch):
    pipeline, folder, picture = tmp_path / "pipeline", tmp_path / "run", tmp_path / "in.png"
    write_random(family, pipeline, 0)
    run = configs.parse(path, [*FEW, f"pipeline={pipeline}"])
    monkeypatch.setattr(inputs, "EDITED", 16)
    Image.new("RGB", (64, 64)).save(picture)

    def twice():  # the second time restored, with pictures that a kill left out
        train(run, str(folder), progress=False)
        (folder / "samples/step_000002.png").unlink()
        train(run, str(folder), progress=False)

    found = lowered(twice)
    assert {"step", "sample", "embed_by_name"} <= {re.search(r"\((.*?)\)", one)[1] for one in found}
    assert found - lowered(rehearse, run, "train") == set()

    def draw():
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("\n".join(run.sample.prompts))
        asked = ("--image", str(picture), "--prompt", "make it night")
        assert call(
            sample, "--checkpoint", str(folder), "--out", str(tmp_path / "out"),
            *(asked if path == EDITS else ("--prompts", str(prompts))),
        ) == 0

    found = lowered(draw)
    assert len(found) >= 3 and found - lowered(rehearse, run, "sample") == set()

    def make():
        line = {"instruction": "make it night", "source": "in.png", "target": "in.png"}
        line = line if path == EDITS else {"image": "in.png", "captions": ["a picture"]}
        (tmp_path / "pictures.jsonl").write_text(json.dumps(line))
        given = str(tmp_path / "pictures.jsonl"), str(tmp_path / "records")
        assert call(encode, *given, "--pipeline", str(pipeline), "--size", "32") == 0

    found = lowered(make)
    assert len(found) >= 2 and found - lowered(rehearse, run, "encode") == set()


@pytest.mark.skipif(jax.device_count() != 2, reason="of two devices: see the next test")
def test_a_run_that_goes_on_on_another_mesh(lowered, tmp_path):
    of = lambda mesh, steps: configs.parse(
        "configs/digits.py", [*FEW[1:-1], "model.depth=1", "sample.score_count=0", *mesh, steps]
    )
    whole, halves = of(["mesh.data=2"], "train.steps=2"), of(["mesh.fsdp=2"], "train.steps=4")
    train(whole, str(tmp_path), progress=False)
    found = lowered(train, halves, str(tmp_path), progress=False)
    assert any("jit(step)" in one for one in found)
    assert found - lowered(rehearse, halves, "train") == set()


@pytest.mark.slow
def test_on_two_devices():
    name = test_a_run_that_goes_on_on_another_mesh.__name__
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", f"{__file__}::{name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert "1 passed" in done.stdout, done.stdout


def test_samples_of_classes_are_rehearsed(lowered, tmp_path):
    run = configs.parse("configs/digits.py", [*FEW[:-1], "sample.score_count=0", "model.depth=1"])
    train(run, str(tmp_path / "run"), progress=False)
    drawing = "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")
    found = lowered(call, sample, *drawing)
    assert any("jit(sample)" in one for one in found)
    assert found - lowered(rehearse, run, "sample") == set()


def test_what_lies_beside_a_program_counts():
    def row(peak: float, beside: float, refused: str = "") -> rehearsal.Row:
        program = recorder.Program("train", "a step", lambda: None, int(beside * GIB), "a lever")
        return rehearsal.Row(program, int(peak * GIB), GIB // 4, 0.5, 60, refused)

    assert rehearsal.line(row(10, 5)).split()[-4:] == ["10.00", "5.00", "0.500", "60"]
    said, fit = rehearsal.peak([row(10, 5), row(11, 1)], 16 * GIB)
    assert fit and "15.50 of 16.00 GiB" in said and "a lever" not in said
    said, fit = rehearsal.peak([row(10, 5.75), row(8, 1)], 16 * GIB)  # with the code of both
    assert not fit and "16.25 of 16.00 GiB" in said and said.endswith("what would help: a lever")
    refused = row(0, 0, "needs 20G of 16G")
    assert rehearsal.line(refused).endswith("needs 20G of 16G; what would help: a lever")
    said, fit = rehearsal.peak([refused, row(1, 1)], 16 * GIB)
    assert not fit and said.endswith("does not fit: a step")


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5e:4x8"])  # one host, several
def test_a_rehearsal_of_the_small_networks(topology):
    command = [
        sys.executable, "-m", "twinflow_jax.rehearse", "--config", TINY, "--topology", topology,
        "--verbs", "train",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for program in "objective step", "first state", "text encoding", "pictures 1 NFE", "decoding":
        assert program in done.stdout


def test_what_draws_edits_stays():
    run = configs.parse(EDITS)
    [found] = rehearsal.programs(run, jax.devices(), rehearsal.shapes(run), ["sample"])
    leaves = lambda one: jax.tree.leaves(one.lower().args_info[0][0])
    size = lambda one: sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves(one))
    [draws] = [one for one in found if one.name.startswith("denoising 1 NFE")]
    [decodes] = [one for one in found if one.name.startswith("decoding")]
    assert (draws.beside, decodes.beside) == (size(decodes), size(draws))


def test_runs_of_adapters_are_rehearsed_with_them():
    def arguments(rank: int) -> int:
        run = configs.parse("configs/sana06b_tpu.py:tiny", [f"adapter.rank={rank}"])
        [found] = rehearsal.programs(run, jax.devices(), rehearsal.shapes(run), ["sample"])
        [one] = [program for program in found if program.name.startswith("denoising 1 NFE")]
        return len(jax.tree.leaves(one.lower().args_info))

    settings = configs.parse("configs/sana06b_tpu.py:tiny").model
    model = models.build(settings, adapter=Adapter(rank=2))
    adapters = [path for path in names.flatten(model.abstract_params()) if is_adapter(path)]
    assert arguments(2) - arguments(0) == len(adapters) > 0
