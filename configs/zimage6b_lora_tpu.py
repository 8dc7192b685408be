"""Z-Image 6B frozen, adapters (LoRA) of rank 64 into a one-step generator.

    python -m twinflow_jax.train --config configs/zimage6b_lora_tpu.py --workdir runs/zimage_lora

after the import and encoding of configs/zimage6b_tpu.py. Adapters are on attention and feed-forward
parts; the embedder that tells the twin apart trains whole. Nothing was released for this family:
the settings are those of the others. Variants, as `configs/zimage6b_lora_tpu.py:NAME`; the network
sees r as t - r/2 (docs/method.md has the other ways), so that any pipeline that loads the adapter
draws in few steps:
  order2  what none stands for: averaged adapters are the teacher; all four roles
  order1  the base is the teacher, of guidance 4 (as its pipeline counts); any_step rows jump to 0
  tiny    the same code with small random networks, on handwritten digits with captions
"""

import pathlib

import ml_collections

from twinflow_jax.training import variants

FULL = pathlib.Path(__file__).with_name("zimage6b_tpu.py")


def get_config(variant: str = "order2") -> ml_collections.ConfigDict:
    config = variants.lora(FULL, variant)
    config.adapter.whole = ("twin_time_embedder/.*",)
    if variant != "tiny":
        config.adapter.targets = ("blocks",)
    return config
