"""OpenUni-L-512, all parameters of its SANA-1.6B, into a one-step generator: TwinFlow's settings.

    python tools/openuni.py ... openuni512    # from four sources, as it says
    python -m twinflow_jax.convert import openuni512 checkpoints/openuni512
    python -m twinflow_jax.encode photos/ records/train --pipeline checkpoints/openuni512 --size 512
    python -m twinflow_jax.train --config configs/openuni512_tpu.py --workdir runs/openuni512

The language model, its queries and the connector are frozen: encode computes once per caption what
SANA reads of them. Variants, as `configs/openuni512_tpu.py:NAME`:
  (none)      the paper's settings (Table 6): AdamW, 60,000 steps of 128 images, EMA .99. Its text
              says 600,000 steps
  image_free  from captions alone, as the released configuration for it
  bench       a fixed workload: teacher = student
  tiny        the same code with small random networks, on handwritten digits with captions

Hardware: as configs/sana16b_tpu.py. OpenUni's weights are not for commercial use (S-Lab License).
"""

import ml_collections

from twinflow_jax import objectives
from twinflow_jax.training import defaults, variants

PROMPTS = (*variants.PROMPTS, "A lighthouse on a cliff under a full moon, oil painting")


def get_config(variant: str = "paper") -> ml_collections.ConfigDict:
    return variants.choose(variant, paper=paper, image_free=image_free, bench=bench, tiny=small)


def paper() -> ml_collections.ConfigDict:
    config = defaults.get()
    config.pipeline = "checkpoints/openuni512"
    config.data.update(records=("records/train",), batch_size=128, text_tokens=256)
    config.model = {"name": "openuni", "dtype": "bfloat16", "remat": "full"}
    config.objective = objectives.preset("released", merge_passes=True)
    config.mesh.strategy = "gather_layers"
    config.optimizer.update(name="adamw", learning_rate=1e-4, betas=(0.9, 0.95), clip_norm=1.0)
    config.train.update(
        steps=60_000, ema_decay=0.99, init_from="checkpoints/openuni512", log_every=50,
        sample_every=1000, checkpoint_every=1000,
    )
    config.sample.update(prompts=PROMPTS, columns=2, score_count=0)
    return config


def image_free() -> ml_collections.ConfigDict:
    config = paper()
    config.objective = objectives.preset("image_free", merge_passes=True)
    return config


def bench() -> ml_collections.ConfigDict:
    config = paper()
    config.objective.teacher_decay = 0.0
    config.train.ema_decay = 0.0
    return config


def small() -> ml_collections.ConfigDict:
    return variants.shrink(paper(), sample_shape=(2, 2, 32), text_tokens=256)
