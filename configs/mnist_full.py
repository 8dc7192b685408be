"""configs/mnist.py on all 60,000 MNIST digits, through TFDS (downloads once).

    python -m twinflow_jax.train --config configs/mnist_full.py --workdir runs/mnist_full

Not measured: twice the steps of configs/mnist.py, so about 7 minutes on 2 cores.
"""

import pathlib

import ml_collections

from twinflow_jax import config as configs


def get_config() -> ml_collections.ConfigDict:
    config = configs.load(str(pathlib.Path(__file__).with_name("mnist.py")))
    with config.unlocked():
        config.data.name = "mnist"
        config.train.update(steps=20_000, flow_matching_steps=4_000, sample_every=2_000)
    return config
