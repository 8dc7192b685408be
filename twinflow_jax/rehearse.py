"""Whether every program of a run would fit on TPUs that are not here, before they cost anything.

    python -m twinflow_jax.rehearse --config configs/sana06b_tpu.py --topology v5e:2x4

All that train, sample, encode and evaluate would compile there is compiled by the TPU's own
compiler (`pip install -e ".[pod]"`, no TPU and no weights needed; minutes each): what it takes,
what lies beside it then, and the most of each verb. Where the config's pipeline and records are
here, their networks, tokenizers and sizes count; otherwise its family's published networks with
small tokenizers, and the network's own size. The exit status is 1 where something does not fit.
Of a network that edits, evaluate is left out: it draws suites as sample does.
"""

import argparse
import os

from twinflow_jax import arguments, files
from twinflow_jax.errors import UserError, run_verb

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs, and a GPU would only be in the way


def main() -> int:
    args, overrides = parse()
    from twinflow_jax import config as configs
    from twinflow_jax.planning import rehearsal, topology

    verbs = args.verbs or rehearsal.VERBS
    if unknown := set(verbs).difference(rehearsal.VERBS):
        raise UserError(f"--verbs {min(unknown)}: choose from {', '.join(rehearsal.VERBS)}")
    where = topology.resolve(args.topology)
    run, devices = configs.parse(args.config, overrides), topology.devices(where)
    if rehearsal.edits(run) and "evaluate" in verbs:
        print("evaluate draws suites of edits as sample does, which stands for it")
        verbs = [verb for verb in verbs if verb != "evaluate"]
    room = topology.generation_of(devices).hbm_bytes
    print(f"{where.name}, {room / topology.GIB:.2f} GiB per device\n{rehearsal.HEADER}", flush=True)
    fit = True
    for programs in rehearsal.programs(run, devices, rehearsal.shapes(run), verbs):
        rows = []
        for row in rehearsal.rows(programs, devices):
            print(rehearsal.line(row), flush=True)
            rows.append(row)
        said, fits = rehearsal.peak(rows, room)
        print(said, flush=True)
        fit = fit and fits
    return 0 if fit else 1


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = arguments.parser("rehearse", __doc__)
    parser.add_argument("--config", type=files.path, required=True, metavar="FILE[:VARIANT]",
                        help="a config file")
    parser.add_argument("--topology", required=True, metavar="NAME",
                        help="v5p:4x4x4, 2*v5p:4x4x4 for two slices, or a cloud name like v5e-8")
    parser.add_argument("--verbs", nargs="+", help="of train, sample, encode, evaluate: only these")
    args, rest = parser.parse_known_args()
    return args, arguments.overrides(rest)


if __name__ == "__main__":
    run_verb(main)
