"""Qwen-Image-Edit 20B frozen, adapters (LoRA) of rank 64: the paper's edits in 2 to 4 evaluations.

    python -m twinflow_jax.convert import Qwen/Qwen-Image-Edit-2509 checkpoints/qwen_image_edit
    python -m twinflow_jax.encode edits.jsonl records/edits \\
        --pipeline checkpoints/qwen_image_edit --size 512
    python -m twinflow_jax.train --config configs/qwen_edit_lora_tpu.py --workdir runs/edit_lora

15,000 pairs of 512x512, 24 a step, 7,000 steps. Its alpha is 32; here it is the rank, as
everywhere, which moves `b` twice as fast at the same rate. Variants, as
`configs/qwen_edit_lora_tpu.py:NAME`; the network sees r as t - r/2, as released:
  order2  what none stands for: averaged adapters are the teacher; all four roles
  order1  the base is the teacher, of guidance 4 (5 as pipelines count); any_step rows jump to 0
  tiny    the same code with small random networks, on edited digits (configs/qwen_edit_tpu.py):

    python -m twinflow_jax.train --config configs/qwen_edit_lora_tpu.py:tiny --workdir runs/tiny

Hardware: the base in bfloat16 takes 41 GB over all chips, adapters with moments and averages 8.5.
Beside a base in int8 four chips of v5e take 4 rows, and so does one of v6e (docs/benchmarks.md).
A step runs in parts, each of one role (order2: of 6 rows).
"""

import pathlib

import ml_collections

from twinflow_jax.training import variants

FULL = pathlib.Path(__file__).with_name("qwen_edit_tpu.py")


def get_config(variant: str = "order2") -> ml_collections.ConfigDict:
    config = variants.lora(FULL, variant)
    if variant != "tiny":
        config.train.micro_steps = sum(ratio > 0 for ratio in config.objective.ratios)
    return config
