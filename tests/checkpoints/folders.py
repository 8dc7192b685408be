"""Published folders for the tests of conversion: read, changed, and taken through convert.py."""

import json
import pathlib

import numpy as np
import safetensors.torch
import torch
from diffusers import QwenImagePipeline

from tests.test_verbs import call
from twinflow_jax import convert as verb

CONVERT = pathlib.Path(verb.__file__)
NETWORKS = ("transformer", "vae", "text_encoder")
SEED = int(np.random.default_rng().integers(1 << 30))


def convert(*arguments) -> int:
    return call(verb, *map(str, arguments))


def weight_file(folder: pathlib.Path) -> pathlib.Path:
    return next(folder.glob("*.safetensors"))


def read(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """A network's tensors, by the library."""
    return {
        key: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for key, tensor in safetensors.torch.load_file(file).items()
    }


def edit(folder: pathlib.Path, change) -> None:
    """Writes a network's only file anew with `change(tensors)`."""
    changed = {key: tensor.contiguous() for key, tensor in change(read(folder)).items()}
    safetensors.torch.save_file(changed, weight_file(folder))


def configure(folder: pathlib.Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys(), f"seed {SEED}"
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype, key
        assert ours[key].shape == theirs[key].shape, key
        assert bits(ours[key]) == bits(theirs[key]), f"{key}, seed {SEED}"


# Variants of a published folder: each changes `source` and returns the published tensors by
# network, as export should give them back.


def to_bfloat16(source):
    for name in NETWORKS:
        edit(source / name, lambda all: {k: v.bfloat16() for k, v in all.items()})
    return {name: read(source / name) for name in NETWORKS}


def as_it_is(source):
    return {name: read(source / name) for name in NETWORKS}


def sharded(source):
    """As large models are: several files and an index; beside it a variant's files.

    Some repositories have a config.json that says nothing at the top, for the hub's counting.
    """
    (source / "config.json").write_text("{}")
    wanted = to_bfloat16(source)
    pipeline = QwenImagePipeline.from_pretrained(source).to(torch.bfloat16)
    for name in ("transformer", "text_encoder"):
        plain = weight_file(source / name)
        stem = plain.name.removesuffix(".safetensors")
        plain.rename(source / name / f"{stem}.fp16.safetensors")
        (source / name / f"{stem}.safetensors.index.fp16.json").write_text("{}")
        getattr(pipeline, name).save_pretrained(source / name, max_shard_size="100KB")
        assert len(list(source.glob(f"{name}/{stem}-*.safetensors"))) > 3
    return wanted
