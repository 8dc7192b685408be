"""SANA-1.6B frozen, adapters (LoRA) of rank 64 into a one-step generator.

    python -m twinflow_jax.train --config configs/sana16b_lora_tpu.py --workdir runs/sana16b_lora

after the import and encoding of configs/sana16b_tpu.py. The variants are those of
configs/sana06b_lora_tpu.py.
"""

import pathlib

import ml_collections

from twinflow_jax.training import variants


def get_config(variant: str = "order2") -> ml_collections.ConfigDict:
    return variants.lora(pathlib.Path(__file__).with_name("sana16b_tpu.py"), variant)
