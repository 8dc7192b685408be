"""Pictures and captions into training records: latents (or pixels) and embeddings of captions.

    python -m twinflow_jax.encode photos/ records/photos --pipeline checkpoints/sana06b --size 512
    python -m twinflow_jax.encode photos.jsonl records/photos --pipeline checkpoints/sana06b \\
        --buckets 1024
    python -m twinflow_jax.encode prompts.txt records/prompts --pipeline checkpoints/qwen_image
    python -m twinflow_jax.encode prompts.txt records/drawn --pipeline checkpoints/qwen_image \\
        --generate

With a checkpoint that edits pictures, SOURCE has instructions, sources and results: JSON lines or
a JSON list, .parquet files, or a folder with target/ and source/ in it.

Otherwise SOURCE is a folder of pictures with captions beside them (CAT.jpg and CAT.txt or
CAT.json), a file of JSON lines, .parquet or WebDataset .tar files or a folder of them, a TFDS
dataset (NAME:SPLIT or its folder), or a text file with one prompt a line. DST becomes a TFDS
dataset that training reads.
What cannot be used is left out and listed in DST/skipped.jsonl. Stopped at any point, the same
command goes on; with --process K --processes N several do it together. docs/data.md says more.
"""

import argparse

from etils import epath

from twinflow_jax import arguments, buckets, files, seeds
from twinflow_jax.errors import UserError, run_verb

RECORDS = 100_000  # in a file


def main() -> int:
    args = parse()
    check(args)
    try:
        return run(args)
    except OSError as error:
        raise UserError(
            f"{error.filename or args.target} cannot be read or written "
            f"({error.strerror or error}); the same command goes on"
        ) from error
    except KeyboardInterrupt as stop:
        raise type(stop)("the same command goes on") from None


def parse() -> argparse.Namespace:
    parser = arguments.parser("encode", __doc__)
    parser.add_argument("source", type=files.path, metavar="SOURCE")
    parser.add_argument("target", type=files.path, metavar="DST")
    parser.add_argument("--pipeline", type=files.path, required=True, help="an imported checkpoint")
    parser.add_argument("--size", type=arguments.size,
                        help="of all pictures, like 512 or 768x512 (width x height); default: what "
                        "the transformer was made for")
    parser.add_argument("--buckets", help="several sizes, like 1024x1024,1216x832, or 1024 for "
                        "some of that area; a picture goes to the nearest aspect ratio")
    parser.add_argument("--prompts-only", action="store_true", help="captions without pictures")
    parser.add_argument("--caption-column", help="of Parquet, JSON lines or TFDS that has the "
                        "captions (default: caption, text or the like)")
    parser.add_argument("--image-column",
                        help="that has the pictures (default: image, image_bytes or file_name)")
    parser.add_argument("--source-column", help="of edits: that has the pictures before them, one "
                        "or several (default: as in the known sets)")
    parser.add_argument("--min-side", type=arguments.whole,
                        help="pixels: smaller pictures are left out (default 64)")
    parser.add_argument("--text-tokens", type=arguments.whole,
                        help="that captions are padded or cut to (default: the family's lengths)")
    parser.add_argument("--shard-size", type=arguments.whole, default=1024,
                        help="records in a file")
    parser.add_argument("--batch", type=arguments.whole,
                        help="pictures of 512x512 encoded at once, of larger ones fewer; with "
                        "--generate, drawn at once")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="of the computation (default: bfloat16, float32 on a CPU)")
    parser.add_argument("--process", type=int, default=0, help="which one this is, from 0")
    parser.add_argument("--processes", type=arguments.whole, default=1, help="that share the work")
    group = parser.add_argument_group("pictures drawn by the base model")
    group.add_argument("--generate", action="store_true", help="from the source's captions")
    group.add_argument("--steps", type=arguments.whole,
                       help="of the base sampling (default: as usual)")
    group.add_argument("--guidance", type=arguments.finite, help="default: the model's own")
    group.add_argument("--count", type=arguments.whole,
                       help="pictures of each prompt (default 1)")
    group.add_argument("--seed", type=seeds.parse, help="of the noise (default 0)")
    group.add_argument("--pairs", action="store_const", const=True,
                       help="keep the noise beside each, for objectives that learn from pairs")
    return parser.parse_args()


def check(args) -> None:
    """Raises UserError for numbers that cannot be, and flags that exclude each other."""
    if args.shard_size * (args.count or 1) > RECORDS:
        raise UserError(f"--count {args.count} of each of --shard-size {args.shard_size} prompts "
                        f"are more than {RECORDS:,} records in a file: lower one")
    source, target = map(buckets.absolute, (args.source, args.target))
    if source.is_dir() and source in (target, *target.parents):
        raise UserError(f"{args.target} lies in {args.source}, all of which is read: choose a "
                        "folder beside it")
    if not 0 <= args.process < args.processes:
        raise UserError(f"--process is {args.process}; it lies from 0 to --processes less one")
    if args.size and args.buckets:
        raise UserError("give one of --size and --buckets")
    if args.prompts_only and (args.size or args.buckets or args.image_column):
        raise UserError("--prompts-only has no pictures: leave --size, --buckets and "
                        "--image-column out")
    if not args.generate:
        arguments.refuse(args, ("steps", "guidance", "count", "seed", "pairs"), "add --generate")
    if args.generate and (args.prompts_only or args.buckets or args.image_column):
        raise UserError("--generate draws pictures of one --size: leave --prompts-only, --buckets "
                        "and --image-column out")


def run(args) -> int:
    from twinflow_jax import encoding
    from twinflow_jax.drawing import codec, open_pipeline
    from twinflow_jax.encoding.workspace import SKIPPED, Workspace

    pipeline = open_pipeline(args.pipeline, dtype=args.dtype)
    if form := pipeline.family.editing:
        others = [n for n in ("prompts_only", "generate", "text_tokens") if getattr(args, n)]
        arguments.refuse(args, others, f"{args.pipeline} edits pictures, and learns from whole "
                         "instructions with the pictures before and after")
        columns = args.caption_column, args.source_column, args.image_column
        source = encoding.open_edits(args.source, args.shard_size, form.most, columns)
    else:
        arguments.refuse(args, ("source_column",), f"{args.pipeline} does not edit pictures")
        source = encoding.open_source(
            args.source, not args.prompts_only and not args.generate, args.shard_size,
            args.image_column, args.caption_column,
        )
    if not source.pictures:
        of_pictures = ("min_side",) if args.generate else ("size", "buckets", "min_side")
        arguments.refuse(args, of_pictures, f"of {args.source} no pictures are read")
    drawing = drawing_of(args, pipeline) if args.generate else None
    job = encoding.Job(
        pipeline, source, sizes_of(args, pipeline) if source.pictures or drawing else (),
        64 if args.min_side is None else args.min_side, args.shard_size, args.text_tokens,
        args.batch if drawing else args.batch or codec.BATCH, drawing,
    )
    space = Workspace(epath.Path(args.target), args.process, args.processes)
    report = encoding.encode(job, space)
    if report is None and space.finished:
        print(f"{args.target} is complete")
        return 0
    if report is None:
        print(f"process {args.process} is done; process 0 completes {args.target}")
        return 0
    for split, count in report["records"].items():
        print(f"{split:>12} {count:>9,} records")
    for reason, count in report["skipped"].items():
        print(f"{reason:>12} {count:>9,} left out")
    if report["skipped"]:
        print(f"what was left out: {epath.Path(args.target) / SKIPPED}")
    if report["cut"]:
        print(f"{report['cut']:,} captions are too long for the text encoder: their ends are cut")
    print(f"{args.source} is in {args.target}")
    return 0


def drawing_of(args, pipeline):
    """How the base model draws: as it usually does, where nothing else is asked for."""
    from twinflow_jax import encoding

    usual = *pipeline.checkpoint.base_sampling, 1, 0, False
    asked = args.steps, args.guidance, args.count, args.seed, args.pairs
    return encoding.Drawing(*(u if a is None else a for u, a in zip(usual, asked, strict=True)))


def sizes_of(args, pipeline) -> tuple[tuple[int, int], ...]:
    """The sizes that pictures go to.

    Raises:
      UserError: one that the networks cannot have.
    """
    from twinflow_jax.drawing import denoising
    from twinflow_jax.encoding import sizes

    scale = pipeline.config("vae").downscale
    if args.buckets:
        found = sizes.buckets(args.buckets, pipeline.config("transformer").patch * scale)
    elif args.size:
        found = (args.size,)
    else:
        height, width, _ = denoising.latent_shape(pipeline, None)
        found = ((width * scale, height * scale),)
    for width, height in found:
        denoising.latent_shape(pipeline, (height, width))
    return found


if __name__ == "__main__":
    run_verb(main)
