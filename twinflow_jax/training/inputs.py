"""What a run learns from and draws: rows, their conditions, and how a sample becomes a picture.

Labelled images train a class-conditional network as they are. For a text-to-image family each
label stands for its caption, and images and captions go through the pipeline's autoencoder and
text encoder once, before training.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes  # noqa: F401 - NumPy then knows bfloat16 by name
import numpy as np
from etils import epath
from jaxtyping import Float

from twinflow_jax import checkpoints, data, evaluation, models, text_to_image
from twinflow_jax.checkpoints import imported, random
from twinflow_jax.errors import UserError
from twinflow_jax.parallel import hosts

Conditions = dict[str, np.ndarray]  # row k of each array is of label, or prompt, k


@dataclasses.dataclass(frozen=True)
class Inputs:
    """split: rows to train on, each with a label. conditions: of the labels.

    shown: the conditions that previews draw, with their names. decode: samples -> images.
    judge: what scores drawn samples of each label, where there is one.
    """

    model: models.Model
    split: data.Split
    conditions: Conditions
    null: Conditions
    shown: Conditions
    names: tuple[str, ...]
    decode: Callable[[Float[np.ndarray, "N ..."]], Float[np.ndarray, "N H W C"]]
    judge: evaluation.Judge | None

    def batch(self, rows: dict[str, np.ndarray]) -> dict[str, Any]:
        """What a step takes, from rows {"x", "label"}."""
        return {"x": rows["x"], "cond": take(self.conditions, rows["label"])}


def take(conditions: Conditions, index) -> Conditions:
    """The conditions of some labels, one row each."""
    return {name: table[index] for name, table in conditions.items()}


def prepare(config, dataset: data.Dataset, workdir: epath.PathLike) -> Inputs:
    """The inputs of a run whose config and folder have been checked."""
    family, _ = models.settings_of(config.model)
    if family.text_to_image is None:
        return of_classes(config, dataset)
    return of_captions(config, dataset, workdir)


def of_classes(config, dataset: data.Dataset) -> Inputs:
    model = models.create(config.model)
    classes = np.arange(dataset.num_classes, dtype=np.int32)
    table = {"label": classes} if model.config.num_classes else {}
    scored = model.config.num_classes > 0 and config.sample.score_count > 0
    return Inputs(
        model, dataset.train, table, dict(model.null), shown=table, names=tuple(map(str, classes)),
        decode=lambda x: np.clip(x, -1, 1),
        judge=evaluation.Judge.create(dataset) if scored else None,
    )


def of_captions(config, dataset: data.Dataset, workdir: epath.PathLike) -> Inputs:
    """Images and captions through the networks of `config.pipeline`."""
    folder = checkpoints.pipeline_of(workdir, config)
    if config.pipeline == checkpoints.RANDOM:
        hosts.first(lambda: random.write_random(config.model.name, folder, config.train.seed))
    settings = models.settings_of(config.model)[1]
    pipeline = text_to_image.Pipeline(
        imported.open_imported(folder), settings.dtype, settings=settings, progress=False
    )
    prompts = tuple(config.sample.prompts) or dataset.captions
    captions, null, shown = (
        conditions(embeddings, config.data.text_tokens, settings.dtype)
        for embeddings in (
            pipeline.embed(dataset.captions, config.data.text_tokens), pipeline.null(),
            pipeline.embed(prompts, config.data.text_tokens),
        )
    )
    side = pipeline.config("vae").downscale
    height, width = (side * places for places in settings.sample_shape[:2])
    latents = pipeline.encode(data.to_rgb(dataset.train.x, height, width))

    def decode(latents):
        return np.stack(pipeline.decode(latents, text_to_image.TILE))

    return Inputs(
        models.create(config.model), data.Split(latents, dataset.train.label), captions, null,
        shown, prompts, decode, judge=None,
    )


def conditions(embeddings, tokens: int, dtype: str) -> Conditions:
    """Embeddings as a step takes them: so many tokens, in the dtype of computation.

    Raises:
      UserError: one has more valid tokens than that.
    """
    longest = int(embeddings.mask.sum(1).max())
    if longest > tokens:
        raise UserError(
            f"data.text_tokens is {tokens}, but the condition that stands for none has {longest} "
            "tokens: give more"
        )
    fill = max(tokens - embeddings.mask.shape[1], 0)
    padded = np.pad(embeddings.tokens[:, :tokens], ((0, 0), (0, fill), (0, 0)))
    mask = np.pad(embeddings.mask[:, :tokens], ((0, 0), (0, fill)))
    return {"tokens": padded.astype(dtype), "mask": mask}
