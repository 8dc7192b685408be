"""Parity with diffusers' AutoencoderDC, the published names, and what is refused."""

import dataclasses
import functools

import chex
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.models.oracles import (
    BOUNDS,
    QUICK,
    assert_one_tile_changes_nothing,
    codec_errors,
    converted,
)
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.models.sana import NETWORKS, autoencoder
from twinflow_jax.models.sana.autoencoder import Autoencoder, Config, MultiscaleAttention

NETWORK = NETWORKS["vae"]
BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
PUBLISHED = {  # beyond the class's defaults
    "encoder_block_types": BLOCKS, "decoder_block_types": BLOCKS, "scaling_factor": 0.41407,
    "downsample_block_type": "Conv", "upsample_block_type": "interpolate",
}
WIDE = PUBLISHED | {  # the published widths, less deep
    **{f"{side}_block_out_channels": [256, 512, 1024] for side in ("encoder", "decoder")},
    **{f"{side}_block_types": BLOCKS[1:4] for side in ("encoder", "decoder")},
    **{f"{side}_layers_per_block": [1, 1, 1] for side in ("encoder", "decoder")},
    **{f"{side}_qkv_multiscales": [[], [], [5]] for side in ("encoder", "decoder")},
}
SMALL = PUBLISHED | {  # encoder and decoder differ in everything that may differ
    "latent_channels": 8, "attention_head_dim": 16,
    "encoder_block_out_channels": [16, 32, 64], "decoder_block_out_channels": [32, 64, 64],
    "encoder_layers_per_block": [1, 2, 1], "decoder_layers_per_block": [2, 1, 1],
    "encoder_block_types": ["ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
    "encoder_qkv_multiscales": [[], [], [5]], "decoder_qkv_multiscales": [[], [], [3, 5]],
}


def on_meta(config: dict):
    with torch.device("meta"):
        return diffusers.AutoencoderDC.from_config(config)


def pair(config: dict):
    """(diffusers' module, our config, our parameters) with random weights of a sane size."""
    vae = on_meta(config).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in vae.named_parameters():
            p.normal_(generator=generator)
            if p.ndim > 1:
                p.mul_(p[0].numel() ** -0.5)
            elif name.endswith("weight"):
                p.mul_(0.3).add_(1)
            else:
                p.mul_(0.1)
    config = Config.from_published(dict(vae.config))
    return vae, config, converted(vae, NETWORK, config)


@pytest.fixture(scope="module")
def small():
    return pair(SMALL)


@pytest.fixture(scope="module")
def whole():
    return pair(PUBLISHED)


@torch.no_grad()
def encoded(vae, images: np.ndarray) -> np.ndarray:
    latents = vae.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent
    return (latents * vae.config.scaling_factor).permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def decoded(vae, latents: np.ndarray) -> np.ndarray:
    latents = torch.from_numpy(latents).permute(0, 3, 1, 2)
    images = vae.decode(latents / vae.config.scaling_factor).sample
    return images.clamp(-1, 1).permute(0, 2, 3, 1).numpy()  # as the pipeline's image processor


errors = functools.partial(codec_errors, NETWORK, encoded, decoded)


@pytest.mark.parametrize("places", [(2, 4, 4), (1, 8, 5)], ids=["quadratic", "linear"])
def test_encode_and_decode_agree_with_diffusers(small, places):
    assert max(errors(small, places)) <= BOUNDS["float32"]


def test_published_widths_agree_with_diffusers():
    assert max(errors(pair(WIDE), (1, 3, 2))) <= BOUNDS["float32"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_whole_published_network_agrees_with_diffusers(whole, dtype):
    found = errors(whole, (1, 2, 3), dtype)
    print(f"{dtype}: encode {found[0]:.2e}, decode {found[1]:.2e}")
    assert max(found) <= BOUNDS[dtype]


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_bfloat16_stays_close_and_gives_float32(small, stored):
    assert max(errors(small, (2, 4, 4), "bfloat16", stored)) <= BOUNDS["bfloat16"]


def test_gradients_are_finite_where_nothing_attends():
    module = MultiscaleAttention(16, (3,), "float32")
    x = jnp.zeros((1, 4, 4, 32))
    params = jax.jit(module.init, compiler_options=QUICK)(jax.random.key(0), x)
    loss = lambda params, x: jnp.sum((module.apply(params, x) + 1) ** 2)
    gradients = jax.jit(jax.grad(loss, (0, 1)), compiler_options=QUICK)(params, x)
    chex.assert_tree_all_finite(gradients)


def test_tiles_of_a_whole_image_change_nothing(small):
    _, config, params = small
    assert_one_tile_changes_nothing(NETWORK, config, params)


def test_names_and_counts_are_the_published_ones():
    vae = on_meta(PUBLISHED)
    published = {key: tuple(value.shape) for key, value in vae.state_dict().items()}
    config = Config.from_published(dict(vae.config))
    assert config == Config() and config.downscale == 32

    leaves = names.flatten(NETWORK.abstract(config)[0])
    ours = autoencoder.table(config).shapes({path: leaf.shape for path, leaf in leaves.items()})
    assert ours == published
    assert len(ours) == 375
    assert sum(leaf.size for leaf in leaves.values()) == 312_250_275


def test_a_folder_of_something_else_is_refused_with_every_reason():
    config = PUBLISHED | {
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.42.1", "in_channels": 4,
        "decoder_norm_types": ["rms_norm"] * 3 + ["batch_norm"] * 3, "shift_factor": 0.1,
        "encoder_block_types": "MiddleBlock", "encoder_layers_per_block": [0, 2, 2, 3, 3],
        "decoder_block_out_channels": [8], "decoder_block_types": BLOCKS[:1],
        "decoder_layers_per_block": [1], "decoder_qkv_multiscales": [[]],
    }
    with pytest.raises(UserError) as error:
        Config.from_published(config)
    message = str(error.value)
    for reason in (
        "AutoencoderKL", "in_channels is 4", "batch_norm", "shift_factor", "MiddleBlock",
        "without layers", "differ in length", "6 resolutions, the decoder 1",
    ):
        assert reason in message
    assert "version" not in message and "act_fn" not in message and "\n" not in message


def test_what_a_folder_leaves_out_has_the_value_of_the_class():
    with pytest.raises(UserError, match="pixel_unshuffle") as error:
        Config.from_published({"_class_name": "AutoencoderDC"})
    assert "pixel_shuffle" in str(error.value)
    rest = {key: value for key, value in PUBLISHED.items() if key != "scaling_factor"}
    assert Config.from_published(rest) == dataclasses.replace(Config(), scaling_factor=1.0)


def test_sides_that_do_not_divide_are_refused(small):
    _, config, params = small
    with pytest.raises(UserError, match="12x18.*multiples of 4"):
        Autoencoder(config).apply({"params": params}, jnp.zeros((1, 12, 18, 3)), method="encode")
