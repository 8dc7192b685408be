"""Noise and conditions to latents, through a pipeline's transformer."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from tqdm import tqdm

from twinflow_jax import parallel, sampling, seeds
from twinflow_jax.arrays import HostLatents, Numbers
from twinflow_jax.drawing.conditions import Embeddings
from twinflow_jax.drawing.pipeline import Pipeline
from twinflow_jax.errors import UserError
from twinflow_jax.sampling.batched import batches, started


@runtime_checkable
class Sampler(Protocol):
    """How noise becomes latents. Hashable: what is compiled for one is kept for its equals."""

    def __call__(self, apply: Callable, params, noise, cond, null, keys) -> jax.Array:
        """Latents of a batch. null: the conditions that stand for none, or None."""


@dataclasses.dataclass(frozen=True)
class FewStep:
    """The any-step sampler along a grid."""

    grid: sampling.Grid

    def __call__(self, apply: Callable, params, noise, cond, null, keys) -> jax.Array:
        return sampling.sample(apply, params, noise, cond, self.grid, keys)


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model's own multi-step sampling. scale: of guidance, 1 for none; rule: how it
    combines the velocities with and without the condition."""

    schedule: sampling.Schedule
    scale: float
    rule: Callable = sampling.guide

    def __call__(self, apply: Callable, params, noise, cond, null, keys) -> jax.Array:
        inputs = (apply, params, noise, cond, null, self.schedule.times)
        if self.schedule.solver == "dpm":
            return sampling.dpm_solve(*inputs, self.schedule.told, self.scale, self.rule)
        return sampling.solve(*inputs, self.scale, rule=self.rule)


def base(pipeline: Pipeline, schedule: sampling.Schedule, guidance: float) -> Base:
    """The base model's own sampling, guided as its users count."""
    family = pipeline.family
    scale = guidance + 1 - family.no_guidance
    return Base(schedule, scale, family.base_guide or sampling.guide)


def denoise(
    pipeline: Pipeline, sampler: Sampler, cond: Embeddings, owners: Numbers,
    numbers: Numbers, shape: tuple[int, int, int], seed: int, batch: int | None = None,
    null: Embeddings | None = None,
) -> Iterator[HostLatents]:
    """Latents, batch by batch: one for each of `owners`, the row of `cond` that it is of.

    numbers: which noise each starts from; the same number with the same seed gives the same
    noise. null: one row, or one for each row of cond. batch: images at once (default: one for each
    part of the mesh's rows).
    """
    stage, mesh = "denoising", pipeline.mesh()
    owners = np.asarray(owners)
    batch = min(batch or parallel.row_parts(mesh), len(owners))
    keys = keys_of(numbers, seed)
    over = parallel.over_rows(mesh, batch)
    of_null = owners if null and len(null.tokens) == len(cond.tokens) else np.zeros_like(owners)
    with pipeline.loaded("transformer", stage) as (config, params):
        module = pipeline.checkpoint.network("transformer").module(config)

        def run(params, noise, cond, null, keys):
            apply = lambda params, *inputs: module.apply({"params": params}, *inputs)
            return sampler(apply, params, noise, cond, null, keys)

        def draw(rows, noise, keys):
            empty = null.rows(of_null[rows]) if null else None
            inputs = pipeline.put((noise, cond.rows(owners[rows]), empty, keys), over)
            return pipeline.run(stage, sampler, run, params, *inputs)

        bar = tqdm(total=len(owners), unit="image", desc=stage, disable=not pipeline.progress)
        with bar:
            for part in batches(draw, keys, shape, batch):
                bar.update(len(part))
                yield part


def noise_of(numbers: Numbers, shape: tuple[int, int, int], seed: int) -> HostLatents:
    """What `denoise` draws the samples of these numbers from."""
    return np.asarray(started(keys_of(numbers, seed), shape)[0])


def keys_of(numbers: Numbers, seed: int) -> jax.Array:
    """The key of each number's sample."""
    numbers = np.asarray(numbers, np.uint32)
    return jax.vmap(lambda n: jax.random.fold_in(seeds.key(seed), n))(numbers)


def latent_shape(pipeline: Pipeline, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """Of images of (height, width) pixels; default: what the transformer was made for.

    Raises:
      UserError: the latents cannot have that size.
    """
    vae, transformer = pipeline.config("vae"), pipeline.config("transformer")
    places = transformer.sample_shape[:2]
    height, width = size or (side * vae.downscale for side in places)
    step = transformer.patch * vae.downscale
    if height < step or width < step or height % step or width % step:
        near = lambda side: max(step, round(side / step) * step)
        raise UserError(
            f"the size {width}x{height} is not divisible by {step}: choose "
            f"{near(width)}x{near(height)}"
        )
    return height // vae.downscale, width // vae.downscale, vae.latent_channels


def schedule(pipeline: Pipeline, steps: int, shape: tuple[int, int, int]) -> sampling.Schedule:
    """The base model's own, for a number of steps, from the checkpoint's scheduler.

    Raises:
      UserError: the checkpoint has none, or one that we do not know.
    """
    checkpoint = pipeline.checkpoint
    if not checkpoint.scheduler:
        raise UserError(f"{checkpoint.folder} has no scheduler, so no base sampling")
    tokens = shape[0] * shape[1] // pipeline.config("transformer").patch ** 2
    return sampling.published(
        checkpoint.scheduler, steps, tokens, pipeline.family.shifted_twice
    )
