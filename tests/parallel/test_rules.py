"""How weights lie on a mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from twinflow_jax import models, parallel
from twinflow_jax.errors import UserError
from twinflow_jax.parallel import MeshConfig


def mesh_of(fsdp: int = 4, tensor: int = 2) -> AbstractMesh:
    return AbstractMesh((1, fsdp, tensor, 1), ("data", "fsdp", "tensor", "context"))


def specs(shapes: dict, axes: dict, mesh: AbstractMesh) -> dict:
    leaves = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    return {name: s.spec for name, s in parallel.shardings(mesh, leaves, axes).items()}


def test_rules():
    shapes = {"whole": (3, 8, 6), "odd": (6, 7), "twice": (8, 8, 2), "unnamed": (8, 8), "one": ()}
    axes = {
        "whole": ("layers", "embed", "heads"), "odd": ("embed", "heads"),
        "twice": ("embed", "text", "mlp"), "unnamed": (), "one": (),
    }
    assert specs(shapes, axes, mesh_of()) == {
        "whole": PartitionSpec(None, "fsdp", "tensor"),
        "odd": PartitionSpec(None, None),  # 6 rows do not divide among 4, nor 7 columns among 2
        "twice": PartitionSpec("fsdp", None, "tensor"),  # both are split over fsdp: the first is
        "unnamed": PartitionSpec(), "one": PartitionSpec(),
    }
    # a dimension that does not divide leaves its mesh axis to the next
    assert specs({"a": (6, 8)}, {"a": ("embed", "text")}, mesh_of())["a"] == PartitionSpec(
        None, "fsdp"
    )


def test_report_says_what_lies_where_and_why_not():
    leaves = {"b": {"kernel": jax.ShapeDtypeStruct((8, 6), np.float32)},
              "a": {"kernel": jax.ShapeDtypeStruct((6, 6), np.float32)}}
    axes = {"b": {"kernel": ("embed", "heads")}, "a": {"kernel": ("embed", "embed")}}
    first, second = parallel.report(mesh_of(), leaves, axes)
    assert (first.path, first.bytes) == ("a/kernel", 144)
    assert first.reasons == ["embed: 6 does not divide by 4"] * 2
    assert (second.path, second.bytes, second.reasons) == ("b/kernel", 24, [])


def test_meshes():
    rows = PartitionSpec(("data", "fsdp"))
    assert parallel.over_rows(mesh_of(), 8).spec == rows
    assert parallel.over_rows(mesh_of(), 6).spec == PartitionSpec(None)
    assert parallel.make_mesh().shape["fsdp"] == len(jax.devices())
    assert MeshConfig(data=2, tensor=2).filled(16).fsdp == 4
    few = MeshConfig(context=0).filled(64, rows=24)  # 8 parts of rows, 8 of tokens
    assert (few.fsdp, few.context) == (8, 8)
    assert MeshConfig(context=0).filled(64, rows=128).context == 1
    assert MeshConfig().filled(8, slices=2) == MeshConfig(data=2, fsdp=4, context=1)


@pytest.mark.parametrize("fields, message", [
    ({"data": 3}, "data 3 x fsdp .* does not multiply to 8 devices"),
    ({"fsdp": 2, "tensor": 2}, "fsdp 2 x tensor 2 x context 1 does not multiply to 8"),
    ({"tensor": 0}, "mesh.tensor is 0"),
    ({"data": 1}, "2 slices do not divide"),
])
def test_meshes_that_are_none(fields, message):
    with pytest.raises(UserError, match=message):
        MeshConfig(**fields).filled(8, slices=2 if "slices" in message else 1)


@pytest.mark.parametrize("family, name, parts", [
    ("qwen_image", "transformer", 32), ("qwen_image", "text_encoder", 32),
    ("qwen_image_edit_plus", "text_encoder", 4),  # its vision tower's 3,420 do not divide by 8
])
def test_every_large_weight_of_the_published_network_is_split(family, name, parts):
    """On 4 x 8 devices, both of which divide every other published width."""
    network = models.FAMILIES[family].text_to_image.networks[name]
    abstract, axes = network.abstract(network.config())
    lines = parallel.report(mesh_of(4, 8), abstract, axes)
    total = sum(np.prod(line.shape) for line in lines)
    whole = sum(
        np.prod(line.shape) for line in lines if line.bytes > 4 * np.prod(line.shape) / parts
    )
    assert whole / total < 0.003
