"""What TensorBoard and Weights & Biases are given."""

import struct
import sys
import types

import pytest
from tensorboardX.proto import event_pb2

from twinflow_jax.errors import UserError
from twinflow_jax.training.loop import train

PICTURES = ("train.steps=2", "train.sample_every=1")


def test_tensorboard_has_numbers_and_pictures(small_config, tmp_path):
    train(small_config(*PICTURES), str(tmp_path / "run"), progress=False)
    [file] = (tmp_path / "run/tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:  # TFRecords: a length, its checksum, an event, its checksum
        [length] = struct.unpack("<Q", data[:8])
        event, data = event_pb2.Event.FromString(data[12 : 12 + length]), data[16 + length :]
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value
    assert found["loss"].keys() == found["samples"].keys() == {1, 2}
    assert found["samples"][2].image.encoded_image_string.startswith(b"\x89PNG")


@pytest.fixture
def wandb(monkeypatch):
    """A module as wandb is; `calls` is what its run was given."""
    fake = types.ModuleType("wandb")
    fake.calls, fake.Error, fake.Settings = [], type("Error", (Exception,), {}), dict
    fake.Image = lambda sheet: sheet.size

    def init(**given):
        fake.calls.append(given)
        return types.SimpleNamespace(
            log=lambda row, step: fake.calls.append((step, row)),
            finish=lambda: fake.calls.append("finish"),
        )

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_goes_on_with_the_same_run(small_config, tmp_path, wandb):
    for steps in (2, 3):
        config = small_config(*PICTURES, "train.loggers=('wandb',)", f"train.steps={steps}")
        train(config, str(tmp_path / "run"), progress=False)
    first, second = (call for call in wandb.calls if isinstance(call, dict))
    assert first["id"] == second["id"] and first["name"] == "run"
    assert first["config"]["train"]["steps"] == 2 and second["resume"] == "allow"
    logged = [call for call in wandb.calls if isinstance(call, tuple)]
    assert [step for step, row in logged if "loss" in row] == [1, 2, 3]
    assert [step for step, row in logged if "samples" in row] == [1, 2, 3]
    assert wandb.calls.count("finish") == 2 and wandb.calls[-1] == "finish"
    assert not (tmp_path / "run/tensorboard").exists()


def test_wandb_that_does_not_start_is_one_line(small_config, tmp_path, wandb, monkeypatch):
    def init(**_):
        raise wandb.Error("no API key configured")

    wandb.init = init
    config = small_config(*PICTURES, "train.loggers=('wandb',)")
    with pytest.raises(UserError, match=r"wandb does not start \(no API key.*WANDB_MODE=offline"):
        train(config, str(tmp_path / "run"), progress=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="cannot be imported .*pip install wandb"):
        train(config, str(tmp_path / "other"), progress=False)
    assert not (tmp_path / "other").exists()


def test_wandb_itself_offline(small_config, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = small_config(*PICTURES, "train.loggers=('tensorboard', 'wandb')")
    train(config, str(tmp_path / "run"), progress=False)
    [record] = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    assert b"gradient_norm" in record.read_bytes()
    assert len(list(record.parent.glob("files/media/images/samples_*.png"))) == 2
