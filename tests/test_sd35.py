"""Stable Diffusion 3.5 end to end: conversion and the command line against diffusers' pipeline."""

import copy
import json
import shutil
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from tests import sd35_folder
from tests.test_text_to_image import assert_close, assert_same_tensors, draw, pixels
from tests.test_zimage import PROMPTS, SIZE, noise_of, normal
from twinflow_jax import config as configs
from twinflow_jax.checkpoints import exporting, importing
from twinflow_jax.errors import UserError
from twinflow_jax.models.sd35 import t5
from twinflow_jax.training import setup

NETWORKS = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
SECOND = "time_text_embed_2."


def imported(folder, name: str):
    return importing.import_folder(str(folder / name), str(folder / f"{name}_in"), progress=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small pipeline of diffusers', and its import."""
    folder = tmp_path_factory.mktemp("sd35")
    pipeline = sd35_folder.write(folder)
    return types.SimpleNamespace(
        folder=folder, pipeline=pipeline, checkpoint=imported(folder, "pipeline")
    )


@pytest.fixture(scope="module")
def released(made):
    """TwinFlow's weights: eight tensors more, under a wrapper's class."""
    folder = shutil.copytree(made.folder / "pipeline", made.folder / "released")
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace('Model"', 'ModelWrapper"'))
    [file] = (folder / "transformer").glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    generator = torch.Generator().manual_seed(9)
    more = {
        key.replace("time_text_embed.", SECOND):
        0.3 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for key, tensor in tensors.items() if key.startswith("time_text_embed.")
    }
    safetensors.torch.save_file(tensors | more, file)
    return imported(made.folder, "released"), more


def drawn(checkpoint, folder, *arguments) -> np.ndarray:
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    return draw(checkpoint.folder, folder, *prompts, *arguments, size=SIZE)


def base(pipeline, steps: int, guidance: float) -> np.ndarray:
    """The pipeline's own pictures."""
    images = pipeline(
        PROMPTS, guidance_scale=guidance, height=SIZE[0], width=SIZE[1], output_type="pt",
        num_inference_steps=steps, latents=noise_of(0)[0].expand(len(PROMPTS), -1, -1, -1),
    ).images
    return np.stack([pixels(2 * image - 1) for image in images])


def test_base_sampling_is_the_published_pipeline(made, tmp_path):
    assert made.checkpoint.base_sampling == (40, 4.5)
    ours = drawn(made.checkpoint, tmp_path, "--base", "--steps", "5")
    assert_close(ours, base(made.pipeline, 5, 4.5))


@pytest.mark.slow
def test_without_t5(tmp_path):
    pipeline = sd35_folder.write(tmp_path, 5, t5=False, joint_attention_dim=t5.Config.width)
    checkpoint = imported(tmp_path, "pipeline")
    assert checkpoint.parts == ("transformer", "text_encoder", "text_encoder_2", "vae")
    ours = drawn(checkpoint, tmp_path / "out", "--base", "--steps", "3", "--guidance", "1")
    assert_close(ours, base(pipeline, 3, 1.0))
    exporting.export_folder(checkpoint, tmp_path / "export", progress=False)
    assert not (tmp_path / "export" / "text_encoder_3").exists()
    assert imported(tmp_path, "export").parts == checkpoint.parts


@torch.no_grad()
def two_steps(made, second: dict, prompt: str) -> np.ndarray:
    """The recommended two steps written out, r = 0, as TwinFlow's wrapper computes them."""
    transformer = made.pipeline.transformer
    embedder = copy.deepcopy(transformer.time_text_embed)
    embedder.load_state_dict({k.removeprefix(SECOND): v for k, v in second.items()})

    def add(_, inputs, first):
        t, r = inputs[0] / 1000, torch.zeros(1)
        return first + (t - r)[:, None] * embedder(1000 * r, inputs[1])

    hook = transformer.time_text_embed.register_forward_hook(add)
    tokens, _, pooled, _ = made.pipeline.encode_prompt([prompt], None, None, "cpu")
    x, key = noise_of(0)
    for i, (t, then) in enumerate([(0.999, 0.6), (0.6, 0.0)]):
        velocity = transformer(x, tokens, pooled, torch.tensor([1000 * t])).sample
        data = x - t * velocity
        x = (1 - then) * data + then * normal(jax.random.fold_in(key, i))
    hook.remove()
    config = made.pipeline.vae.config
    latents = data / config.scaling_factor + config.shift_factor
    return pixels(made.pipeline.vae.decode(latents).sample[0])


def test_released_weights_draw_as_they_were_trained(made, released, tmp_path):
    checkpoint, second = released
    assert checkpoint.knows_r and not made.checkpoint.knows_r
    ours = drawn(checkpoint, tmp_path, "--steps", "2")
    assert_close(ours, np.stack([two_steps(made, second, prompt) for prompt in PROMPTS]))


def test_goes_back_byte_for_byte(made, released, tmp_path):
    for name, checkpoint in (("pipeline", made.checkpoint), ("released", released[0])):
        exporting.export_folder(checkpoint, tmp_path / name, progress=False)
        assert_same_tensors(made.folder / name, tmp_path / name, NETWORKS)


def test_the_table_of_positions_is_not_trained():
    """The published network: nothing is held of it but the table itself."""
    run = configs.parse("configs/sd35m_tpu.py")
    state = setup.prepare(run).abstract_state()
    held = jax.tree.leaves((state.opt_state, state.teacher, state.average))
    assert state.params["positions"].shape == (1, 384**2, 1536)
    assert (1, 384**2, 1536) not in {leaf.shape for leaf in held}
    averaged = jax.tree.leaves(state.average.params)
    assert sum(leaf.size for leaf in averaged) == 2_251_435_200


@pytest.mark.parametrize(("lacking", "said"), [
    ("text_encoder_3", "text_encoder_3: no such folder: .*, or null for it in model_index.json"),
    ("text_encoder_2", "text_encoder_2: no such folder: give the whole pipeline, .*network$"),
    ("tokenizer_3", "tokenizer_3: holds none of"),
    ("transformer", "transformer: no such folder"),
])
def test_half_a_pipeline_is_refused(made, tmp_path, lacking, said):
    folder = shutil.copytree(made.folder / "pipeline", tmp_path / "half")
    shutil.rmtree(folder / lacking)
    with pytest.raises(UserError, match=rf"cannot be used:\n  {said}"):
        imported(tmp_path, "half")


@pytest.mark.parametrize(("place", "name"), [
    ("transformer", "FluxTransformer2DModel"), ("unet", "UNet2DConditionModel"),
])
def test_folders_that_share_networks_are_refused(made, tmp_path, place, name):
    """FLUX's and SDXL's: the autoencoder is Z-Image's too, and a text encoder SD3's."""
    folder = shutil.copytree(made.folder / "pipeline", tmp_path / "other")
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": name}))
    if place != "transformer":
        (folder / "transformer").rename(folder / place)
        shutil.rmtree(folder / "text_encoder_3")
    for family in (None, "sd35", "zimage"):
        with pytest.raises(UserError, match=f"/{place}/config.json is of class '{name}'; known"):
            importing.import_folder(str(folder), str(tmp_path / "in"), family=family)
