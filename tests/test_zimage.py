"""Z-Image end to end: conversion and the command line against diffusers' pipeline."""

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
from etils import epath

from tests import zimage_folder
from tests.test_text_to_image import assert_close, assert_same_tensors, draw, pixels
from twinflow_jax import objectives
from twinflow_jax.checkpoints import exporting, imported, importing, store
from twinflow_jax.config import Run
from twinflow_jax.errors import UserError
from twinflow_jax.models.zimage import NETWORKS
from twinflow_jax.training import checks

PROMPTS = ["A red fox", "two cats, one of them asleep, on a sofa by the window of a house"]
SIZE = (80, 48)  # height, width: 15 tokens, filled up to 32


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small pipeline of diffusers', and its import."""
    folder = tmp_path_factory.mktemp("zimage")
    pipeline = zimage_folder.write(folder)
    checkpoint = importing.import_folder(
        str(folder / "pipeline"), str(folder / "checkpoint"), progress=False
    )
    return types.SimpleNamespace(folder=folder, pipeline=pipeline, checkpoint=checkpoint)


@pytest.fixture(scope="module")
def turbo(made):
    """The same weights as those of a distilled model."""
    folder = made.folder / "turbo"
    shutil.copytree(made.folder / "pipeline", folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    told = json.loads(scheduler.read_text()) | {"shift": zimage_folder.TURBO}
    scheduler.write_text(json.dumps(told))
    return importing.import_folder(str(folder), str(made.folder / "turbo_in"), progress=False)


@pytest.fixture(scope="module")
def released(made):
    """TwinFlow's weights: four tensors more, under a wrapper's class."""
    folder = made.folder / "released"
    shutil.copytree(made.folder / "pipeline", folder)
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace('Model"', 'ModelWrapper"'))
    [file] = (folder / "transformer").glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    generator = torch.Generator().manual_seed(9)
    more = {
        key.replace("t_embedder", "t_embedder_2"):
        tensor + 0.3 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for key, tensor in tensors.items() if key.startswith("t_embedder.")
    }
    safetensors.torch.save_file(tensors | more, file)
    checkpoint = importing.import_folder(
        str(folder), str(made.folder / "released_in"), progress=False
    )
    return folder, checkpoint, more


def noise_of(number: int, seed: int = 0) -> tuple[torch.Tensor, jax.Array]:
    """The noise that a picture starts from, and the key of its fresh noise."""
    first, second = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
    return normal(first), second


def normal(key: jax.Array) -> torch.Tensor:
    x = jax.random.normal(key, (SIZE[0] // 8, SIZE[1] // 8, 16))
    return torch.tensor(np.array(x)).permute(2, 0, 1)[None]


def drawn(made, checkpoint, folder, *arguments) -> np.ndarray:
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    return draw(checkpoint.folder, folder, *prompts, *arguments, size=SIZE)


@pytest.mark.parametrize(("name", "steps", "guidance"), [("made", 5, 4.0), ("turbo", 8, 0.0)])
def test_base_sampling_is_the_published_pipeline(made, turbo, tmp_path, name, steps, guidance):
    """Of the base, guided as its users count; of the distilled one, as it comes."""
    shift = {"made": zimage_folder.BASE, "turbo": zimage_folder.TURBO}[name]
    checkpoint = {"made": made.checkpoint, "turbo": turbo}[name]
    assert checkpoint.base_sampling == {"made": (50, 4.0), "turbo": (8, 0.0)}[name]
    asked = ["--base", "--steps", "5"] if name == "made" else ["--base"]
    ours = drawn(made, checkpoint, tmp_path, *asked)
    pipeline = made.pipeline
    pipeline.scheduler = type(pipeline.scheduler)(shift=shift, use_dynamic_shifting=False)
    theirs = pipeline(
        list(PROMPTS), guidance_scale=guidance, height=SIZE[0], width=SIZE[1],
        num_inference_steps=steps, latents=noise_of(0)[0].expand(len(PROMPTS), -1, -1, -1),
        output_type="pt",
    ).images
    assert_close(ours, np.stack([pixels(2 * image - 1) for image in theirs]))


@torch.no_grad()
def two_steps(made, second: dict, prompt: str) -> np.ndarray:
    """The recommended two steps written out, r = 0, as TwinFlow's wrapper computes them, where
    torch.sign(0) = 0."""
    transformer, target = made.pipeline.transformer, torch.zeros(1)
    embedder = copy.deepcopy(transformer.t_embedder)
    embedder.load_state_dict({k.removeprefix("t_embedder_2."): v for k, v in second.items()})

    def add(_, inputs, first):
        u, v = inputs[0] / 1000, torch.sign(target) * (1 - target.abs())
        return first + (u - v).abs()[:, None] * embedder(1000 * (v - u))

    hook = transformer.t_embedder.register_forward_hook(add)
    [tokens], _ = made.pipeline.encode_prompt([prompt], "cpu", False)
    x, key = noise_of(0)
    for i, (t, then) in enumerate([(0.999, 0.6), (0.6, 0.0)]):
        velocity = -transformer([x[0][:, None]], torch.tensor([1 - t]), [tokens]).sample[0][:, 0]
        data = x - t * velocity
        x = (1 - then) * data + then * normal(jax.random.fold_in(key, i))
    hook.remove()
    config = made.pipeline.vae.config
    latents = data / config.scaling_factor + config.shift_factor
    return pixels(made.pipeline.vae.decode(latents).sample[0])


def test_released_weights_draw_as_they_were_trained(made, released, tmp_path):
    _, checkpoint, second = released
    assert checkpoint.knows_r and checkpoint.config("transformer").sign_of_zero == 0
    assert not made.checkpoint.knows_r and made.checkpoint.config("transformer").sign_of_zero == 1
    ours = drawn(made, checkpoint, tmp_path, "--steps", "2")
    assert_close(ours, np.stack([two_steps(made, second, prompt) for prompt in PROMPTS]))


def test_goes_back_byte_for_byte(made, released, tmp_path):
    for name, checkpoint in (("pipeline", made.checkpoint), ("released", released[1])):
        exporting.export_folder(checkpoint, tmp_path / name, progress=False)
        assert_same_tensors(made.folder / name, tmp_path / name, NETWORKS)
    kept = made.checkpoint.carried("text_encoder")  # the last layer and the norm, never read
    assert len(kept) == 12 and "model.layers.2.mlp.up_proj.weight" in kept


def test_a_trained_twin_comes_back(made, tmp_path):
    """Its embedder is among what a run's export holds, and says whose weights they are."""
    path, arrays = "twin_time_embedder/out/bias", made.checkpoint.arrays("transformer")
    place = imported.array_folder(epath.Path(tmp_path), "transformer", path)
    bias = store.create(place, (96,), np.dtype(np.float32))
    store.write(bias, np.ones(96, np.float32))
    run = made.checkpoint.knowing_r(made.checkpoint.config("transformer"))
    trained = arrays | {path: bias}
    exporting.export_folder(run, tmp_path / "export", trained=trained, progress=False)
    again = importing.import_folder(
        str(tmp_path / "export"), str(tmp_path / "again"), progress=False
    )
    assert again.recorded("transformer")["added"] == []
    assert again.config("transformer").sign_of_zero == 1 and again.knows_r
    assert (again.arrays("transformer")[path].read().result() == 1).all()


def test_half_an_embedder_is_refused(released, tmp_path):
    folder = shutil.copytree(released[0], tmp_path / "half")
    [file] = (folder / "transformer").glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    del tensors["t_embedder_2.mlp.0.bias"]
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(UserError, match="missing: t_embedder_2.mlp.0.bias$"):
        importing.import_folder(str(folder), str(tmp_path / "checkpoint"), progress=False)


def run_from(checkpoint: imported.Imported, **objective) -> Run:
    config = checkpoint.config("transformer")
    return Run.of({
        "model": {"name": "zimage"} | {
            key: getattr(config, key) for key in
            ("sample_shape", "layers", "refiners", "heads", "head_dim", "text_width", "rope_axes")
        },
        "pipeline": str(checkpoint.folder), "train": {"init_from": str(checkpoint.folder)},
        "objective": objectives.preset("released", **objective),
    })


def test_a_distilled_start_is_not_guided_again(made, turbo, recwarn):
    checks.check_start(run_from(made.checkpoint))
    checks.check_start(run_from(turbo, guidance=0.0))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="distilled model.*objective.guidance guides them again"):
        checks.check_start(run_from(turbo))
