"""Parity with diffusers' AutoencoderKLQwenImage, the published names, and what is refused."""

import functools

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.models.oracles import BOUNDS, assert_one_tile_changes_nothing, codec_errors, converted
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.models.qwen_image import NETWORKS, autoencoder
from twinflow_jax.models.qwen_image.autoencoder import Autoencoder, Config

NETWORK = NETWORKS["vae"]
PUBLISHED = {"base_dim": 96, "num_res_blocks": 2}
SMALL = {"base_dim": 8, "num_res_blocks": 1}


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
    return vae, config, converted(vae, NETWORK, config)


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


errors = functools.partial(codec_errors, NETWORK, encoded, decoded)


@pytest.mark.parametrize(
    ("fields", "places"), [(SMALL, (2, 4, 4)), (SMALL, (1, 5, 3)), (PUBLISHED, (1, 2, 2))]
)
def test_encode_and_decode_agree_with_diffusers(fields, places):
    assert max(errors(pair(**fields), places)) <= BOUNDS["float32"]


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_bfloat16_stays_close_and_gives_float32(stored):
    assert max(errors(pair(**SMALL), (2, 4, 4), "bfloat16", stored)) <= BOUNDS["bfloat16"]


def test_tiles_of_a_whole_image_change_nothing():
    _, config, params = pair(**SMALL)
    assert_one_tile_changes_nothing(NETWORK, config, params)


def test_names_and_counts_are_the_published_ones():
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLQwenImage()
    published = {key: tuple(value.shape) for key, value in vae.state_dict().items()}
    config = Config.from_published(dict(vae.config))
    assert config == Config() and config.downscale == 8

    table, leaves = autoencoder.table(config), names.flatten(NETWORK.abstract(config)[0])
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
