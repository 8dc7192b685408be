"""The verb `sample` for class-conditional runs."""

import argparse
import json

import numpy as np
from etils import epath

from twinflow_jax import arguments, checkpoints, images
from twinflow_jax.checkpoints import store
from twinflow_jax.data import Split
from twinflow_jax.drawing import album, pairs
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.sampling import batched, by_class, counted, few_step, generate

COUNT = 8  # samples of a class, where none is given


def sample(args: argparse.Namespace) -> int:
    """Draws what the verb's arguments ask for; returns the exit status."""
    grid = few_step(1 if args.steps is None else args.steps, **arguments.sampler(args))
    count = COUNT if args.count is None else args.count
    run, model, params, step = checkpoints.load_weights(args.checkpoint, args.raw, args.at_step)
    classes = parse_classes(args.classes, run.model.num_classes)
    if args.pairs and any(grid.stochastic):
        raise UserError("--pairs: fresh noise on the way leaves no pair; give --style mul")
    album.check(len(classes) * count, *model.sample_shape[:2], args.sheet)
    labels = np.repeat(classes, count)
    weights = store.fingerprint(names.flatten(params))
    text = album.settings(
        checkpoint=args.checkpoint, seed=args.seed, at_step=step, raw=args.raw, weights=weights,
        **grid.told(),
    )
    which = f"step{step}{'_raw' if args.raw else ''}"
    folder = epath.Path(args.checkpoint).name[:80]
    name = f"{folder}_{which}_{grid.style}{grid.nfe}nfe_seed{args.seed}"
    out = epath.Path(args.out)
    if args.pairs:
        x = generate(model, params, labels, grid, args.seed)
        keys = batched.keys_of(labels, counted(labels), args.seed)
        noise = np.asarray(batched.started(keys, model.sample_shape)[0])
        pairs.save(out / f"pairs_{name}.safetensors", Split(x, labels, noise))
        print(f"{len(x)} pairs in {out / f'pairs_{name}.safetensors'}")
        return 0
    if args.sheet:
        told = {"classes": json.dumps(classes.tolist()), "count": str(count)}
        page = album.Page(f"sheet_{name}", text | told)
        x = generate(model, params, labels, grid, args.seed)
        picture = images.sheet({f"{grid.nfe} NFE": x}, count, f"step {step}")
        images.save(out / page.name, picture, page.text)
        print(f"{len(x)} samples in {out / page.name}")
        return 0
    places = counted(labels)
    pages = [
        album.Page(f"class{label}_{place:04d}_{name}", text | {"class": str(label)})
        for label, place in zip(labels, places, strict=True)
    ]
    left = album.missing(out, pages)
    if left:
        drawn = by_class(model, params, labels[left], places[left], grid, args.seed)
        album.write(out, [pages[i] for i in left], (x for part in drawn for x in part))
    print(album.summary(out, pages, left))
    return 0


def parse_classes(text: str | None, num_classes: int) -> np.ndarray:
    """The classes that `--classes` names; class 0 stands in for a network without classes."""
    if num_classes == 0:
        return np.zeros(1, np.int32)
    if text is None:
        return np.arange(num_classes, dtype=np.int32)
    try:
        classes = list(dict.fromkeys(int(part) for part in text.split(",")))  # each once
    except ValueError as error:
        raise UserError(f"--classes is {text!r}; give numbers like 3,1,4") from error
    if min(classes) < 0 or max(classes) >= num_classes:
        raise UserError(f"--classes {text}: this network has classes 0 to {num_classes - 1}")
    return np.asarray(classes, np.int32)
