"""Adapters of families whose pipelines' loaders have rules of their own: our files in diffusers."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, ZImagePipeline
from etils import epath

from tests.checkpoints.folders import SEED
from tests.checkpoints.test_adapter_files import put_on
from tests.models import oracles
from tests.models.sd35 import test_sd35_transformer as sd35
from tests.models.zimage import test_zimage_transformer as zimage
from twinflow_jax import models
from twinflow_jax.checkpoints import adapter_files, dialects, tensors
from twinflow_jax.models import names

FAMILIES = {"sd35": (sd35, StableDiffusion3Pipeline), "zimage": (zimage, ZImagePipeline)}
RANK = 3


@dataclasses.dataclass(frozen=True)
class Random:
    """The dialects.LowRank of a module: order-1 entries, whose product is as large as a weight."""

    a: np.ndarray
    b: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        return RANK, self.a.shape[1], self.b.shape[0]

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        return self.a, self.b


def written(family: str, form: str, folder, theirs: torch.nn.Module) -> epath.Path:
    """A file with a random adapter of every module that may have one."""
    tests, _ = FAMILIES[family]
    rng, low = np.random.default_rng(SEED), {}
    spots = adapter_files.places(tests.NETWORK, tests.SMALL)
    for name, spot in spots.items():
        into, out = spot.channels
        weight = theirs.get_submodule(name).weight
        assert weight.shape[0] == out and weight[0].numel() == into, name
        normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
        low[name] = Random(normal(RANK, into) * into**-0.5, normal(out, RANK) * RANK**-0.5)
    folder = epath.Path(folder)
    folder.mkdir()
    ones = {name: spot.ones for name, spot in spots.items()}
    return dialects.write(folder, form, low, ones, np.dtype(np.float32), {})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_our_files_mean_the_same_in_diffusers(family, form, tmp_path):
    tests, pipeline = FAMILIES[family]
    assert form in models.FAMILIES[family].adapter_forms
    params, module, ours, theirs = tests.pair(tests.SMALL)
    file = written(family, form, tmp_path / "out", module)
    adapter = adapter_files.open_adapter(file, tests.NETWORK, tests.SMALL, False)
    leaves = adapter_files.put([(adapter, 1.0)], tests.NETWORK, tests.SMALL)
    low = {path: leaf.read().result() for path, leaf in leaves.items()}
    assert low
    flat = names.flatten(params)
    after = oracles.compiled(tests.NETWORK, tests.SMALL)(names.unflatten(flat | low), *ours)
    with torch.no_grad():
        before = tests.theirs(module, *theirs)
        # Made anew: the oracle's hooks know the module that they were put on.
        expected = tests.theirs(put_on(tests.oracle(tests.SMALL), pipeline, form, file), *theirs)
    assert oracles.relative_error(after, expected) < 1e-4, SEED
    assert oracles.relative_error(before, expected) > 1e-1  # moved
    if form == "diffusers":
        header = json.loads(tensors.metadata(file)[dialects.HEADER])
        assert header["transformer.r"] == header["transformer.lora_alpha"] == RANK
