"""Train a network: `python -m twinflow_jax.train --config configs/mnist.py --workdir runs/mnist`.

Any config key can be overridden: `--config.train.steps=500`. The same command again goes on
where a stopped run left off. On several hosts, start it on each with --coordinator (docs/pods.md).
"""

import signal
import sys

from twinflow_jax import arguments, files
from twinflow_jax.errors import UserError, run_verb


def main() -> int:
    parser = arguments.parser("train", __doc__)
    parser.add_argument("--config", type=files.path, required=True, metavar="FILE[:VARIANT]",
                        help="a config file")
    parser.add_argument("--workdir", type=files.path, help="folder of the run, seen by every host")
    parser.add_argument(
        "--help-config", action="store_true", help="print the config's keys and exit"
    )
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT",
        help="of process 0, on several hosts; auto on a TPU pod, GKE or Slurm",
    )
    parser.add_argument("--processes", type=int, default=1, help="of the run, unless auto")
    parser.add_argument("--process", type=int, default=0, help="number of this one, from 0")
    args, rest = parser.parse_known_args()
    overrides = arguments.overrides(rest)
    from twinflow_jax import config as configs
    from twinflow_jax.config import reference
    from twinflow_jax.parallel import hosts

    if args.help_config:
        print(reference.describe(configs.parse(args.config, overrides)))
        return 0
    if args.workdir is None:
        parser.error("the following arguments are required: --workdir")
    if args.coordinator:
        hosts.join(args.coordinator, args.processes, args.process)
    elif (args.processes, args.process) != (1, 0):
        raise UserError(
            f"this is process {args.process} of {args.processes}: give --coordinator HOST:PORT too"
        )
    with hosts.together():
        return trained(configs.parse(args.config, overrides), args.workdir)


def trained(run, workdir: str) -> int:
    """Trains; returns the exit status, which is of a signal where one stopped it."""
    from twinflow_jax.parallel import hosts
    from twinflow_jax.training.loop import Interrupted, train

    try:
        train(run, workdir, progress=hosts.leads())
    except Interrupted as stop:
        name = signal.Signals(stop.signal).name
        done = f"saved step {stop.step}" if stop.saved else "no step was taken, nothing is lost"
        if hosts.leads():
            print(
                f"{name}: {done} in {workdir}; the same command goes on from there",
                file=sys.stderr,
            )
        return 128 + stop.signal
    return 0


if __name__ == "__main__":
    run_verb(main)
