"""SANA-1.6B, all parameters, into a one-step generator: TwinFlow's settings for it.

    python -m twinflow_jax.convert import Efficient-Large-Model/Sana_1600M_1024px_diffusers \\
        checkpoints/sana16b
    python -m twinflow_jax.encode photos/ records/train --pipeline checkpoints/sana16b --size 1024
    python -m twinflow_jax.train --config configs/sana16b_tpu.py --workdir runs/sana16b

The variants are those of configs/sana06b_tpu.py. Hardware: master weights, RAdam's moments and
gradients take 26 GB in float32, each average of the weights 6.6 GB more.
"""

import pathlib

import ml_collections

from twinflow_jax import config as configs

WIDTHS = {"layers": 20, "heads": 70, "cross_heads": 20, "cross_head_dim": 112}


def get_config(variant: str = "paper") -> ml_collections.ConfigDict:
    smaller = pathlib.Path(__file__).with_name("sana06b_tpu.py")
    config = configs.load(f"{smaller}:{variant}")
    config.optimizer.betas = (0.9, 0.99)
    if variant != "tiny":
        config.pipeline = config.train.init_from = "checkpoints/sana16b"
        with config.unlocked():
            config.model.update(WIDTHS)
    return config
