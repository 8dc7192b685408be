"""Qwen-Image-Edit 20B, all parameters, into an editor of two to four evaluations.

    python -m twinflow_jax.convert import Qwen/Qwen-Image-Edit-2509 checkpoints/qwen_image_edit
    python -m twinflow_jax.encode edits.jsonl records/edits \\
        --pipeline checkpoints/qwen_image_edit --size 512
    python -m twinflow_jax.train --config configs/qwen_edit_tpu.py --workdir runs/edit

docs/data.md says which edits, and in which forms; Edit-2511 is another --config.model.zero_cond_t,
Qwen-Image-Edit another --config.model.name and 1,408 --config.data.text_tokens. Variants, as
`configs/qwen_edit_tpu.py:NAME`:
  order2  what none stands for: the teacher is the average, all four roles
  order1  the model that it starts from is the teacher, of guidance 4 (5 as pipelines count)
  tiny    the same code with small random networks, on handwritten digits that are inverted,
          painted or mirrored as an instruction says:

    python -m twinflow_jax.train --config configs/qwen_edit_tpu.py:tiny --workdir runs/tiny

Batch and steps are those of the paper's adapters (configs/qwen_edit_lora_tpu.py); it edits with no
other. Hardware: as configs/qwen20b_tpu.py, and twice the FLOPs of a row, whose source has as many
tokens as its sample.
"""

import pathlib

import ml_collections

from twinflow_jax import config as configs
from twinflow_jax.training import variants

BASE = pathlib.Path(__file__).with_name("qwen20b_tpu.py")


def get_config(variant: str = "order2") -> ml_collections.ConfigDict:
    return variants.choose(variant, order2=order2, order1=order1, tiny=small)


def order2() -> ml_collections.ConfigDict:
    config = configs.load(f"{BASE}:paper")
    config.pipeline = config.train.init_from = "checkpoints/qwen_image_edit"
    config.data.update(records=("records/edits",), batch_size=24, text_tokens=384)
    config.model.name = "qwen_image_edit_plus"
    config.objective.teacher_decay = 0.99
    config.train.steps = 7000
    config.sample.prompts = ()
    return config


def order1() -> ml_collections.ConfigDict:
    config = order2()
    config.objective.update(order=1, teacher_decay=1.0, guidance=4.0)
    return config


def small() -> ml_collections.ConfigDict:
    return variants.shrink(order2(), sample_shape=(4, 4, 16), text_tokens=256)
