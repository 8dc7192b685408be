"""The verbs of `evaluate suite`, and `evaluate diversity`; each returns the exit status."""

import argparse
import dataclasses
import functools
import importlib.metadata
import shlex
from typing import Any

import jax
import numpy as np
from etils import epath

from twinflow_jax import buckets, files, models, parallel
from twinflow_jax.drawing import by_prompt, codec, denoising, editing
from twinflow_jax.drawing.pipeline import run_of
from twinflow_jax.errors import UserError
from twinflow_jax.evaluation import suites
from twinflow_jax.evaluation.diversity import measure
from twinflow_jax.evaluation.speed import device
from twinflow_jax.evaluation.suites import draw as drawing
from twinflow_jax.evaluation.suites import gallery, results, sources
from twinflow_jax.evaluation.suites import table as tables
from twinflow_jax.evaluation.suites.gallery import Gallery
from twinflow_jax.evaluation.suites.suite import Prompts, Suite
from twinflow_jax.models.family import Editing
from twinflow_jax.parallel import hosts


def draw(args: argparse.Namespace) -> int:
    """Draws this process's share; process 0 then checks everything."""
    suite = suites.named(args.suite)
    prompts = suites.open_prompts(
        suite, args.prompts, args.unpublished, args.rewritten, args.images
    )
    if not args.coordinator and not 0 <= args.process < args.processes:
        raise UserError(f"--process is {args.process}; it lies from 0 to --processes less one")
    files.check_folder("--out", args.out)
    if args.coordinator:
        hosts.join(args.coordinator, args.processes, args.process)
        args.process, args.processes = jax.process_index(), jax.process_count()
    with hosts.together():
        return drawn(args, suite, prompts)


def drawn(args: argparse.Namespace, suite: Suite, prompts: Prompts) -> int:
    """Draws, as a process that knows its number."""
    job, about = job_of(args, suite, prompts)
    place = Gallery(buckets.absolute(args.out), args.process, args.processes)
    try:
        with files.writing("--out", args.out):
            complete = drawing.draw(job, place, about, bool(args.coordinator))
    except KeyboardInterrupt as stop:
        raise type(stop)("the same command goes on") from None
    if not complete:
        print(f"process {args.process} is done; process 0 checks {args.out}")
        return 0
    return checked(place, suite, prompts, gallery.manifest_of(place.folder), args)


def job_of(
    args: argparse.Namespace, suite: Suite, prompts: Prompts
) -> tuple[drawing.Job, dict[str, Any]]:
    """What to draw, and what the manifest says besides."""
    run = run_of(args.checkpoint)
    if run is not None and run.family.text_to_image is None:
        raise UserError(f"{args.checkpoint} draws by class: suites are of prompts")
    pipeline = by_prompt.pipeline_of(args, run)
    form, found, area = pipeline.family.editing, None, None
    check_family(suite, args.checkpoint, form)
    if form:
        area = editing.area_of(pipeline)
        sizes, found = sources.seen(form, prompts, area)
        size = args.size
    else:
        shape = denoising.latent_shape(pipeline, args.size and args.size[::-1])
        height, width = (side * pipeline.config("vae").downscale for side in shape[:2])
        size, sizes = (width, height), [(width, height)] * len(prompts.items)
        suite.check_size(size)
    pipeline = dataclasses.replace(pipeline, progress=False)  # all processes' is said
    ways = {
        one: by_prompt.asked(args, pipeline, denoising.latent_shape(pipeline, one[::-1]))
        for one in dict.fromkeys([size] if size else sizes)
    }
    job = drawing.Job(
        pipeline, suite, prompts, size, sizes, ways, args.seed,
        args.batch or parallel.row_parts(pipeline.mesh()), codec.tile_of(pipeline, args.tile),
        found,
    )
    arrays = pipeline.arrays("transformer")
    return job, {
        "checkpoint": args.checkpoint, "prompts_path": str(buckets.absolute(args.prompts)),
        "images_path": str(buckets.absolute(args.images)) if args.images else None, "area": area,
        "published": prompts.published, "family": pipeline.checkpoint.family,
        "parameters": sum(int(np.prod(array.shape)) for array in arrays.values()),
        "adapters": bool(pipeline.ranks), "device": device(),
        "version": importlib.metadata.version("twinflow-jax"),
    }


def check_family(suite: Suite, checkpoint: str, form: Editing | None) -> None:
    """Raises UserError where a network edits pictures and the suite does not, or the reverse. form:
    of the network's family."""
    if suite.edits and not form:
        raise UserError(f"{checkpoint} does not edit pictures, as {suite.name} asks for: give a "
                        "checkpoint of Qwen-Image-Edit, or another suite")
    if form and not suite.edits:
        choices = ", ".join(name for name, one in suites.SUITES.items() if one.edits)
        raise UserError(f"{checkpoint} edits pictures, and the prompts of {suite.name} are about "
                        f"none: choose from {choices}")


def opened(args: argparse.Namespace) -> tuple[epath.Path, dict[str, Any], Suite, Prompts]:
    """A drawn folder, its manifest, and the suite and prompts that it is of."""
    folder = buckets.absolute(args.folder)
    manifest = gallery.manifest_of(folder)
    suite = suites.named(manifest["suite"])
    images = getattr(args, "images", None)
    return folder, manifest, suite, gallery.prompts_of(suite, manifest, args.prompts, images)


def check(args: argparse.Namespace) -> int:
    """Looks at every file."""
    folder, manifest, suite, prompts = opened(args)
    return checked(Gallery(folder, 0, 1), suite, prompts, manifest, args)


def checked(
    place: Gallery, suite: Suite, prompts: Prompts, manifest: dict[str, Any],
    args: argparse.Namespace,
) -> int:
    """Says what is wrong with the files, or what scores them.

    Raises:
      UserError: something is wrong.
    """
    size, before = manifest["size"], None
    sizes = [size] * len(prompts.items)
    if suite.edits:
        form = models.FAMILIES[manifest["family"]].text_to_image.editing
        own, digest = sources.seen(form, prompts, manifest["area"])
        if digest != manifest["sources"]:
            raise UserError(f"the pictures that {suite.name} edits are not those that were: give "
                            "those with --prompts or --images")
        sizes, before = sizes if size else own, functools.partial(sources.picture, form, prompts)
    found = gallery.check(place, suite, prompts.items, sizes, before)
    for kind, names in found.problems.items():
        for name in names:
            print(f"{kind}: {name}")
    if found.problems:
        counts = ", ".join(f"{len(names):,} {kind}" for kind, names in found.problems.items())
        raise UserError(
            f"{place.folder} is not what {suite.name} wants ({counts} of {found.files:,} files): "
            "move what is foreign away, remove what is not right, and draw again"
        )
    local, copy = place.folder, ""
    if buckets.is_remote(local):  # which no scorer reads
        local = epath.Path(local.name).resolve()
        moved = [place.folder, *[place.beside(".json")] * suite.map, local.parent]
        copy = f"gcloud storage cp -r {shlex.join(map(str, moved))}\n"
    if suite.map:
        drawing.map_file(suite, place, prompts.items, local)
    images = buckets.absolute(args.images) if args.images else manifest.get("images_path")
    commands = copy + suite.commands(local, size[0] if size else 0, images)
    again = f"twinflow evaluate suite read {shlex.quote(str(place.folder))} --results FILE ..."
    print(f"{found.files:,} files in {place.folder} are as {suite.name} wants them. In a clone of "
          f"github.com/{suite.repository}:\n\n{commands}\n\nand then {again}")
    return 0


def read(args: argparse.Namespace) -> int:
    """Reads the scorer's files."""
    folder, manifest, suite, prompts = opened(args)
    scores = results.read(suite, prompts.items, folder, args.results, args.partial)
    kept = tables.kept_scores(scores, manifest, args.judged_by)
    return kept_and_told(folder, results.SCORES, kept)


def diversity(args: argparse.Namespace) -> int:
    """LPIPS of the pictures of one prompt."""
    folder, manifest, suite, prompts = opened(args)
    scores = measure(folder, suite, prompts.items, args.weights, args.network)
    return kept_and_told(folder, tables.DIVERSITY, scores | {"manifest": manifest})


def kept_and_told(folder: epath.Path, ending: str, kept: dict[str, Any]) -> int:
    """Keeps scores beside a folder, and prints its table."""
    with files.writing("the scores of", str(folder)):
        file = results.write(folder, ending, kept)
    print(tables.table([str(folder)]).text())
    print(f"kept in {file}")
    return 0


def table(args: argparse.Namespace) -> int:
    """Several suites of one run."""
    found = tables.table(args.folders, args.teacher)
    print(found.text())
    for flag, text in (("json", found.json()), ("markdown", found.markdown())):
        if file := getattr(args, flag):
            with files.writing(f"--{flag}", file):
                files.write(file, text.encode())
    return 0
