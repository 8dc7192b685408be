"""Qwen-Image 20B frozen, adapters (LoRA) of rank 64 into a one-step generator.

    python -m twinflow_jax.convert import Qwen/Qwen-Image checkpoints/qwen_image
    python -m twinflow_jax.encode photos/ records/train --pipeline checkpoints/qwen_image --size 512
    python -m twinflow_jax.train --config configs/qwen20b_lora_tpu.py --workdir runs/qwen_lora

Variants, as `configs/qwen20b_lora_tpu.py:NAME`; the network sees r as t - r/2, as released
(docs/method.md has the other ways):
  order2  what none stands for: averaged adapters are the teacher; all four roles
  order1  the base is the teacher, of guidance 4 (5 as pipelines count); any_step rows jump to 0
  paper   order2 with the paper's 64 images a step
  tiny    the same code with small random networks, on handwritten digits with captions:

    python -m twinflow_jax.train --config configs/qwen20b_lora_tpu.py:tiny --workdir runs/tiny

Hardware: the base in bfloat16 takes 41 GB over all chips, adapters with moments and averages 8.5.
A step runs in parts of 8 images (paper: 16), each of one role: on v5e:2x4 one row a chip.
"""

import pathlib

import ml_collections

from twinflow_jax.training import variants

FULL = pathlib.Path(__file__).with_name("qwen20b_tpu.py")


def get_config(variant: str = "order2") -> ml_collections.ConfigDict:
    config = variants.lora(FULL, variant, paper=lambda: variants.lora(FULL, "order2"))
    if variant != "tiny":
        roles = sum(ratio > 0 for ratio in config.objective.ratios)
        config.train.micro_steps = roles
        config.data.batch_size = 64 if variant == "paper" else 8 * roles
    return config
