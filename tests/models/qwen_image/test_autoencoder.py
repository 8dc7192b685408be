"""Parity with diffusers' AutoencoderKLQwenImage, the published names, and what is refused."""

import dataclasses
import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.models.oracles import params_of, relative_error
from twinflow_jax.errors import UserError
from twinflow_jax.models import names, tiling
from twinflow_jax.models.qwen_image import autoencoder
from twinflow_jax.models.qwen_image.autoencoder import Autoencoder, Config

PUBLISHED = {"base_dim": 96, "num_res_blocks": 2}
SMALL = {"base_dim": 8, "num_res_blocks": 1}
QUICK = {"xla_backend_optimization_level": 0}  # compiles in half the time


def abstract(config: Config) -> dict:
    images = jnp.zeros((1, config.downscale, config.downscale, 3))
    return jax.eval_shape(Autoencoder(config).init, jax.random.key(0), images)["params"]


@functools.cache
def pair(base_dim: int, num_res_blocks: int):
    """(diffusers' module, our config, our parameters) with random weights of a sane size."""
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLQwenImage(base_dim=base_dim, num_res_blocks=num_res_blocks)
    vae = vae.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(base_dim)
    with torch.no_grad():
        for name, p in vae.named_parameters():
            p.normal_(generator=generator)
            if name.endswith("gamma"):
                p.mul_(0.3).add_(1)
            elif name.endswith("bias"):
                p.mul_(0.1)
            else:
                taps = p.shape[2] if p.ndim == 5 else 1  # one of which acts on a frame
                p.mul_((taps / p[0].numel()) ** 0.5)
    config = Config.from_published(dict(vae.config))
    return vae, config, params_of(vae, autoencoder.table(config), abstract(config))


@functools.cache
def compiled(config: Config, method: str):
    module = Autoencoder(config)
    apply = lambda params, x: module.apply({"params": params}, x, method=method)
    return jax.jit(apply, compiler_options=QUICK)


def randoms(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def frame(x: np.ndarray):
    return torch.from_numpy(x).permute(0, 3, 1, 2)[:, :, None]


def statistics(vae):
    return (
        torch.tensor(values).reshape(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )


@torch.no_grad()
def encoded(vae, images: np.ndarray) -> np.ndarray:
    mean, std = statistics(vae)
    latents = (vae.encode(frame(images)).latent_dist.mean - mean) / std
    return latents[:, :, 0].permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def decoded(vae, latents: np.ndarray) -> np.ndarray:
    mean, std = statistics(vae)
    return vae.decode(frame(latents) * std + mean).sample[:, :, 0].permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("fields", "rows", "height", "width"),
    [(SMALL, 2, 32, 32), (SMALL, 1, 40, 24), (PUBLISHED, 1, 16, 16)],
)
def test_encode_and_decode_agree_with_diffusers(fields, rows, height, width):
    vae, config, params = pair(**fields)
    images = np.tanh(randoms(rows, height, width, 3))
    ours = compiled(config, "encode")(params, images)
    assert relative_error(ours, encoded(vae, images)) <= 2e-5

    latents = randoms(rows, height // 8, width // 8, 16)
    ours = np.asarray(compiled(config, "decode")(params, latents))
    assert relative_error(ours, decoded(vae, latents)) <= 2e-5
    assert 0 < (np.abs(ours) == 1).mean() < 0.5  # the clamp is met, and does not hide the rest


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
def test_bfloat16_stays_close_and_gives_float32(stored):
    vae, config, params = pair(**SMALL)
    config = dataclasses.replace(config, dtype="bfloat16")
    params = jax.tree.map(lambda p: jnp.asarray(p, stored), params)
    images, latents = np.tanh(randoms(2, 32, 32, 3)), randoms(2, 4, 4, 16)
    for method, x, oracle in (("encode", images, encoded), ("decode", latents, decoded)):
        ours = compiled(config, method)(params, x)
        assert ours.dtype == jnp.float32
        assert relative_error(ours, oracle(vae, x)) <= 2e-2


def test_tiles_of_a_whole_image_change_nothing():
    _, config, params = pair(**SMALL)
    latents = randoms(2, 4, 4, 16)
    decode = functools.partial(compiled(config, "decode"), params)
    tiles = tiling.tiled(decode, latents, 8, 4, config.downscale)
    np.testing.assert_array_equal(tiles, decode(latents))


def test_names_and_counts_are_the_published_ones():
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLQwenImage()
    published = {key: tuple(value.shape) for key, value in vae.state_dict().items()}
    config = Config.from_published(dict(vae.config))
    assert config == Config() and config.downscale == 8

    table, leaves = autoencoder.table(config), names.flatten(abstract(config))
    ours = table.shapes({path: leaf.shape for path, leaf in leaves.items()})
    carried = {key: shape for key, shape in published.items() if table.is_carried(key)}
    assert ours | carried == published
    assert not ours.keys() & carried.keys()
    assert (len(ours), len(carried)) == (186, 8)
    assert sum(map(np.prod, published.values())) == 126_892_531
    taps = {path: leaf.shape[0] if leaf.ndim == 5 else 1 for path, leaf in leaves.items()}
    assert sum(leaf.size // taps[path] for path, leaf in leaves.items()) == 44_599_603


def test_a_folder_of_something_else_is_refused_with_every_reason():
    config = {
        "_class_name": "AutoencoderKL", "attn_scales": [0.5], "input_channels": 4,
        "is_residual": True, "z_dim": 8, "dropout": 0.1, "_diffusers_version": "0.42.1",
    }
    with pytest.raises(UserError) as error:
        Config.from_published(config)
    for reason in ("AutoencoderKL", "attn_scales", "input_channels", "is_residual", "latents_std"):
        assert reason in str(error.value)
    assert "dropout" not in str(error.value) and "\n" not in str(error.value)


def test_sides_that_do_not_divide_are_refused():
    _, config, params = pair(**SMALL)
    with pytest.raises(UserError, match="12x16.*multiples of 8"):
        Autoencoder(config).apply({"params": params}, jnp.zeros((1, 12, 16, 3)), method="encode")
