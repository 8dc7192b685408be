"""Draw samples with trained weights, by class, from prompts, or from pictures to edit.

    python -m twinflow_jax.sample --checkpoint runs/mnist --out samples
    python -m twinflow_jax.sample --checkpoint checkpoints/qwen_image --out samples \\
        --prompt "a fox in the snow" --steps 2
    python -m twinflow_jax.sample --checkpoint checkpoints/qwen_image_edit --out edited \\
        --image in.png --prompt "make it night" --steps 4

The checkpoint is a training run's --workdir, or an imported one (twinflow convert). Writes one PNG
per sample as soon as it is drawn, or one labelled sheet with --sheet. The settings are in each
PNG's text chunks, and a digest of them in its name: pictures of others lie beside, and those that
are there already are not drawn again. The same seed gives the same picture, whatever else is drawn
with it.
"""

import argparse

from twinflow_jax import arguments, files, seeds
from twinflow_jax.errors import run_verb

CLASS_ONLY = ("classes", "pairs")
EDIT_ONLY = ("image", "edits", "model_size")
TEXT_ONLY = (
    "prompt", "prompts", "embeddings", "save_embeddings", "save_latents", "size", "batch", "base",
    "guidance", "negative", "dtype", "tile", "pipeline", "adapter",
)


def main() -> int:
    args = parse()
    from twinflow_jax.checkpoints import imported
    from twinflow_jax.drawing import by_class, by_edit, by_prompt, pipeline

    folder, run = args.checkpoint, pipeline.run_of(args.checkpoint)
    family = run.family.text_to_image if run else imported.open_imported(folder).text_to_image
    files.check_folder("--out", args.out)
    arguments.writable("--save-embeddings", args.save_embeddings)
    arguments.writable("--save-latents", args.save_latents)
    with files.writing("--out", args.out):
        if family and family.editing:
            arguments.refuse(args, CLASS_ONLY, f"{folder} edits pictures")
            return by_edit.sample(args, run)
        if family:
            arguments.refuse(args, CLASS_ONLY + EDIT_ONLY, f"{folder} draws from prompts alone")
            return by_prompt.sample(args, run)
        arguments.refuse(args, TEXT_ONLY + EDIT_ONLY, f"{folder} draws by class")
        return by_class.sample(args)


def parse() -> argparse.Namespace:
    parser = arguments.parser("sample", __doc__)
    parser.add_argument("--checkpoint", type=files.path, required=True,
                        help="a run's --workdir, or imported")
    parser.add_argument("--out", type=files.path, required=True, help="folder for the pictures")
    parser.add_argument("--steps", type=int, help="of the sampler (default 1, --base: as usual)")
    parser.add_argument("--count", type=arguments.whole,
                        help="samples per class (8) or per prompt (1)")
    parser.add_argument("--seed", type=seeds.parse, default=0)
    parser.add_argument("--sheet", action="store_true", help="one labelled sheet instead of files")
    parser.add_argument("--raw", action="store_true", help="raw weights instead of the average")
    parser.add_argument("--at-step", type=int, help="checkpoint to read (default: the newest)")
    group = parser.add_argument_group("by class")
    group.add_argument("--classes", help="comma-separated classes (default: all)")
    group.add_argument("--pairs", action="store_const", const=True,
                       help="one file of the samples and their noise instead, for data.pairs")
    group = parser.add_argument_group("from prompts")
    group.add_argument("--prompt", action="append", help="what to draw; may be given again")
    group.add_argument("--prompts", type=files.path, help="a file with one prompt a line")
    group.add_argument("--embeddings", type=files.path,
                       help="encoded prompts, from --save-embeddings")
    group.add_argument("--save-embeddings", type=files.path,
                       help="write the encoded prompts to this file")
    group.add_argument("--save-latents", type=files.path,
                       help="write the samples before decoding to this file")
    arguments.add_pipeline(group)
    group = parser.add_argument_group("edits")
    group.add_argument("--image", action="append", type=files.path,
                       help="a picture that --prompt says what to do with; may be given again")
    group.add_argument("--edits", type=files.path, metavar="FILE.jsonl",
                       help='lines like {"images": ["in.png"], "prompt": "make it night"}')
    group.add_argument("--model-size", action="store_const", const=True,
                       help="leave pictures as large as the network draws them (default: the "
                       "edited picture's own size)")
    arguments.add_sampler(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_verb(main)
