"""Stable Diffusion 3.5 Medium, all parameters, into a one-step generator: TwinFlow's settings.

    python -m twinflow_jax.convert import stabilityai/stable-diffusion-3.5-medium checkpoints/sd35m
    python -m twinflow_jax.encode photos/ records/train --pipeline checkpoints/sd35m --size 512
    python -m twinflow_jax.train --config configs/sd35m_tpu.py --workdir runs/sd35m

docs/data.md says which pictures, and in which forms. Variants, as `configs/sd35m_tpu.py:NAME`:
  (none)  the released sd35_full.yaml, with 3,000 steps of 128 images, of which it says only that
          a device takes 16 at once
  bench   the fixed workload of docs/benchmarks.md: 512x512, batch 128, teacher = student
  tiny    the same code with small random networks, on handwritten digits with captions:

    python -m twinflow_jax.train --config configs/sd35m_tpu.py:tiny --workdir runs/tiny
    python -m twinflow_jax.sample --checkpoint runs/tiny --prompt "the handwritten digit two" \\
        --out samples

Hardware: master weights, AdamW's moments and gradients take 36 GB in float32, each average of the
weights 9 GB more; the table of positions, which is not trained, .9 GB: 8 chips of v5e or 4 of v6e
(docs/benchmarks.md). `tiny` runs on two CPU cores in about three minutes; its networks are random,
so that its pictures show that everything works, and nothing else.
"""

import ml_collections

from twinflow_jax import objectives
from twinflow_jax.training import defaults, variants

PROMPTS = (*variants.PROMPTS, "A shop window with the words \"one step\" in gold letters")


def get_config(variant: str = "released") -> ml_collections.ConfigDict:
    return variants.choose(variant, released=released, bench=bench, tiny=small)


def released() -> ml_collections.ConfigDict:
    config = defaults.get()
    config.pipeline = "checkpoints/sd35m"
    config.data.update(records=("records/train",), batch_size=128, text_tokens=334)
    config.model = {
        "name": "sd35", "sample_shape": (64, 64, 16), "dtype": "bfloat16", "remat": "full",
    }
    config.objective = objectives.preset("released", merge_passes=True)
    config.mesh.strategy = "gather_layers"
    config.optimizer.update(
        name="adamw", learning_rate=1e-5, betas=(0.9, 0.99), clip_norm=1.0
    )
    config.train.update(
        steps=3000, ema_decay=0.99, init_from="checkpoints/sd35m", log_every=10,
        sample_every=100, checkpoint_every=100,
    )
    config.sample.update(prompts=PROMPTS, columns=2, score_count=0)
    return config


def bench() -> ml_collections.ConfigDict:
    config = released()
    config.objective.teacher_decay = 0.0
    config.train.ema_decay = 0.0
    return config


def small() -> ml_collections.ConfigDict:
    return variants.shrink(released(), sample_shape=(4, 4, 16), text_tokens=334)
