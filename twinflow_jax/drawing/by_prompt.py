"""The verb `sample` for imported checkpoints and text-to-image runs."""

import argparse
import dataclasses
import json
import re
import warnings
from typing import Any

import numpy as np
from etils import epath

from twinflow_jax import arguments, files, images
from twinflow_jax.checkpoints import store, tensors
from twinflow_jax.config import Run
from twinflow_jax.drawing import album, codec, denoising, pictures, text
from twinflow_jax.drawing.conditions import Embeddings, same_length
from twinflow_jax.drawing.pipeline import Pipeline, open_pipeline
from twinflow_jax.errors import UserError
from twinflow_jax.sampling import Grid, few_step

BASE_ONLY = ("guidance", "negative")


@dataclasses.dataclass(frozen=True)
class Way:
    """How to draw. settings: what pictures say of it; label: of file names."""

    sampler: denoising.Sampler
    settings: dict[str, Any]
    label: str


def sample(args: argparse.Namespace, run: Run | None) -> int:
    """Draws what the verb's arguments ask for; returns the exit status.

    run: the run whose transformer draws, where the checkpoint is one.
    """
    count = 1 if args.count is None else args.count
    pipeline, shape, tile, way = prepared(args, run)
    prompts, cond = read_prompts(args, pipeline)
    height, width = (side * pipeline.config("vae").downscale for side in shape[:2])
    album.check(len(prompts) * count, height, width, args.sheet)
    cond, null = embedded(pipeline, prompts, cond, way.settings.get("negative"))
    if args.save_embeddings:
        with files.writing("--save-embeddings", args.save_embeddings):
            cond.save(args.save_embeddings, prompts)
    conditions = [cond.fingerprint(i) for i in range(len(prompts))]
    owners, numbers = np.divmod(np.arange(len(prompts) * count), count)
    told = settings(
        args, pipeline, shape, tile, way, networks(pipeline),
        without=null.fingerprint(0) if null else None,
    )
    out, latents = epath.Path(args.out), []
    pages = [
        album.Page(
            f"{i:04d}_{plain(prompts[i])}_{number:02d}_{way.label}_seed{args.seed}",
            told | {"prompt": prompts[i], "number": str(number), "condition": conditions[i]},
        )
        for i, number in zip(owners, numbers, strict=True)
    ]
    everything = args.sheet or args.save_latents
    left = list(range(len(pages))) if everything else album.missing(out, pages)
    drawn = pictures(
        pipeline, way.sampler, cond, owners[left], numbers[left], shape, args.seed, args.batch,
        null, tile, latents.append if args.save_latents else None, keep=not args.sheet,
    )
    if args.sheet:
        page = album.Page(f"sheet_{way.label}_seed{args.seed}", told | {
            "prompts": json.dumps(prompts), "count": str(count),
            "conditions": json.dumps(conditions),
        })
        sheet = images.sheet({way.label: np.stack(list(drawn))}, count)
        images.save(out / page.name, sheet, page.text)
        print(f"{len(pages)} samples in {out / page.name}")
    else:
        album.write(out, [pages[i] for i in left], drawn)
        print(album.summary(out, pages, left))
    if args.save_latents:
        with files.writing("--save-latents", args.save_latents):
            tensors.save(epath.Path(args.save_latents), {"latents": np.concatenate(latents)})
    for line in pipeline.clock.lines():
        print(line)
    return 0


def networks(pipeline: Pipeline) -> dict[str, str]:
    """Which weights draw."""
    return {
        "weights": store.fingerprint(pipeline.arrays("transformer")),
        "autoencoder": pipeline.checkpoint.identity("vae"),
    }


def settings(
    args: argparse.Namespace, pipeline: Pipeline, shape: tuple[int, int, int], tile: int, way: Way,
    drawn_by: dict[str, str], **more,
) -> dict[str, str]:
    """What pictures say of how they were made."""
    return album.settings(
        checkpoint=args.checkpoint, seed=args.seed, raw=args.raw, dtype=pipeline.dtype,
        at_step=pipeline.step, size=shape, **drawn_by, tile=tile, **more, **way.settings,
        **({"adapters": args.adapter} if args.adapter else {}),  # what their weights say besides
    )


def prepared(
    args: argparse.Namespace, run: Run | None
) -> tuple[Pipeline, tuple[int, int, int], int, Way]:
    """What draws, of the arguments of `arguments.add_pipeline` and `add_sampler`: the networks, the
    latents' shape, the side of decoding's tiles, and how."""
    pipeline = pipeline_of(args, run)
    shape = denoising.latent_shape(pipeline, args.size and args.size[::-1])
    return pipeline, shape, codec.tile_of(pipeline, args.tile), asked(args, pipeline, shape)


def pipeline_of(args: argparse.Namespace, run: Run | None) -> Pipeline:
    """The networks that the arguments of `arguments.add_pipeline` name."""
    return open_pipeline(
        args.checkpoint, run, args.dtype, args.raw, args.at_step, args.pipeline, args.adapter or ()
    )


def asked(args: argparse.Namespace, pipeline: Pipeline, shape: tuple[int, int, int]) -> Way:
    """The way that the verb's arguments ask for; warns where the network was not trained for it."""
    if args.base:
        arguments.refuse(args, arguments.SAMPLER, "--base has its own time grid")
        return base(pipeline, shape, args.steps, args.guidance, args.negative)
    arguments.refuse(args, BASE_ONLY, "a few steps take no guidance, --base does")
    if not pipeline.knows_r:
        warnings.warn(
            f"{args.checkpoint} is a base model, not trained to draw in a few steps: try --base",
            stacklevel=3,
        )
    return few(few_step(1 if args.steps is None else args.steps, **arguments.sampler(args)))


def few(grid: Grid) -> Way:
    """In a few steps, or along any other grid."""
    return Way(denoising.FewStep(grid), grid.told(), f"{grid.style}{grid.nfe}nfe")


def base(
    pipeline: Pipeline, shape: tuple[int, int, int], steps: int | None = None,
    guidance: float | None = None, negative: str | None = None,
) -> Way:
    """As the base model does, with its own values of what is None.

    Raises:
      UserError: a negative prompt without guidance, or as `denoising.schedule`.
    """
    family, (own_steps, own_guidance) = pipeline.family, pipeline.checkpoint.base_sampling
    steps = own_steps if steps is None else steps
    guidance = own_guidance if guidance is None else guidance
    schedule = denoising.schedule(pipeline, steps, shape)
    settings = {"base": True, "nfe": steps, "times": schedule.times, "guidance": guidance}
    if guidance != family.no_guidance:
        negative = family.negative_prompt if negative is None else negative
        settings |= {"nfe": 2 * steps, "negative": negative}
    elif negative is not None:
        raise UserError(
            f"--negative cannot be used: guidance {guidance:g} takes no negative prompt"
        )
    return Way(denoising.base(pipeline, schedule, guidance), settings, f"base{steps}steps")


def plain(prompt: str) -> str:
    """What a file's name says of a prompt."""
    return re.sub(r"\W+", "_", prompt).strip("_")[:40] or "prompt"


def read_prompts(
    args: argparse.Namespace, pipeline: Pipeline
) -> tuple[list[str], Embeddings | None]:
    """The prompts, and their embeddings where the one source that was given has them."""
    given = [name for name in ("prompt", "prompts", "embeddings") if getattr(args, name)]
    if len(given) != 1:
        raise UserError("give one of --prompt, --prompts and --embeddings")
    if args.embeddings:
        width = pipeline.config("transformer").text_width
        return Embeddings.read(args.embeddings, width)
    return (read_lines(args.prompts) if args.prompts else args.prompt), None


def embedded(
    pipeline: Pipeline, prompts: list[str], found: Embeddings | None, negative: str | None
) -> tuple[Embeddings, Embeddings | None]:
    """Prompts' embeddings, made where they are not found, and the negative prompt's, of the same
    length, where there is one."""
    if found is None:
        made, count = text.embed(pipeline, prompts, negative=negative), len(prompts)
        return made[:count], made[count:] if negative is not None else None
    if negative is None:
        return found, None
    return tuple(same_length(found, text.embed(pipeline, [], negative=negative)))


def read_lines(file: str) -> list[str]:
    """The prompts in a file."""
    try:
        prompts = [line for _, line in files.text_lines(epath.Path(file).read_bytes())]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--prompts {file} cannot be read ({reason})") from error
    if not prompts:
        raise UserError(f"--prompts {file} is empty: write one prompt a line")
    return prompts
