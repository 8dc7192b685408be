"""What a run learns from and draws: streams of rows, and how a sample becomes a picture.

Labelled images train a class-conditional network as they are. For a text-to-image family each
label stands for its caption, and images and captions go through the pipeline's autoencoder and
text encoder once, before training; or the run reads what tools/encode.py made of them before.
"""

import dataclasses
from collections.abc import Callable, Sequence

import ml_dtypes  # noqa: F401 - NumPy then knows bfloat16 by name
import numpy as np
from etils import epath
from jaxtyping import Float

from twinflow_jax import checkpoints, data, evaluation, models, text_to_image
from twinflow_jax.arrays import AnyArray
from twinflow_jax.checkpoints import imported, random
from twinflow_jax.data.records import Records
from twinflow_jax.errors import UserError
from twinflow_jax.parallel import hosts
from twinflow_jax.training import records

Conditions = dict[str, AnyArray]  # row k of each array is of label, or prompt, k


@dataclasses.dataclass(frozen=True)
class Inputs:
    """streams: of each shape of samples, rows of {"x", "cond"} (data.batches).

    null: the condition that stands for none, of one row. shown: the conditions that previews
    draw, with their names. decode: samples -> images. judge: what scores drawn samples of each
    label, where there is one.
    """

    model: models.Model
    streams: tuple[tuple[data.Stream, ...], ...]
    null: Conditions
    shown: Conditions
    names: tuple[str, ...]
    decode: Callable[[Float[np.ndarray, "N ..."]], Float[np.ndarray, "N H W C"]]
    judge: evaluation.Judge | None


def take(conditions: Conditions, index) -> Conditions:
    """The conditions of some labels, one row each."""
    return {name: table[index] for name, table in conditions.items()}


def open_data(config, settings) -> data.Dataset | list[Records]:
    """The named dataset, or the folders of records, of a config. settings: the network's."""
    if config.data.records:
        return records.open_folders(config, settings)
    return data.load(config.data.name)


def shapes(source: data.Dataset | list[Records], settings) -> list[tuple[int, ...]]:
    """Of the samples, in the order of `Inputs.streams`."""
    if isinstance(source, data.Dataset):
        return [tuple(settings.sample_shape)]
    return list(records.by_shape(source, settings))


def digest(source: data.Dataset | list[Records]) -> str:
    """Of rows that may be others the next time, records; "" for the named datasets."""
    return "" if isinstance(source, data.Dataset) else records.digest(source)


def prepare(config, source: data.Dataset | list[Records], workdir: epath.PathLike) -> Inputs:
    """The inputs of a run whose config and folder have been checked."""
    if not isinstance(source, data.Dataset):
        return of_records(config, source, workdir)
    family, _ = models.settings_of(config.model)
    if family.text_to_image is None:
        return of_classes(config, source)
    return of_captions(config, source, workdir)


def labelled(split: data.Split, conditions: Conditions) -> tuple[tuple[data.Stream, ...], ...]:
    """The rows of a split, each with the condition of its label."""
    def read(rows, seeds):
        return {"x": split.x[rows], "cond": take(conditions, split.label[rows])}

    return ((data.Stream(len(split), read),),)


def of_classes(config, dataset: data.Dataset) -> Inputs:
    """Labelled images for a class-conditional network."""
    model = models.create(config.model)
    classes = np.arange(dataset.num_classes, dtype=np.int32)
    table = {"label": classes} if model.config.num_classes else {}
    scored = model.config.num_classes > 0 and config.sample.score_count > 0
    return Inputs(
        model, labelled(dataset.train, table), dict(model.null), shown=table,
        names=tuple(map(str, classes)), decode=lambda x: np.clip(x, -1, 1),
        judge=evaluation.Judge.create(dataset) if scored else None,
    )


def of_captions(config, dataset: data.Dataset, workdir: epath.PathLike) -> Inputs:
    """Images and captions through the networks of `config.pipeline`."""
    pipeline = open_pipeline(config, workdir)
    settings = pipeline.settings
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
    return Inputs(
        models.create(config.model), labelled(data.Split(latents, dataset.train.label), captions),
        null, shown, prompts, decoder(pipeline), judge=None,
    )


def of_records(config, folders: Sequence[Records], workdir: epath.PathLike) -> Inputs:
    """Rows that tools/encode.py made; previews draw `sample.prompts`, or captions of theirs."""
    pipeline = open_pipeline(config, workdir)
    settings, tokens = pipeline.settings, config.data.text_tokens
    prompts = tuple(config.sample.prompts)
    if prompts:
        embeddings = pipeline.embed(prompts, tokens)
    else:
        prompts, embeddings = records.first_captions(folders[0])
        embeddings = embeddings[:, :tokens]  # as a step sees them
    return Inputs(
        models.create(config.model),
        records.streams(folders, config.data.weights, settings, tokens),
        conditions(records.null(folders[0]), tokens, settings.dtype),
        conditions(embeddings, tokens, settings.dtype),
        prompts, decoder(pipeline), judge=None,
    )


def open_pipeline(config, workdir: epath.PathLike) -> text_to_image.Pipeline:
    """The networks of `config.pipeline`, random ones being made here first."""
    folder = checkpoints.pipeline_of(workdir, config)
    if config.pipeline == checkpoints.RANDOM:
        hosts.first(lambda: random.write_random(config.model.name, folder, config.train.seed))
    settings = models.settings_of(config.model)[1]
    return text_to_image.Pipeline(
        imported.open_imported(folder), settings.dtype, settings=settings, progress=False
    )


def decoder(pipeline: text_to_image.Pipeline):
    """Samples -> images."""
    return lambda latents: np.stack(pipeline.decode(latents, text_to_image.TILE))


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
