"""SANA-0.6B, all parameters, at 512x512 on the TPU v5e-8 that Kaggle lends (docs/kaggle.md).

    python -m twinflow_jax.train --config configs/sana06b_kaggle.py --workdir /kaggle/working/run \\
        --config.pipeline=/kaggle/temp/base --config.train.init_from=/kaggle/temp/base \\
        --config.data.records='("/kaggle/working/records",)'

The variants are those of configs/sana06b_tpu.py; `tiny` runs on two CPU cores. The student is its
own teacher, and moments are in bfloat16: that is what the disk has room for. By
`python -m twinflow_jax.plan --config configs/sana06b_kaggle.py --topology v5e:2x4`, not yet there:
  memory   3.4 of 15.75 GiB a chip: batch 128, every layer computed again (model.remat=full)
  time     .36 to .38 s a step by the model (docs/benchmarks.md says how far that is off): 30,000
           steps in 3 hours, so that one session of 9 hours is enough, and a sixth of a week's 20
  disk     7.2 GB a checkpoint, of which one stays and another is written: 14.4 of 20 GB
"""

import pathlib

import ml_collections

from twinflow_jax import config as configs


def get_config(variant: str = "paper") -> ml_collections.ConfigDict:
    config = configs.load(f"{pathlib.Path(__file__).with_name('sana06b_tpu.py')}:{variant}")
    config.optimizer.moments = "bfloat16"
    config.objective.teacher_decay = 0.0
    config.train.keep = 1
    if variant != "tiny":
        config.mesh.strategy = "gather_once"
        config.model["sample_shape"] = (16, 16, 32)
    return config
