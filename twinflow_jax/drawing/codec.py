"""Pictures to latents and back, through a pipeline's autoencoder."""

import contextlib
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from twinflow_jax import parallel
from twinflow_jax.arrays import HostImages, HostLatents
from twinflow_jax.drawing.pipeline import Pipeline
from twinflow_jax.errors import UserError
from twinflow_jax.models import tiling

BATCH = 16  # pictures encoded at once
OVERLAP = 128  # pixels that neighbouring tiles share
TILE = 1536  # pixels a side that are decoded whole: attention takes 5 GiB there


def encode(pipeline: Pipeline, images: HostImages) -> HostLatents:
    """Normalised latents of images in [-1, 1]."""
    size = min(BATCH, len(images))
    starts = range(0, len(images), size)
    with encoder(pipeline) as run:
        bar = tqdm(starts, unit="batch", desc="encoding", disable=not pipeline.progress)
        return np.concatenate([run(images[start : start + size], size) for start in bar])


@contextlib.contextmanager
def encoder(pipeline: Pipeline) -> Iterator[Callable[[HostImages, int], HostLatents]]:
    """`(images in [-1, 1], batch) -> latents`, for as long as the autoencoder stays loaded.

    batch: images that are encoded at once, always; N is at most that.
    """
    with pipeline.loaded("vae", "encoding") as (_, params):
        function, mesh = _method(pipeline, "encode"), pipeline.mesh()

        def run(images, batch: int):
            rows = images[np.arange(batch) % len(images)]  # what is missing repeats
            rows = pipeline.put(rows, parallel.over_devices(mesh, batch))
            latents = pipeline.run("encoding", None, function, params, rows)
            return np.asarray(latents)[: len(images)]

        yield run


def decode(
    pipeline: Pipeline, latents: HostLatents, tile: int = TILE
) -> Iterator[Float[np.ndarray, "H W 3"]]:
    """Images in [-1, 1], one after the other; those beyond `tile` pixels a side in tiles."""
    stage = "decoding"
    with pipeline.loaded("vae", stage) as (config, params):
        function, whole = _method(pipeline, "decode"), parallel.replicated(pipeline.mesh())

        def run(x):
            x = pipeline.run(stage, None, function, params, pipeline.put(x, whole))
            return np.asarray(x.astype(jnp.float32))

        size, overlap = tile // config.downscale, OVERLAP // config.downscale
        for x in tqdm(latents, unit="image", desc=stage, disable=not pipeline.progress):
            yield tiling.tiled(run, x[None], size, overlap, config.downscale)[0]


def tile_of(pipeline: Pipeline, pixels: int | None) -> int:
    """The side of decoding's tiles: what was asked for, or TILE.

    Raises:
      UserError: too small, or not of whole latents.
    """
    downscale = pipeline.config("vae").downscale
    pixels = TILE if pixels is None else pixels
    if pixels % downscale or pixels < 2 * OVERLAP:
        raise UserError(
            f"--tile is {pixels}; give a multiple of {downscale}, {2 * OVERLAP} or more"
        )
    return pixels


def _method(pipeline: Pipeline, name: str) -> Callable:
    """`(params, x)` through a method of the autoencoder."""
    module = pipeline.checkpoint.network("vae").module(pipeline.config("vae"))
    return lambda params, x: module.apply({"params": params}, x, method=name)
