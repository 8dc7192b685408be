"""Draw samples with trained weights, by class or from prompts.

    python -m twinflow_jax.sample --checkpoint runs/mnist --out samples
    python -m twinflow_jax.sample --checkpoint checkpoints/qwen_image --out samples \\
        --prompt "a fox in the snow" --steps 2

The checkpoint is a training run's --workdir, or an imported one (tools/convert.py). Writes one PNG
per sample, or one labelled sheet with --sheet. The settings are in each PNG's text chunks; the same
seed gives the same picture, whatever else is drawn with it.
"""

import argparse
import contextlib
import json
import math
import re
import warnings
from collections.abc import Callable

import numpy as np
from etils import epath
from PIL import Image

from twinflow_jax import checkpoints, files, images, models, seeds, text_to_image
from twinflow_jax.checkpoints import imported, tensors
from twinflow_jax.errors import Parser, UserError, run_verb
from twinflow_jax.sampling import arguments, generate
from twinflow_jax.text_to_image import Embeddings


def main() -> int:
    args = parse()
    folder = epath.Path(args.checkpoint)
    if not imported.is_imported(folder) and not (folder / "config.json").exists():
        raise UserError(
            f"{folder} is no run and no imported checkpoint: give the --workdir of training, or "
            "what `tools/convert.py import` wrote"
        )
    run = None if imported.is_imported(folder) else checkpoints.read_config(folder)
    if run is None or models.settings_of(run.model)[0].text_to_image:
        arguments.refuse(args, CLASS_ONLY, f"{folder} draws from prompts")
        draw = draw_prompts
    else:
        arguments.refuse(args, TEXT_ONLY, f"{folder} draws by class")
        draw = draw_classes
    if epath.Path(args.out).exists() and not epath.Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a file: choose a folder")
    try:
        return draw(args, run)
    except OSError as error:
        raise UserError(f"cannot write to {args.out}: {error.strerror or error}") from error


CLASS_ONLY = ("classes",)
TEXT_ONLY = (
    "prompt", "prompts", "embeddings", "save_embeddings", "save_latents", "size", "batch", "base",
    "guidance", "negative", "dtype", "tile", "pipeline",
)
BASE_ONLY = ("guidance", "negative")


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m twinflow_jax.sample", description=__doc__)
    parser.add_argument("--checkpoint", type=files.path, required=True,
                        help="a run's --workdir, or imported")
    parser.add_argument("--out", type=files.path, required=True, help="folder for the pictures")
    parser.add_argument("--steps", type=int, help="of the sampler (default 1, --base: as usual)")
    parser.add_argument("--count", type=int, help="samples per class (8) or per prompt (1)")
    parser.add_argument("--seed", type=seeds.parse, default=0)
    parser.add_argument("--sheet", action="store_true", help="one labelled sheet instead of files")
    parser.add_argument("--raw", action="store_true", help="raw weights instead of the average")
    parser.add_argument("--at-step", type=int, help="checkpoint to read (default: the newest)")
    group = parser.add_argument_group("by class")
    group.add_argument("--classes", help="comma-separated classes (default: all)")
    group = parser.add_argument_group("from prompts")
    group.add_argument("--prompt", action="append", help="what to draw; may be given again")
    group.add_argument("--prompts", type=files.path, help="a file with one prompt a line")
    group.add_argument("--embeddings", type=files.path,
                       help="encoded prompts, from --save-embeddings")
    group.add_argument("--save-embeddings", type=files.path,
                       help="write the encoded prompts to this file")
    group.add_argument("--save-latents", type=files.path,
                       help="write the samples before decoding to this file")
    group.add_argument("--size", help="pixels, like 1024 or 1328x800 (width x height)")
    group.add_argument("--batch", type=int,
                       help="pictures denoised at once (default: the least that uses all devices)")
    group.add_argument(
        "--base", action="store_const", const=True,
        help="the base model's own sampling: many steps, its time grid and guidance",
    )
    group.add_argument("--guidance", type=float,
                       help="of --base; 1 is none (default: the model's own)")
    group.add_argument("--negative", help="negative prompt of --base (default: the model's own)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"),
                       help="of the computation (default: bfloat16, float32 on a CPU)")
    group.add_argument("--tile", type=int, help="decode larger pictures in tiles of these pixels")
    group.add_argument("--pipeline", type=files.path,
                       help="the imported checkpoint of a run (default: as it says)")
    arguments.add(parser)
    return parser.parse_args()


def draw_classes(args, run) -> int:
    """Samples of a class-conditional run."""
    grid = arguments.grid(args, 1 if args.steps is None else args.steps)
    count = 8 if args.count is None else args.count
    if count < 1:
        raise UserError(f"--count is {count}; draw at least one sample per class")
    config, model, params, step = checkpoints.load_weights(args.checkpoint, args.raw, args.at_step)
    classes = parse_classes(args.classes, config.model.num_classes)
    labels = np.repeat(classes, count)
    x = generate(model, params, labels, grid, args.seed)

    text = describe(args, at_step=step, raw=args.raw, **grid_settings(grid))
    weights = f"step{step}{'_raw' if args.raw else ''}"
    run = epath.Path(args.checkpoint).name[:80]
    name = f"{run}_{weights}_{grid.style}{grid.nfe}nfe_seed{args.seed}"
    out = epath.Path(args.out)
    if args.sheet:
        file = out / f"sheet_{name}.png"
        picture = images.sheet({f"{grid.nfe} NFE": x}, count, f"step {step}")
        images.save(file, picture, text | {"classes": json.dumps(classes.tolist())})
        print(f"{len(x)} samples in {file}")
        return 0
    for i, label in enumerate(labels):
        file = out / f"class{label}_{i % count:04d}_{name}.png"
        pixels = Image.fromarray(images.to_uint8(x[i]))
        images.save(file, pixels, text | {"class": str(label)})
    print(f"{len(x)} pictures in {out}")
    return 0


def draw_prompts(args, run) -> int:
    """Pictures of prompts, by an imported checkpoint or by a run's transformer within one."""
    count = 1 if args.count is None else args.count
    if count < 1:
        raise UserError(f"--count is {count}; draw at least one picture per prompt")
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch is {args.batch}; denoise at least one picture at once")
    pipeline = text_to_image.open_pipeline(
        args.checkpoint, run, args.dtype, args.raw, args.at_step, args.pipeline
    )
    shape = pipeline.latent_shape(parse_size(args.size))
    tile = pipeline.tile_of(args.tile)
    choose = choose_base if args.base else choose_few
    draw, settings, label = choose(args, pipeline, shape)
    if not args.base and not pipeline.knows_r:
        warnings.warn(
            f"{args.checkpoint} is a base model, not trained to draw in a few steps: try --base",
            stacklevel=2,
        )
    prompts, embeddings, null = read_prompts(args, pipeline, settings.get("negative"))
    if args.save_embeddings:
        with writing("--save-embeddings", args.save_embeddings):
            embeddings.save(args.save_embeddings, prompts)
    owners, numbers = np.divmod(np.arange(len(prompts) * count), count)
    latents = pipeline.denoise(
        draw, embeddings, owners, numbers, shape, args.seed, args.batch, null
    )
    if args.save_latents:
        with writing("--save-latents", args.save_latents):
            tensors.save(epath.Path(args.save_latents), {"latents": latents})
    pictures = pipeline.decode(latents, tile)

    text = describe(args, raw=args.raw, dtype=pipeline.dtype, **settings)
    out = epath.Path(args.out)
    if args.sheet:
        file = out / f"sheet_{label}_seed{args.seed}.png"
        picture = images.sheet({label: np.stack(pictures)}, count)
        images.save(file, picture, text | {"prompts": json.dumps(prompts)})
        print(f"{len(pictures)} samples in {file}")
    else:
        for i, number, x in zip(owners, numbers, pictures, strict=True):
            name = re.sub(r"\W+", "_", prompts[i]).strip("_")[:40] or "prompt"
            file = out / f"{i:04d}_{name}_{number:02d}_{label}_seed{args.seed}.png"
            pixels = Image.fromarray(images.to_uint8(x))
            images.save(file, pixels, text | {"prompt": prompts[i], "number": str(number)})
        print(f"{len(pictures)} pictures in {out}" if len(pictures) > 1 else f"picture in {file}")
    for line in pipeline.clock.lines():
        print(line)
    return 0


def choose_few(args, pipeline, shape) -> tuple[Callable, dict, str]:
    """How to draw in a few steps: `(draw, settings, a label for file names)`."""
    arguments.refuse(args, BASE_ONLY, "a few steps take no guidance, --base does")
    grid = arguments.grid(args, 1 if args.steps is None else args.steps)
    return pipeline.few_step(grid), grid_settings(grid), f"{grid.style}{grid.nfe}nfe"


def choose_base(args, pipeline, shape) -> tuple[Callable, dict, str]:
    """How to draw as the base model does: `(draw, settings, a label for file names)`."""
    arguments.refuse(args, arguments.NAMES, "--base has its own time grid")
    steps = pipeline.family.base_steps if args.steps is None else args.steps
    guidance = pipeline.family.base_guidance if args.guidance is None else args.guidance
    if not math.isfinite(guidance):
        raise UserError(f"--guidance is {guidance}; give a number, 1 for none")
    schedule = pipeline.schedule(steps, shape)
    settings = {"base": True, "nfe": steps, "times": schedule.times, "guidance": guidance}
    if guidance == 1:
        arguments.refuse(args, ("negative",), "guidance 1 takes no negative prompt")
    else:
        given = args.negative
        negative = pipeline.family.negative_prompt if given is None else given
        settings |= {"nfe": 2 * steps, "negative": negative}
    return pipeline.base(schedule, guidance), settings, f"base{steps}steps"


def describe(args, **settings) -> dict[str, str]:
    """A PNG's text chunks: what it was made with."""
    record = {"checkpoint": args.checkpoint, "seed": args.seed} | settings
    return {"Software": "twinflow_jax", "twinflow": json.dumps(record)}


def grid_settings(grid) -> dict:
    return {
        "nfe": grid.nfe, "style": grid.style, "times": grid.times, "stochastic": grid.stochastic,
        "extrapolation": grid.extrapolation, "order": grid.order,
    }


def read_prompts(
    args, pipeline, negative: str | None
) -> tuple[list[str], Embeddings, Embeddings | None]:
    """The prompts and their embeddings, from the one source that was given.

    Last the negative prompt's embedding, of the same length, where there is such a prompt.
    """
    given = [name for name in ("prompt", "prompts", "embeddings") if getattr(args, name)]
    if len(given) != 1:
        raise UserError("give one of --prompt, --prompts and --embeddings")
    if args.embeddings:
        width = pipeline.config("transformer").text_width
        prompts, embeddings = Embeddings.read(args.embeddings, width)
        if negative is None:
            return prompts, embeddings, None
        null = pipeline.embed([], negative=negative)
        return prompts, *text_to_image.same_length(embeddings, null)
    prompts = read_lines(args.prompts) if args.prompts else args.prompt
    embeddings = pipeline.embed(prompts, negative=negative)
    count = len(prompts)
    return prompts, embeddings[:count], embeddings[count:] if negative is not None else None


def read_lines(file: str) -> list[str]:
    """The prompts in a file."""
    try:
        lines = epath.Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--prompts {file} cannot be read ({reason})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts {file} is empty: write one prompt a line")
    return prompts


@contextlib.contextmanager
def writing(flag: str, file: str):
    """Reports what goes wrong with the file of an argument."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag} {file} cannot be written: {error.strerror or error}") from error


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`(height, width)` of "1024" or "1328x800" (width x height)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise UserError(f"--size is {text!r}; give pixels like 1024 or 1328x800 (width x height)")
    width = int(match[1])
    return int(match[2] or width), width


def parse_classes(text: str | None, num_classes: int) -> np.ndarray:
    """The classes that `--classes` names; class 0 stands in for a network without classes."""
    if num_classes == 0:
        return np.zeros(1, np.int32)
    if text is None:
        return np.arange(num_classes, dtype=np.int32)
    try:
        numbers = dict.fromkeys(int(part) for part in text.split(","))  # each once
        classes = np.asarray(list(numbers), np.int32)
    except ValueError as error:
        raise UserError(f"--classes is {text!r}; give numbers like 3,1,4") from error
    if classes.min() < 0 or classes.max() >= num_classes:
        raise UserError(f"--classes {text}: this network has classes 0 to {num_classes - 1}")
    return classes


if __name__ == "__main__":
    run_verb(main)
