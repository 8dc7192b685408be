"""LPIPS against the same in PyTorch, with random weights: those of its authors are not here."""

import functools
import itertools

import jax
import numpy as np
import pytest
import torch
from torch.nn import functional

from twinflow_jax.models import lpips, names

# The networks of torchvision: (channels, window, stride, padding), or "M" where they pool.
THEIRS = {
    "alex": [(64, 11, 4, 2), "M", (192, 5, 1, 2), "M", (384, 3, 1, 1), (256, 3, 1, 1),
             (256, 3, 1, 1)],
    "vgg": [(64, 3, 1, 1), (64, 3, 1, 1), "M", (128, 3, 1, 1), (128, 3, 1, 1), "M",
            *[(256, 3, 1, 1)] * 3, "M", *[(512, 3, 1, 1)] * 3, "M", *[(512, 3, 1, 1)] * 3],
}
COMPARED = {"alex": (0, 1, 2, 3, 4), "vgg": (1, 3, 6, 9, 12)}  # convolutions
POOL = {"alex": 3, "vgg": 2}


def theirs(network: str, params: dict, a: np.ndarray, b: np.ndarray) -> float:
    """The distance of two pictures, from the flat parameters of ours."""
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    x = (torch.tensor(np.stack([a, b])).permute(0, 3, 1, 2) - shift) / scale
    number, layer, total = 0, 0, 0.0
    for one in THEIRS[network]:
        if one == "M":
            x = functional.max_pool2d(x, POOL[network], 2)
            continue
        place = f"convolution_{number}"
        kernel = torch.tensor(params[f"{place}/kernel"]).permute(3, 2, 0, 1)
        x = functional.conv2d(
            x, kernel, torch.tensor(params[f"{place}/bias"]), stride=one[2], padding=one[3]
        ).relu()
        if number in COMPARED[network]:
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            weight = torch.tensor(params[f"weight_{layer}"])[None, :, None, None]
            squares = (unit[0] - unit[1]).square()[None]
            total, layer = total + float((squares * weight).sum(1).mean()), layer + 1
        number += 1
    return total


@functools.cache
def parameters(network: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    make = lambda path, shape: np.float32(
        rng.uniform(0, 0.2, shape) if path.startswith("weight")
        else rng.normal(size=shape) * (2 / np.prod(shape[:-1])) ** 0.5 if len(shape) == 4
        else rng.normal(size=shape) * 0.1
    )
    shapes = lpips.shapes(lpips.NETWORKS[network])
    return {path: make(path, shape) for path, shape in shapes.items()}


@pytest.mark.parametrize("network", THEIRS)
def test_distances_are_those_of_the_published_definition(network):
    params, rng = parameters(network), np.random.default_rng(1)
    x = rng.uniform(-1, 1, (2, 3, 49, 54, 3)).astype(np.float32)  # odd: shows where pools end
    x[1, 2] = x[1, 0]
    found = jax.jit(lambda p, x: lpips.distances(lpips.NETWORKS[network], p, x))(
        names.unflatten(params), x
    )
    wanted = [
        [theirs(network, params, *pair) for pair in itertools.combinations(group, 2)] for group in x
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert np.min(wanted[0]) > 0.01 and found[1, 1] < 1e-12  # of a picture and itself
    assert found[1, 0] == pytest.approx(float(found[1, 2]), rel=1e-5)  # either way round
