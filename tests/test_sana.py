"""SANA end to end: conversion and the command line against diffusers' own modules and pipeline."""

import shutil
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch

from tests import sana_folder
from tests.test_text_to_image import assert_close, assert_same_tensors, draw, pixels
from tests.test_verbs import call
from twinflow_jax import sample
from twinflow_jax.checkpoints import exporting, importing
from twinflow_jax.errors import UserError
from twinflow_jax.models.sana import NETWORKS, tiny

PROMPTS = ["A red Fox", "two cats, one of them asleep, on a sofa"]
SIZE = (128, 192)  # height, width
INSTRUCTION = tiny.INSTRUCTION.split("\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small pipeline of diffusers', and its import."""
    folder = tmp_path_factory.mktemp("sana")
    pipeline = sana_folder.write(folder)
    checkpoint = importing.import_folder(
        str(folder / "pipeline"), str(folder / "checkpoint"), progress=False
    )
    return types.SimpleNamespace(folder=folder, pipeline=pipeline, checkpoint=checkpoint)


def normal(key: jax.Array, size) -> torch.Tensor:
    x = jax.random.normal(key, (size[0] // 32, size[1] // 32, 32))
    return torch.tensor(np.array(x)).permute(2, 0, 1)[None]


def noise_of(number: int, size, seed: int = 0) -> tuple[torch.Tensor, jax.Array]:
    """The noise that a picture starts from, and the key of its fresh noise."""
    first, second = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
    return normal(first, size), second


@torch.no_grad()
def two_steps(made, prompt: str) -> np.ndarray:
    """The recommended two steps written out, r = 0, with the second embedder of the import."""
    pipeline, target = made.pipeline, torch.zeros(1)
    second = type(pipeline.transformer.time_embed)(64)
    ours = exporting.as_published(made.checkpoint, "transformer", made.checkpoint.arrays(
        "transformer"
    ))
    second.load_state_dict({
        key.removeprefix("time_embed_2."): torch.tensor(np.array(tensor.read()))
        for key, tensor in ours.items() if key.startswith("time_embed_2.")
    })

    def add(_, inputs, outputs):
        t = inputs[0] / 1000
        extra = second(1000 * target, hidden_dtype=torch.float32)
        return tuple(a + b * (t - target)[:, None] for a, b in zip(outputs, extra, strict=True))

    hook = pipeline.transformer.time_embed.register_forward_hook(add)
    tokens, mask, *_ = pipeline.encode_prompt(
        prompt, False, complex_human_instruction=INSTRUCTION
    )
    x, key = noise_of(0, SIZE)
    for i, (t, then) in enumerate([(0.999, 0.6), (0.6, 0.0)]):
        velocity = pipeline.transformer(
            x, encoder_hidden_states=tokens, encoder_attention_mask=mask,
            timestep=1000 * torch.tensor([t]),
        ).sample
        data = x - t * velocity
        x = (1 - then) * data + then * normal(jax.random.fold_in(key, i), SIZE)
    hook.remove()
    return pixels(pipeline.vae.decode(data / 0.41407).sample[0])


def test_two_steps(made, tmp_path):
    """Latents asked for are those of the pictures."""
    file = tmp_path / "latents.safetensors"
    ours = draw(
        made.checkpoint.folder, tmp_path / "out", "--prompt", PROMPTS[0], "--prompt", PROMPTS[1],
        "--steps", "2", "--save-latents", str(file), size=SIZE,
    )
    assert_close(ours, np.stack([two_steps(made, prompt) for prompt in PROMPTS]))
    latents = safetensors.numpy.load_file(file)["latents"]
    assert latents.shape == (2, 4, 6, 32) and np.isfinite(latents).all()


def test_base_sampling_is_the_published_pipeline(made, tmp_path):
    ours = draw(
        made.checkpoint.folder, tmp_path, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1],
        "--base", "--steps", "5", size=SIZE,
    )
    theirs = made.pipeline(
        PROMPTS, negative_prompt="", guidance_scale=4.5, height=SIZE[0], width=SIZE[1],
        num_inference_steps=5, latents=noise_of(0, SIZE)[0].expand(len(PROMPTS), -1, -1, -1),
        use_resolution_binning=False, output_type="pt", complex_human_instruction=INSTRUCTION,
    ).images
    assert_close(ours, np.stack([pixels(2 * image - 1) for image in theirs]))


def test_goes_back_byte_for_byte(made, tmp_path):
    exporting.export_folder(made.checkpoint, tmp_path / "export", progress=False)
    assert_same_tensors(made.folder / "pipeline", tmp_path / "export", NETWORKS)


def test_a_folder_of_another_variant_is_refused(made, tmp_path):
    """Weights of a 1.0 network under the config.json of a 1.5 one."""
    folder = tmp_path / "pipeline"
    shutil.copytree(made.folder / "pipeline", folder)
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace(
        '"qk_norm": null', '"qk_norm": "rms_norm_across_heads"'
    ))
    with pytest.raises(UserError, match="missing: transformer_blocks.0.attn1.norm_q.weight"):
        importing.import_folder(str(folder), str(tmp_path / "checkpoint"), progress=False)
    assert not (tmp_path / "checkpoint").exists()


def test_sizes_and_captions_that_do_not_fit(made, tmp_path, capsys):
    base = ["--checkpoint", str(made.checkpoint.folder), "--out", str(tmp_path / "out")]
    assert call(sample, *base, "--prompt", "a fox", "--size", "100") == 2
    assert "100x100 is not divisible by 32: choose 96x96" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    long = "very " * 400 + "long"
    assert call(sample, *base, "--prompt", long, "--size", "192x128", "--steps", "2") == 0
    assert "only the first 298 are used" in capsys.readouterr().err
