"""The mesh, and which devices a process computes on by itself."""

import dataclasses

import jax
import pytest

from twinflow_jax import parallel
from twinflow_jax.checkpoints import imported
from twinflow_jax.checkpoints.random import write_random
from twinflow_jax.drawing import Pipeline, text
from twinflow_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is read of a device."""

    process_index: int
    device_kind: str
    slice_index: int = 0


def chips(kind: str, hosts: int, slices: int = 1) -> list[Chip]:
    """Four of each host, whose slices follow each other."""
    return [
        Chip(host, kind, host * slices // hosts) for host in range(hosts) for _ in range(4)
    ]


@pytest.mark.parametrize("kind, hosts, slices, count", [
    ("TPU v5 lite", 1, 1, 4), ("TPU v5 lite", 2, 1, 1), ("TPU v6 lite", 8, 1, 1),
    ("TPU v6 lite", 2, 2, 4),  # each has a slice of its own
    ("TPU v6 lite", 4, 2, 1), ("TPU v5", 16, 1, 4), ("TPU v4", 4, 1, 4), ("TPU7x", 2, 1, 4),
])
def test_what_a_host_computes_alone_with(kind, hosts, slices, count):
    """As the TPU's compiler takes it: over a part of a slice of v5e or v6e it refuses programs."""
    devices = chips(kind, hosts, slices)
    for process in range(hosts):
        own = parallel.own_devices(devices, process)
        assert own == [one for one in devices if one.process_index == process][:count]


def test_here():
    assert parallel.own_devices() == jax.local_devices()


def test_a_network_that_no_device_holds(tmp_path, monkeypatch):
    write_random("qwen_image", tmp_path / "c", 0)
    pipeline = Pipeline(imported.open_imported(tmp_path / "c"), "float32", progress=False)
    weights = parallel.on_device(pipeline.abstract("text_encoder"))
    monkeypatch.setattr(parallel, "room", lambda device: weights - 1)
    with pytest.raises(UserError, match="text_encoder of .* devices, which have .* take more"):
        text.embed(pipeline, ["a fox"])
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    with pytest.raises(UserError, match="several hosts share this slice.* give sample.prompts"):
        text.embed(pipeline, ["a fox"])
    monkeypatch.undo()
    assert len(text.embed(pipeline, ["a fox"]).mask) == 1
