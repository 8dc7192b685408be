"""Import published checkpoints, export trained ones, compare the two.

    python -m twinflow_jax.convert import Qwen/Qwen-Image checkpoints/qwen_image
    python -m twinflow_jax.convert export runs/qwen exported/qwen --dtype bfloat16
    python -m twinflow_jax.convert verify Qwen/Qwen-Image checkpoints/qwen_image

SRC is a pipeline folder as diffusers writes it (transformer/, vae/, text_encoder/, tokenizer/),
the folder of one network, or a hub id that is in the local cache, perhaps with a folder of it:
inclusionAI/TwinFlow/FOLDER. Paths may be local or gs://.
"""

import argparse
import dataclasses

from etils import epath

from twinflow_jax import arguments, files
from twinflow_jax.errors import UserError, run_verb

DTYPES = ("float32", "bfloat16")

README = """\
# {name}

Written by twinflow_jax from `{source}`{weights}. `{library}` loads this folder.

{note}
"""


def main() -> int:
    args = parse()
    return {"import": run_import, "export": run_export, "verify": run_verify}[args.verb](args)


def parse() -> argparse.Namespace:
    parser = arguments.parser("convert", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("import", help="a published folder into a checkpoint of ours")
    verb.add_argument("source", type=files.path, metavar="SRC")
    verb.add_argument("target", type=files.path, metavar="DST")
    verb.add_argument("--dtype", choices=DTYPES, help="default: the source's")
    verb.add_argument(
        "--family", metavar="NAME", help="whose SRC is, where its networks are of several families"
    )
    verb.add_argument(
        "--shards", type=arguments.whole, default=1, metavar="N",
        help="lay weights out for N devices, each of which reads only its part",
    )
    verb = verbs.add_parser("export", help="a checkpoint or a run into a folder for diffusers")
    verb.add_argument("source", type=files.path, metavar="SRC",
                      help="an imported checkpoint, or a run's --workdir")
    verb.add_argument("target", type=files.path, metavar="DST")
    verb.add_argument(
        "--dtype", choices=DTYPES,
        help="of the transformer (default: as it was trained or published)",
    )
    _weights(verb)
    verb = verbs.add_parser("verify", help="compare a published folder with a checkpoint")
    verb.add_argument("source", type=files.path, metavar="SRC")
    verb.add_argument("target", type=files.path, metavar="CHECKPOINT",
                      help="imported, or a run's --workdir")
    _weights(verb)
    return parser.parse_args()


def _weights(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--raw", action="store_true", help="a run's raw weights, not the average")
    verb.add_argument("--at-step", type=int, help="a run's checkpoint (default: the newest)")
    verb.add_argument("--pipeline", type=files.path,
                      help="the imported checkpoint of a run (default: as it says)")


def run_import(args) -> int:
    from twinflow_jax.checkpoints import importing

    checkpoint = importing.import_folder(
        args.source, args.target, args.dtype, args.shards, family=args.family
    )
    for name, network in checkpoint.record["networks"].items():
        added = f", {len(network['added'])} tensors added" if network["added"] else ""
        print(f"{name}: imported{added}")
    print(f"{args.source} is in {args.target}")
    return 0


def run_export(args) -> int:
    from twinflow_jax.checkpoints import exporting

    checkpoint, trained, text = open_weights(args)
    family = checkpoint.text_to_image
    knows_r = "transformer" in checkpoint.parts and (trained or checkpoint.knows_r)
    readme = README.format(
        library="transformers" if set(checkpoint.parts) <= {*family.encoders} else "diffusers",
        name=epath.Path(args.target).name, source=checkpoint.record["source"], weights=text,
        note=family.note(checkpoint.config("transformer").times) if knows_r else "",
    ).strip() + "\n"
    exporting.export_folder(checkpoint, args.target, args.dtype, trained, readme)
    print(f"{args.source} is in {args.target}")
    return 0


def run_verify(args) -> int:
    from twinflow_jax.checkpoints import exporting

    args.source, args.folder = args.target, args.source
    checkpoint, trained, _ = open_weights(args)
    differs = False
    for name, found in exporting.compare(args.folder, checkpoint, trained).items():
        converted = f", {found.converted} equal after conversion" if found.converted else ""
        print(f"{name}: {found.identical} tensors identical{converted}, {len(found.lines)} not")
        for line in found.lines:
            print(f"  {line}")
        differs = differs or bool(found.lines)
    return 1 if differs else 0


def open_weights(args):
    """`(imported checkpoint, trained arrays or None, a phrase that says which weights)`."""
    from twinflow_jax import checkpoints
    from twinflow_jax.checkpoints import imported

    if imported.is_imported(args.source):
        if args.raw or args.at_step is not None or args.pipeline:
            raise UserError(
                f"{args.source} is an imported checkpoint: --raw, --at-step and --pipeline are "
                "for runs"
            )
        return imported.open_imported(args.source), None, ""
    run, arrays, step = checkpoints.open_weights(args.source, args.raw, args.at_step)
    if run.adapter.rank:
        raise UserError(f"{args.source} trained adapters, which cannot be exported yet")
    base = args.pipeline or checkpoints.pipeline_of(args.source, run)
    which = "raw" if args.raw else "average"
    checkpoint = dataclasses.replace(
        imported.open_imported(base), time_conditioning=run.model.time_conditioning
    )
    return checkpoint, arrays, f", trained for {step} steps ({which} weights)"


if __name__ == "__main__":
    run_verb(main)
