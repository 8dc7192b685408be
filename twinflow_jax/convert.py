"""Import published checkpoints, export trained ones, compare the two; adapters (LoRA) likewise.

    python -m twinflow_jax.convert import Qwen/Qwen-Image checkpoints/qwen_image
    python -m twinflow_jax.convert export runs/qwen exported/qwen --dtype bfloat16 --push you/qwen
    python -m twinflow_jax.convert verify Qwen/Qwen-Image checkpoints/qwen_image
    python -m twinflow_jax.convert adapter import fox.safetensors adapters/fox \\
        --base checkpoints/qwen_image
    python -m twinflow_jax.convert adapter export runs/lora exported/lora --format diffusers
    python -m twinflow_jax.convert adapter merge checkpoints/qwen_image adapters/fox:0.8 \\
        checkpoints/qwen_fox

SRC is a pipeline folder as diffusers writes it (transformer/, vae/, text_encoder/, tokenizer/),
the folder of one network, or a hub id that is in the local cache, perhaps with a folder of it:
inclusionAI/TwinFlow/FOLDER. Paths may be local or gs://. Files of adapters are those of diffusers,
ComfyUI, kohya, peft and the tools that write likewise (docs/adapters.md), told apart by their keys.
"""

import argparse
import pathlib

from etils import epath

from twinflow_jax import arguments, buckets, files, hub
from twinflow_jax.errors import UserError, run_verb

DTYPES = ("float32", "bfloat16")
SINGLE_DTYPES = (*DTYPES, "float8_e4m3fn")
FORMATS = ("diffusers", "comfyui", "kohya", "peft")  # of adapters: checkpoints.dialects.FORMATS


def main() -> int:
    args = parse()
    return {
        "import": run_import, "export": run_export, "verify": run_verify,
        "adapter import": run_adapter_import, "adapter export": run_adapter_export,
        "adapter merge": run_adapter_merge,
    }[args.verb](args)


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
        "--dtype", choices=SINGLE_DTYPES,
        help="of the transformer (default: as it was trained or published); float8_e4m3fn: of its "
        "large matrices, in a single file",
    )
    verb.add_argument("--single-file", action="store_true",
                      help="the transformer alone, DST being a file, as ComfyUI loads it")
    _push(verb)
    _weights(verb)
    verb = verbs.add_parser("verify", help="compare a published folder with a checkpoint")
    verb.add_argument("source", type=files.path, metavar="SRC")
    verb.add_argument("target", type=files.path, metavar="CHECKPOINT",
                      help="imported, or a run's --workdir")
    _weights(verb)
    _adapter(verbs.add_parser("adapter", help="files of adapters (LoRA)"))
    return parser.parse_args()


def _adapter(parser: argparse.ArgumentParser) -> None:
    parser = parser.add_subparsers(dest="adapter", required=True)
    verb = parser.add_parser("import", help="any tool's file into an adapter of ours")
    verb.set_defaults(verb="adapter import")
    verb.add_argument("source", type=files.path, metavar="SRC", help="a file, or its folder")
    verb.add_argument("target", type=files.path, metavar="DST")
    verb.add_argument("--base", type=files.path, required=True, metavar="CHECKPOINT",
                      help="the imported checkpoint that it is for")
    verb.add_argument("--alpha", type=arguments.finite,
                      help="of all modules (default: as the file says, or the rank)")
    verb = parser.add_parser("export", help="a run's adapters, or imported ones, into a folder")
    verb.set_defaults(verb="adapter export")
    verb.add_argument("source", type=files.path, metavar="SRC",
                      help="a run's --workdir, or an imported adapter")
    verb.add_argument("target", type=files.path, metavar="DST")
    verb.add_argument("--format", choices=FORMATS,
                      help="default: diffusers, of what was imported as it came")
    verb.add_argument("--dtype", choices=DTYPES, help="default: as it was trained or came")
    _push(verb)
    _of_run(verb)
    verb = parser.add_parser("merge", help="an adapter into the weights of its base")
    verb.set_defaults(verb="adapter merge")
    verb.add_argument("base", type=files.path, metavar="CHECKPOINT", help="imported")
    verb.add_argument("source", type=arguments.scaled, metavar="ADAPTER[:SCALE]",
                      help="a file of adapters, or an imported one")
    verb.add_argument("target", type=files.path, metavar="DST")


def _push(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--push", metavar="USER/NAME", default="",
                      help="send DST to a model repository of the hub, private if it is new")


def _weights(verb: argparse.ArgumentParser) -> None:
    _of_run(verb)
    verb.add_argument("--pipeline", type=files.path,
                      help="the imported checkpoint of a run (default: as it says)")


def _of_run(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--raw", action="store_true", help="a run's raw weights, not the average")
    verb.add_argument("--at-step", type=int, help="a run's checkpoint (default: the newest)")


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
    from twinflow_jax.checkpoints import card, exporting

    if args.dtype not in (None, *DTYPES) and not args.single_file:
        raise UserError(f"--dtype {args.dtype} is for --single-file: no folder has it")
    checkpoint, arrays, trained = open_weights(args)
    repository = open_hub(args)
    if args.single_file:
        exporting.export_single(checkpoint, args.target, args.dtype, arrays)
    else:
        beside = card.make(epath.Path(args.target).name, checkpoint, trained)
        exporting.export_folder(checkpoint, args.target, args.dtype, arrays, beside)
    print(f"{args.source} is in {args.target}")
    push(repository, args.target)
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


def run_adapter_import(args) -> int:
    from twinflow_jax.checkpoints import adapter_files, imported

    base = imported.open_imported(args.base)
    adapter = adapter_files.import_adapter(args.source, base, args.target, args.alpha)
    for note in adapter.file.notes:
        print(note)
    ranks = sorted({low.shape[0] for low in adapter.file.low.values()})
    print(f"{len(adapter.file.low)} modules of rank {', '.join(map(str, ranks))}")
    print(f"{args.source} is in {args.target}")
    return 0


def run_adapter_export(args) -> int:
    from twinflow_jax import checkpoints
    from twinflow_jax.checkpoints import adapter_export, adapter_files

    repository = open_hub(args)
    if adapter_files.is_imported(args.source):
        if args.raw or args.at_step is not None:
            raise UserError(f"{args.source} is an imported adapter: --raw, --at-step are for runs")
        if args.dtype and not args.format:
            raise UserError("--dtype needs --format: without, what was imported stays as it came")
        file = adapter_export.export_imported(args.source, args.target, args.format, args.dtype)
    else:
        run, arrays, step = checkpoints.open_weights(args.source, args.raw, args.at_step)
        if not run.adapter.rank:
            raise UserError(f"{args.source} trained no adapters: use convert export")
        file = adapter_export.export_trained(
            run, arrays, checkpoints.base_of(run), step, args.target, args.format or FORMATS[0],
            args.dtype,
        )
    print(f"{args.source} is in {file}")
    push(repository, args.target)
    return 0


def run_adapter_merge(args) -> int:
    from twinflow_jax.checkpoints import adapter_export, adapter_files, imported

    checkpoint, (source, factor) = imported.open_imported(args.base), args.source
    adapter = adapter_files.open_for(checkpoint, source)
    for note in adapter.file.notes:
        print(note)
    error = adapter_export.merge(checkpoint, adapter, factor, args.target)
    print(f"{args.base} with {source} is in {args.target}")
    print(f"rounding to the weights' dtype cost {error:.1%} of what the adapter adds; kept apart "
          "(sample --adapter) it costs nothing")
    return 0


def open_weights(args):
    """`(imported checkpoint, trained arrays or None, card.Trained or None)`."""
    from twinflow_jax import checkpoints
    from twinflow_jax.checkpoints import card, imported

    if imported.is_imported(args.source):
        if args.raw or args.at_step is not None or args.pipeline:
            raise UserError(
                f"{args.source} is an imported checkpoint: --raw, --at-step and --pipeline are "
                "for runs"
            )
        return imported.open_imported(args.source), None, None
    run, arrays, step = checkpoints.open_weights(args.source, args.raw, args.at_step)
    if run.adapter.rank:
        raise UserError(
            f"{args.source} trained adapters: convert adapter export writes them, and convert "
            "adapter merge puts what it wrote into their base"
        )
    base = args.pipeline or checkpoints.pipeline_of(args.source, run)
    checkpoint = imported.open_imported(base)
    if "transformer" in checkpoint.parts:
        checkpoint = checkpoint.knowing_r(run.model)
    return checkpoint, arrays, card.Trained(args.source, run, step, args.raw)


def open_hub(args) -> hub.Repository | None:
    """The repository of --push, before there is something to push.

    Raises:
      UserError: it is no name, the hub does not make it, it holds a run, or DST is in a bucket.
    """
    if not args.push:
        return None
    hub.check_name("--push", args.push)
    if buckets.is_remote(args.target):
        raise UserError(f"--push sends files of a disk, and {args.target} is in a bucket")
    repository = hub.Repository(args.push)
    repository.open()
    if any(name.startswith("checkpoints/") for name in repository.look()[1]):
        raise UserError(f"hub {args.push} holds a run: choose another --push")
    return repository


def push(repository: hub.Repository | None, target: str) -> None:
    """Sends what was exported to a repository, in one commit.

    Raises:
      UserError: the hub does not take it.
    """
    if repository is None:
        return
    path = pathlib.Path(target)
    found = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    root = path if path.is_dir() else path.parent
    added = {file.relative_to(root).as_posix(): file for file in found}
    try:
        repository.commit(repository.look()[0], added, f"export of {path.name}")
    except hub.Refused as error:
        raise UserError(
            f"{target} is written, but not pushed: {error}; `hf upload {repository.name} {target}` "
            "sends it"
        ) from error
    print(f"{target} is in hub {repository.name}")


if __name__ == "__main__":
    run_verb(main)
