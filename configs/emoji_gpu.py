"""configs/emoji.py at 64x64 pixels, for one large GPU: ten minutes by arithmetic, not yet measured.

Data and commands are those of configs/emoji.py, with `--size 64` for twinflow encode and

    python -m twinflow_jax.train --config configs/emoji_gpu.py:flow --workdir runs/emoji64_flow
    python -m twinflow_jax.train --config configs/emoji_gpu.py --workdir runs/emoji64

The variants are those of configs/emoji.py.
"""

import pathlib

import ml_collections

from twinflow_jax import config as configs

WIDTHS = {
    "sample_shape": (64, 64, 3), "patch": 4, "width": 512, "depth": 12, "heads": 8,
    "dtype": "bfloat16",
}


def get_config(variant: str = "twinflow") -> ml_collections.ConfigDict:
    smaller = pathlib.Path(__file__).with_name("emoji.py")
    config = configs.load(f"{smaller}:{variant}")
    config.data.update(records=("data/emoji64/train",), batch_size=256, text_tokens=24)
    config.optimizer.update(learning_rate=3e-4, warmup=100)
    config.train.update(
        ema_decay=0.999, steps=3000 if variant == "flow" else 2400, sample_every=500,
        checkpoint_every=500,
    )
    if variant != "flow":
        config.train.init_from = "runs/emoji64_flow"
    with config.unlocked():
        config.model.update(WIDTHS)
    return config
