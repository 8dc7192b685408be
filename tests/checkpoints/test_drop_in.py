"""Published folders that are another one's but for their weights: the same networks."""

import math

import pytest

from tests.models import test_autoencoder_kl as autoencoder
from tests.models.qwen_image import test_text_encoder as qwen_text
from tests.models.qwen_image import test_transformer as qwen
from tests.models.zimage import test_zimage_text_encoder as zimage_text
from tests.models.zimage import test_zimage_transformer as zimage
from twinflow_jax import models
from twinflow_jax.checkpoints import imported, published
from twinflow_jax.sampling import schedules

# The config.json files of each, of which only what differs from the first of its family's.
QWEN_2512 = {
    "transformer": qwen.PUBLISHED | {"_diffusers_version": "0.36.0.dev0", "zero_cond_t": False},
    "text_encoder": qwen_text.PUBLISHED,
    "vae": {
        "_class_name": "AutoencoderKLQwenImage", "_diffusers_version": "0.36.0.dev0",
        "attn_scales": [], "base_dim": 96, "dim_mult": [1, 2, 4, 4], "dropout": 0.0,
        "num_res_blocks": 2, "temperal_downsample": [False, True, True], "z_dim": 16,
        "latents_mean": [
            -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
        ],
        "latents_std": [
            2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
            3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
        ],
    },
    "scheduler": {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
        "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02,
        "time_shift_type": "exponential", "use_dynamic_shifting": True,
        "base_image_seq_len": 256, "max_image_seq_len": 8192, "stochastic_sampling": False,
        "invert_sigmas": False, "use_karras_sigmas": False, "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
    },
}


def zimage_with(shift: float) -> dict:
    return {
        "transformer": zimage.PUBLISHED, "text_encoder": zimage_text.PUBLISHED,
        "vae": autoencoder.FLUX,
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
            "shift": shift, "use_dynamic_shifting": False,
        },
    }


@pytest.mark.parametrize(
    ("family", "configs", "parameters", "second"),
    [
        ("qwen_image", QWEN_2512, 20_430_401_088, schedules.dynamic_shift(50, 6889)),
        ("zimage", zimage_with(6.0), 6_154_908_736, schedules.static_shift(50, 6.0)),
        ("zimage", zimage_with(3.0), 6_154_908_736, schedules.static_shift(50, 3.0)),
    ],
    ids=["Qwen-Image-2512", "Z-Image", "Z-Image-Turbo"],
)
def test_published_configs_are_the_familys_own(family, configs, parameters, second):
    networks = models.FAMILIES[family].text_to_image.networks
    for name, network in networks.items():
        assert network.accepts(published.class_name(configs[name]))
        assert network.config.from_published(configs[name]) == network.config()
    config = networks["transformer"].config.from_published(configs["transformer"])
    table, leaves = imported.layout(networks["transformer"], config)
    shapes = table.shapes({path: leaf.shape for path, leaf in leaves.items()})
    base = [shape for key, shape in shapes.items() if key not in table.added({})]
    assert sum(map(math.prod, base)) == parameters
    twice = models.FAMILIES[family].text_to_image.shifted_twice
    assert schedules.published(configs["scheduler"], 50, 6889, twice) == second
