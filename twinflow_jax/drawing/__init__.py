"""From prompts to pictures: conditions, networks in memory, denoising and decoding."""

import warnings
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float

from twinflow_jax.arrays import HostLatents, Numbers
from twinflow_jax.drawing import codec, denoising, text
from twinflow_jax.drawing.conditions import Embeddings, same_length
from twinflow_jax.drawing.denoising import Base, FewStep, Sampler
from twinflow_jax.drawing.pipeline import Pipeline, open_pipeline

__all__ = [
    "Base", "Embeddings", "FewStep", "Pipeline", "Sampler", "codec", "denoising", "open_pipeline",
    "pictures", "same_length", "text",
]

ROUND = 256  # pictures whose latents are in memory at once


def pictures(
    pipeline: Pipeline, sampler: Sampler, cond: Embeddings, owners: Numbers,
    numbers: Numbers, shape: tuple[int, int, int], seed: int, batch: int | None = None,
    null: Embeddings | None = None, tile: int = codec.TILE,
    seen: Callable[[HostLatents], None] | None = None, keep: bool = False,
) -> Iterator[Float[np.ndarray, "H W 3"]]:
    """Pictures in [-1, 1], each as soon as it is decoded; arguments as of `denoising.denoise`.

    seen: is given the latents. keep: an interrupt while they are denoised ends that, and what is
    denoised is still decoded. Of many, some are denoised, then decoded, then the next: memory does
    not grow with their number.
    """
    for start in range(0, len(owners), ROUND):
        some = slice(start, start + ROUND)
        parts, stop = [], None
        try:
            for part in denoising.denoise(
                pipeline, sampler, cond, owners[some], numbers[some], shape, seed, batch, null
            ):
                parts.append(part)
        except KeyboardInterrupt as interrupt:
            if not keep or not parts:
                raise
            stop = interrupt
            warnings.warn("stopped: decoding what is denoised; once more to end now", stacklevel=2)
        latents = np.concatenate(parts)
        if seen:
            seen(latents)
        yield from codec.decode(pipeline, latents, tile)
        if stop:
            raise stop
