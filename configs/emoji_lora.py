"""Adapters (LoRA) on emoji: of the weights of `configs/emoji.py:flow`, which stay as they are.

    python -m twinflow_jax.train --config configs/emoji.py:flow --workdir runs/emoji_flow
    python -m twinflow_jax.train --config configs/emoji_lora.py --workdir runs/emoji_lora \\
        --config.adapter.rank=16 --config.optimizer.learning_rate=3e-3

after the first commands of configs/emoji.py. Variants, as `configs/emoji_lora.py:NAME`: ways to see
the target time (docs/method.md), each of order 2 with averaged adapters as the teacher, and order 1
with the base alone, whose any_step rows jump to 0. Guidance is in effect 2 in all. Which is best:
docs/benchmarks.md, "Adapters: do they work, and why not".
  gated, second_embedder   an embedder of r, which trains whole; none stands for gated
  half_r                   t - r/2
  gated_1, second_embedder_1, half_r_1   the same, of order 1
Other teachers of order 2: --config.objective.teacher_decay=0 (the student), or =1 with
--config.objective.guidance=1 (the base). Full training of the same kind: configs/emoji.py with
--config.model.time_conditioning.
"""

import functools
import itertools
import pathlib

import ml_collections

from twinflow_jax.training import variants

WHOLE = {
    "half_r": (), "second_embedder": ("SinusoidTime_1/.*",), "gated": ("gated_time_embedder/.*",),
}


def get_config(variant: str = "gated") -> ml_collections.ConfigDict:
    return variants.choose(variant, **{
        f"{sees}{'_1' if order == 1 else ''}": functools.partial(adapted, sees, order)
        for order, sees in itertools.product((2, 1), WHOLE)
    })


def adapted(sees: str, order: int) -> ml_collections.ConfigDict:
    emoji = pathlib.Path(__file__).with_name("emoji.py")
    config = variants.adapted(f"{emoji}:released", order, targets=("all",))
    config.adapter.whole = WHOLE[sees]
    config.model.time_conditioning = sees
    config.train.weights = "float32"
    if order == 1:
        config.objective.guidance = 1.0
    return config
