"""Text to image from the command line against diffusers' own modules and pipeline."""

import copy
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

from tests import qwen_folder
from tests.test_verbs import call
from twinflow_jax import sample, text_to_image
from twinflow_jax.checkpoints import importing

PROMPTS = ["a red fox", "two cats, one of them asleep, on a blue sofa by the window"]
SIZE = (64, 96)  # height, width


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small pipeline of diffusers', its import, and PROMPTS drawn in two steps from it."""
    folder = tmp_path_factory.mktemp("text_to_image")
    pipeline = qwen_folder.write(folder)
    checkpoint = folder / "checkpoint"
    importing.import_folder(str(folder / "pipeline"), str(checkpoint), progress=False)
    (folder / "prompts.txt").write_text("\n\n".join(PROMPTS))
    embeddings = folder / "kept" / "embeddings.safetensors"
    made = types.SimpleNamespace(
        pipeline=pipeline, checkpoint=checkpoint, embeddings=embeddings, folder=folder
    )
    made.two_steps = draw(
        made, folder / "two_steps", "--prompts", str(folder / "prompts.txt"), "--steps", "2",
        "--save-embeddings", str(embeddings),
    )
    return made


def draw(made, out: pathlib.Path, *arguments: str, size=SIZE) -> np.ndarray:
    """The pictures (N, H, W, 3) that the verb writes, in the order of their names."""
    height, width = size
    assert call(
        sample, "--checkpoint", str(made.checkpoint), "--out", str(out), "--size",
        f"{width}x{height}", *arguments,
    ) == 0
    return np.stack([np.asarray(Image.open(file), int) for file in sorted(out.iterdir())])


def assert_close(ours: np.ndarray, theirs: np.ndarray, levels: int = 1) -> None:
    """Within some of the 255 levels at 99.9 % of the places, and at no other far away."""
    print(ours.std(), np.bincount(np.abs(ours-theirs).ravel()))
    assert ours.shape == theirs.shape and ours.std() > 20, (ours.shape, theirs.shape)
    difference = np.abs(ours - theirs)
    assert (difference <= levels).mean() >= 0.999 and difference.max() <= 4 * levels, (
        (difference > levels).mean(), difference.max(),
    )


# The same in PyTorch


def noise_of(number: int, size=SIZE, seed: int = 0) -> tuple[torch.Tensor, jax.Array]:
    """The noise (h, w, 16) that a picture starts from, and the key of its fresh noise."""
    first, second = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
    shape = (size[0] // 8, size[1] // 8, 16)
    return torch.from_numpy(np.array(jax.random.normal(first, shape))), second


def packed(x: torch.Tensor) -> torch.Tensor:
    """(h, w, 16) -> (1, h/2 w/2, 64), a channel's four places one after the other."""
    parts = [x[y::2, z::2, c].flatten() for c in range(16) for y in (0, 1) for z in (0, 1)]
    return torch.stack(parts, dim=-1)[None]


def two_times(transformer):
    """E1(t) + E2(r) (t - r) in diffusers' module, E2 a copy of E1; r is `transformer.r`."""
    second = copy.deepcopy(transformer.time_text_embed)

    def add(_, inputs, first):
        t, hidden = inputs[:2]
        r = transformer.r.expand_as(t)
        return first + second(r, hidden) * (t - r)[:, None]

    return transformer.time_text_embed.register_forward_hook(add)


@torch.no_grad()
def few_steps(pipeline, prompt: str, number: int, times, targets, share: float, size=SIZE):
    """The any-step sampler written out: (H, W, 3), integers."""
    tokens, _ = pipeline.encode_prompt(prompt)
    x, key = noise_of(number, size)
    x, grid = packed(x), (size[0] // 16, size[1] // 16)
    hook = two_times(pipeline.transformer)
    for i, (t, then) in enumerate(zip(times[:-1], times[1:], strict=True)):
        pipeline.transformer.r = torch.tensor(targets[i], dtype=torch.float32)
        velocity = pipeline.transformer(
            hidden_states=x, timestep=torch.tensor([t], dtype=torch.float32),
            encoder_hidden_states=tokens, img_shapes=[[(1, *grid)]],
        ).sample
        data, noise = x - t * velocity, x + (1 - t) * velocity
        fresh = jax.random.normal(jax.random.fold_in(key, i), (size[0] // 8, size[1] // 8, 16))
        fresh = packed(torch.from_numpy(np.array(fresh)))
        x = (1 - then) * data + then * ((1 - share) ** 0.5 * noise + share**0.5 * fresh)
    hook.remove()
    latents = pipeline._unpack_latents(data, *size, pipeline.vae_scale_factor)
    mean, std = (
        torch.tensor(values).view(1, 16, 1, 1, 1)
        for values in (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std)
    )
    return pixels(pipeline.vae.decode(latents * std + mean).sample[0, :, 0])


def pixels(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3), integers."""
    return (image.clamp(-1, 1) * 127.5 + 127.5).round().int().permute(1, 2, 0).numpy()


def test_two_steps_with_fresh_noise(made):
    """The recommended two steps: t = .999 and .6, r = 0 told at both, all noise renewed."""
    theirs = [
        few_steps(made.pipeline, prompt, 0, (0.999, 0.6, 0.0), (0.0, 0.0), 1.0)
        for prompt in PROMPTS
    ]
    assert_close(made.two_steps, np.stack(theirs))
