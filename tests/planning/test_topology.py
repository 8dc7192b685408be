"""Names of topologies, and the devices that libtpu gives for them."""

import importlib.util
from types import SimpleNamespace

import pytest

from twinflow_jax.errors import UserError
from twinflow_jax.planning import topology


@pytest.mark.parametrize("name, resolved, chips", [
    ("v5p:4x4x4", "v5p:4x4x4", 64),
    ("V5P:4x4x4 ", "v5p:4x4x4", 64),
    ("2*v5p:4x4x4", "2*v5p:4x4x4", 128),
    ("v5p-128", "v5p:4x4x4", 64),
    ("v5p-8", "v5p:2x2x1", 4),
    ("v5p-384", "v5p:4x4x12", 192),
    ("v5p-1536", "v5p:8x8x12", 768),
    ("v4-64", "v4:2x4x4", 32),
    ("v4-4096", "v4:8x16x16", 2048),
    ("v5litepod-256", "v5e:16x16", 256),
    ("v5e-8", "v5e:2x4", 8),
    ("v6e-256", "v6e:16x16", 256),
    ("v6e-1", "v6e:1x1", 1),
    ("tpu7x-128", "tpu7x:4x4x4", 64),
    ("2*v6e-256", "2*v6e:16x16", 512),
])
def test_names(name, resolved, chips):
    found = topology.resolve(name)
    assert (found.name, found.chips) == (resolved, chips)
    assert topology.resolve(found.name) == found


@pytest.mark.parametrize("name, said", [
    ("v9-8", "unknown topology 'v9-8'"),
    ("v5p", "v5p:4x4x4"),
    ("v5p-12", "choose 2, 8, 16, 32, 64 or a multiple of 128"),
    ("v5p-9", "no standard slice of 9 cores"),
    ("v5e-300", "no standard slice of 300 chips"),
    ("v5p:4x4", "v5p has 3 torus axes, not 2"),
    ("v5p:3x4x4", "must be even"),
    ("v6e:32x32", "at most 256 chips"),
    ("v5p:0x4x4", "no such slice"),
    ("0*v5p:4x4x4", "must be positive"),
])
def test_bad_names_are_refused_with_good_ones(name, said):
    with pytest.raises(UserError, match="(?s)" + said.replace("*", r"\*")):
        topology.resolve(name)


def test_every_generation_is_complete():
    for generation in topology.GENERATIONS.values():
        small = topology.resolve(f"{generation.name}-8")
        assert small.generation is generation
        fake = SimpleNamespace(device_kind=generation.kind)
        assert topology.generation_of([fake]) is generation
    with pytest.raises(UserError, match="no figures for device kind 'cpu'"):
        topology.generation_of([SimpleNamespace(device_kind="cpu")])


def test_missing_libtpu_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install libtpu"):
        topology.devices(topology.resolve("v5p-8"))


@pytest.mark.tpu
@pytest.mark.parametrize("name, shape", [
    ("v5p:2x2x4", (2, 2, 4)), ("v4-8", (2, 2, 1)), ("v5e:4x8", (4, 8, 1)), ("v6e-1", (1, 1, 1)),
    ("tpu7x-8", (2, 2, 1)), ("2*v5p:2x2x1", (2, 2, 1)),
])
def test_devices_of_libtpu(name, shape):
    wanted = topology.resolve(name)
    found = topology.devices(wanted)
    assert len(found) == wanted.chips * wanted.generation.devices_per_chip
    assert topology.torus(found) == shape
    assert topology.generation_of(found) is wanted.generation
    assert [topology.slice_of(device) for device in found] == sorted(
        number for number in range(wanted.slices) for _ in range(len(found) // wanted.slices))


@pytest.mark.tpu
def test_a_refusal_of_libtpu_is_one_line():
    with pytest.raises(UserError, match="libtpu refuses v5p:2x3x1") as caught:
        generation = topology.GENERATIONS["v5p"]
        topology.devices(topology.Topology(generation, (2, 3, 1)))
    assert "\n" not in str(caught.value)
