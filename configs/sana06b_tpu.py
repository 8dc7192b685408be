"""SANA-0.6B, all parameters, into a one-step generator: TwinFlow's settings for it.

    python -m twinflow_jax.convert import Efficient-Large-Model/Sana_600M_1024px_diffusers \\
        checkpoints/sana06b
    python -m twinflow_jax.encode photos/ records/train --pipeline checkpoints/sana06b --size 1024
    python -m twinflow_jax.train --config configs/sana06b_tpu.py --workdir runs/sana06b

docs/data.md says which pictures, and in which forms. Variants, as `configs/sana06b_tpu.py:NAME`:
  (none)  the paper's settings (Table 6): RAdam, 30,000 steps of 128 images, EMA .99
  bench   the fixed workload of docs/benchmarks.md: 512x512, batch 128, teacher = student
  tiny    the same code with small random networks, on handwritten digits with captions:

    python -m twinflow_jax.train --config configs/sana06b_tpu.py:tiny --workdir runs/tiny
    python -m twinflow_jax.sample --checkpoint runs/tiny --prompt "the handwritten digit two" \\
        --out samples

Hardware: master weights, RAdam's moments and gradients take 9.6 GB in float32, each average of
the weights 2.4 GB more. `tiny` runs on two CPU cores in two minutes; its networks are random,
so that its pictures show that everything works, and nothing else.
"""

import ml_collections

from twinflow_jax import objectives
from twinflow_jax.training import defaults, variants

PROMPTS = (*variants.PROMPTS, "A lighthouse on a cliff under a full moon, oil painting")


def get_config(variant: str = "paper") -> ml_collections.ConfigDict:
    return variants.choose(variant, paper=paper, bench=bench, tiny=small)


def paper() -> ml_collections.ConfigDict:
    config = defaults.get()
    config.pipeline = "checkpoints/sana06b"
    config.data.update(records=("records/train",), batch_size=128, text_tokens=300)
    config.model = {
        "name": "sana", "sample_shape": (32, 32, 32), "dtype": "bfloat16", "remat": "full",
    }
    config.objective = objectives.preset("released", merge_passes=True)
    config.mesh.strategy = "gather_layers"
    config.optimizer.update(name="radam", learning_rate=1e-4, betas=(0.9, 0.95))
    config.train.update(
        steps=30_000, ema_decay=0.99, init_from="checkpoints/sana06b", log_every=50,
        sample_every=1000, checkpoint_every=1000,
    )
    config.sample.update(prompts=PROMPTS, columns=2, score_count=0)
    return config


def bench() -> ml_collections.ConfigDict:
    config = paper()
    config.model["sample_shape"] = (16, 16, 32)
    config.objective.teacher_decay = 0.0
    config.train.ema_decay = 0.0
    return config


def small() -> ml_collections.ConfigDict:
    return variants.shrink(paper(), sample_shape=(2, 2, 32), text_tokens=300)
