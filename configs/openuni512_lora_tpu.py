"""OpenUni-L-512 frozen, adapters (LoRA) of rank 64 on its SANA into a one-step generator.

    python -m twinflow_jax.train --config configs/openuni512_lora_tpu.py --workdir runs/openuni_lora

after the import and encoding of configs/openuni512_tpu.py. Variants, as
`configs/openuni512_lora_tpu.py:NAME`; the network sees r as t - r/2, as released (docs/method.md
has the other ways):
  order2  what none stands for: averaged adapters are the teacher; all four roles
  order1  the base is the teacher, of guidance 4 (5 as pipelines count); any_step rows jump to 0
  tiny    the same code with small random networks, on handwritten digits with captions
"""

import pathlib

import ml_collections

from twinflow_jax.training import variants


def get_config(variant: str = "order2") -> ml_collections.ConfigDict:
    return variants.lora(pathlib.Path(__file__).with_name("openuni512_tpu.py"), variant)
