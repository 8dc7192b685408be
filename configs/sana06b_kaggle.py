"""SANA-0.6B, all parameters, at 512x512 on Kaggle's v5e-8."""

import pathlib

import ml_collections

from twinflow_jax import config as configs


def get_config(variant: str = "paper") -> ml_collections.ConfigDict:
    config = configs.load(f"{pathlib.Path(__file__).with_name('sana06b_tpu.py')}:{variant}")
    config.optimizer.moments = "bfloat16"
    config.objective.teacher_decay = 0.0
    config.train.keep = 1
    if variant != "tiny":
        config.mesh.strategy = "gather_once"
        config.model["sample_shape"] = (16, 16, 32)
    return config
