"""Z-Image 6B, all parameters, into a one-step generator: TwinFlow's settings for Qwen-Image on it.

    python -m twinflow_jax.convert import Tongyi-MAI/Z-Image checkpoints/zimage
    python -m twinflow_jax.encode photos/ records/train --pipeline checkpoints/zimage --size 512
    python -m twinflow_jax.train --config configs/zimage6b_tpu.py --workdir runs/zimage

docs/data.md says which pictures, and in which forms. Variants, as `configs/zimage6b_tpu.py:NAME`:
  (none)  3,000 steps of 32 images, as configs/qwen20b_tpu.py
  turbo   from the distilled Tongyi-MAI/Z-Image-Turbo (checkpoints/zimage_turbo), whose velocities
          are guided already: without guidance, which would guide them again
  bench   the fixed workload of docs/benchmarks.md: 512x512, batch 128, teacher = student
  tiny    the same code with small random networks, on handwritten digits with captions:

    python -m twinflow_jax.train --config configs/zimage6b_tpu.py:tiny --workdir runs/tiny
    python -m twinflow_jax.sample --checkpoint runs/tiny --prompt "the handwritten digit two" \\
        --out samples

Hardware: master weights, AdamW's moments and gradients take 98.5 GB in float32, each average of
the weights 25 GB more: 16 chips of v5e, 8 of v6e or 4 of v5p (docs/benchmarks.md). `tiny` runs on
two CPU cores in about three minutes; its networks are random, so that its pictures show that
everything works, and nothing else.
"""

import ml_collections

from twinflow_jax import objectives
from twinflow_jax.training import defaults, variants

PROMPTS = (*variants.PROMPTS, "A shop window with the words \"one step\" in gold letters")


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
    return variants.choose(variant, full=full, turbo=turbo, bench=bench, tiny=small)


def full() -> ml_collections.ConfigDict:
    config = defaults.get()
    config.pipeline = "checkpoints/zimage"
    config.data.update(records=("records/train",), batch_size=32, text_tokens=128)
    config.model = {
        "name": "zimage", "sample_shape": (64, 64, 16), "dtype": "bfloat16", "remat": "full",
    }
    config.objective = objectives.preset("released", merge_passes=True)
    config.mesh.strategy = "gather_layers"
    config.optimizer.update(
        name="adamw", learning_rate=1e-5, betas=(0.9, 0.99), clip_norm=1.0
    )
    config.train.update(
        steps=3000, ema_decay=0.99, init_from="checkpoints/zimage", log_every=10,
        sample_every=100, checkpoint_every=100,
    )
    config.sample.update(prompts=PROMPTS, columns=2, score_count=0)
    return config


def turbo() -> ml_collections.ConfigDict:
    config = full()
    config.pipeline = config.train.init_from = "checkpoints/zimage_turbo"
    config.objective.guidance = 0.0
    return config


def bench() -> ml_collections.ConfigDict:
    config = full()
    config.data.batch_size = 128
    config.objective.teacher_decay = 0.0
    config.train.ema_decay = 0.0
    return config


def small() -> ml_collections.ConfigDict:
    return variants.shrink(full(), sample_shape=(4, 4, 16), text_tokens=64)
