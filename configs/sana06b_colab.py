"""SANA-0.6B frozen, adapters (LoRA) of rank 64, at 512x512 on the one TPU v5e that Colab lends.

    python -m twinflow_jax.train --config configs/sana06b_colab.py --workdir /content/kept/run \\
        --config.pipeline=/content/base --config.train.init_from=/content/base \\
        --config.data.records='("/content/kept/records",)'

docs/kaggle.md has the whole way. The variants are those of configs/sana06b_lora_tpu.py; `tiny` runs
on two CPU cores. By `python -m twinflow_jax.rehearse --config configs/sana06b_colab.py --topology
v5e:1x1`, not yet there: 6.5 of 15.75 GiB, 1.84 s a step, 7,000 steps in 3.6 hours.
"""

import pathlib

import ml_collections

from twinflow_jax.training import variants


def get_config(variant: str = "order2") -> ml_collections.ConfigDict:
    config = variants.lora(pathlib.Path(__file__).with_name("sana06b_tpu.py"), variant)
    if variant != "tiny":
        config.data.batch_size = 64
        config.model["sample_shape"] = (16, 16, 32)
    return config
