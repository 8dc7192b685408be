"""Parity with diffusers' AutoencoderKL, the published names, and what is refused."""

import functools

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.models.oracles import BOUNDS, assert_one_tile_changes_nothing, codec_errors, converted
from twinflow_jax.errors import UserError
from twinflow_jax.models import autoencoder_kl, names
from twinflow_jax.models.autoencoder_kl import Autoencoder, Config
from twinflow_jax.models.zimage import NETWORKS

NETWORK = NETWORKS["vae"]
FLUX = {  # vae/config.json of Z-Image; Stable Diffusion 3's has two other numbers
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.36.0.dev0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True, "in_channels": 3, "latent_channels": 16, "latents_mean": None,
    "latents_std": None, "layers_per_block": 2, "mid_block_add_attention": True,
    "norm_num_groups": 32, "out_channels": 3, "sample_size": 1024, "scaling_factor": 0.3611,
    "shift_factor": 0.1159, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False, "use_quant_conv": False,
}
SD3 = FLUX | {"scaling_factor": 1.5305, "shift_factor": 0.0609}
SMALL = {"block_out_channels": [32, 64, 64, 96], "layers_per_block": 1}


def module_of(published: dict) -> torch.nn.Module:
    plain = {key: value for key, value in published.items() if not key.startswith("_")}
    return diffusers.AutoencoderKL(**plain)


@functools.cache
def pair(scaling: str, size: str):
    """(diffusers' module, our config, our parameters) with random weights of a sane size."""
    published = {"flux": FLUX, "sd3": SD3}[scaling] | (SMALL if size == "small" else {})
    torch.manual_seed(0)
    vae = module_of(published).eval()
    with torch.no_grad():
        for name, p in vae.named_parameters():
            if p.ndim == 1:
                p.normal_(0.0 if name.endswith("bias") else 1.0, 0.1)
            else:
                p.normal_(0, p[0].numel() ** -0.5)
    config = Config.from_published(published)
    return vae, config, converted(vae, NETWORK, config)


@torch.no_grad()
def encoded(vae, images: np.ndarray) -> np.ndarray:
    mean = vae.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist.mean
    latents = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    return latents.permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def decoded(vae, latents: np.ndarray) -> np.ndarray:
    z = torch.from_numpy(latents).permute(0, 3, 1, 2)
    images = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample
    return images.clamp(-1, 1).permute(0, 2, 3, 1).numpy()


errors = functools.partial(codec_errors, NETWORK, encoded, decoded)


@pytest.mark.parametrize(
    ("scaling", "size", "places"),
    [
        ("flux", "small", (2, 4, 4)), ("sd3", "small", (1, 5, 3)),
        pytest.param("flux", "published", (1, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_encode_and_decode_agree_with_diffusers(scaling, size, places):
    assert max(errors(pair(scaling, size), places)) <= BOUNDS["float32"]


def test_bfloat16_stays_close_and_gives_float32():
    assert max(errors(pair("flux", "small"), (2, 4, 4), "bfloat16")) <= BOUNDS["bfloat16"]


def test_tiles_of_a_whole_image_change_nothing():
    _, config, params = pair("flux", "small")
    assert_one_tile_changes_nothing(NETWORK, config, params)


def test_names_and_counts_are_the_published_ones():
    with torch.device("meta"):
        published = {k: tuple(v.shape) for k, v in module_of(FLUX).state_dict().items()}
    config = Config.from_published(FLUX)
    assert config == Config() and config.downscale == 8
    leaves = names.flatten(NETWORK.abstract(config)[0])
    ours = autoencoder_kl.table(config).shapes({path: leaf.shape for path, leaf in leaves.items()})
    assert ours == published and len(ours) == 244
    assert sum(map(np.prod, ours.values())) == 83_819_683


def test_other_autoencoders_are_refused_with_every_reason():
    sdxl = {k: v for k, v in FLUX.items() if "quant" not in k and k != "shift_factor"}
    with pytest.raises(UserError) as error:
        Config.from_published(sdxl | {
            "latent_channels": 4, "norm_num_groups": 16, "window": 3,
            "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        })
    for reason in ("shift_factor is None", "use_quant_conv is True", "use_post_quant_conv",
                   "norm_num_groups", "window", "down_block_types has others"):
        assert reason in str(error.value)
    assert "up_block_types" not in str(error.value) and "\n" not in str(error.value)


def test_sides_that_do_not_divide_are_refused():
    _, config, params = pair("flux", "small")
    with pytest.raises(UserError, match="12x16.*multiples of 8"):
        Autoencoder(config).apply({"params": params}, jnp.zeros((1, 12, 16, 3)), method="encode")
