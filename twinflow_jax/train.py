"""Train a network: `python -m twinflow_jax.train --config configs/mnist.py --workdir runs/mnist`.

Any config key can be overridden: `--config.train.steps=500`. The same command again goes on
where a stopped run left off.
"""

import argparse
import signal
import sys

from twinflow_jax import config as configs
from twinflow_jax.errors import run_verb
from twinflow_jax.training.loop import Interrupted, train


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m twinflow_jax.train", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="a config file")
    parser.add_argument("--workdir", required=True, help="folder of the run, local or gs://")
    args, rest = parser.parse_known_args()
    try:
        train(configs.load(args.config, configs.overrides(rest)), args.workdir)
    except Interrupted as stop:
        name = signal.Signals(stop.signal).name
        print(
            f"{name}: saved step {stop.step} in {args.workdir}; "
            "the same command goes on from there",
            file=sys.stderr,
        )
        return 128 + stop.signal
    return 0


if __name__ == "__main__":
    run_verb(main)
